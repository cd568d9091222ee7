"""``natten.context`` of 0.17: switches that are kept and change nothing, and ``has_*``."""

from __future__ import annotations

from nbhd.compat.natten.core.machine import (
    has_bfloat,
    has_cuda,
    has_fna,
    has_fp32_gemm,
    has_fp64_gemm,
    has_fused_na,
    has_gemm,
    has_half,
    has_tf32_gemm,
)
from nbhd.compat.natten.core.settings import MemoryUsagePreference, Settings

__all__ = [
    "AutotunerContext",
    "MemoryUsagePreference",
    "NattenContext",
    "are_deterministic_algorithms_enabled",
    "disable_autotuner",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "set_memory_usage_preference",
    "should_force_flex_attention",
    "should_use_flex_attention",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]

_settings = Settings(kv_parallelism=False)

use_fused_na = _settings.use_fused_na
is_fused_na_enabled = _settings.is_fused_na_enabled
use_kv_parallelism_in_fused_na = _settings.use_kv_parallelism_in_fused_na
is_kv_parallelism_in_fused_na_enabled = _settings.is_kv_parallelism_in_fused_na_enabled
use_deterministic_algorithms = _settings.use_deterministic_algorithms
are_deterministic_algorithms_enabled = _settings.are_deterministic_algorithms_enabled
set_memory_usage_preference = _settings.set_memory_usage_preference
get_memory_usage_preference = _settings.get_memory_usage_preference
is_memory_usage_default = _settings.is_memory_usage_default
is_memory_usage_strict = _settings.is_memory_usage_strict
is_memory_usage_unrestricted = _settings.is_memory_usage_unrestricted
use_autotuner = _settings.use_autotuner
disable_autotuner = _settings.disable_autotuner
is_autotuner_enabled = _settings.is_autotuner_enabled
is_autotuner_enabled_for_forward = _settings.is_autotuner_enabled_for_forward
is_autotuner_enabled_for_backward = _settings.is_autotuner_enabled_for_backward
is_autotuner_thorough_for_forward = _settings.is_autotuner_thorough_for_forward
is_autotuner_thorough_for_backward = _settings.is_autotuner_thorough_for_backward
use_gemm_na = _settings.use_gemm_na
use_tf32_in_gemm_na = _settings.use_tf32_in_gemm_na
use_tiled_na = _settings.use_tiled_na
is_gemm_na_enabled = _settings.is_gemm_na_enabled
is_tf32_in_gemm_na_enabled = _settings.is_tf32_in_gemm_na_enabled
is_tiled_na_enabled = _settings.is_tiled_na_enabled
enable_tf32 = _settings.enable_tf32
disable_tf32 = _settings.disable_tf32
enable_gemm_na = _settings.enable_gemm_na
disable_gemm_na = _settings.disable_gemm_na
enable_tiled_na = _settings.enable_tiled_na
disable_tiled_na = _settings.disable_tiled_na
use_flex_attention = _settings.use_flex_attention
force_flex_attention = _settings.force_flex_attention
should_use_flex_attention = _settings.should_use_flex_attention
should_force_flex_attention = _settings.should_force_flex_attention
use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled


class NattenContext:
    """The switches as NATTEN's own tests address them."""

    @staticmethod
    def reset() -> None:
        """All switches back to their defaults."""
        _settings.reset()


class AutotunerContext:
    """The autotuner's switches alone."""

    @staticmethod
    def reset() -> None:
        """The autotuner off."""
        _settings.reset_autotuner()
