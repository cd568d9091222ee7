"""``natten.context`` of 0.20 and later. ``has_*``, gone there, stay: callers still ask."""

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
    "MemoryUsagePreference",
    "NattenContext",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
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
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]

_settings = Settings(kv_parallelism=True)

use_kv_parallelism_in_fused_na = _settings.use_kv_parallelism_in_fused_na
is_kv_parallelism_in_fused_na_enabled = _settings.is_kv_parallelism_in_fused_na_enabled
use_deterministic_algorithms = _settings.use_deterministic_algorithms
are_deterministic_algorithms_enabled = _settings.are_deterministic_algorithms_enabled
set_memory_usage_preference = _settings.set_memory_usage_preference
get_memory_usage_preference = _settings.get_memory_usage_preference
is_memory_usage_default = _settings.is_memory_usage_default
is_memory_usage_strict = _settings.is_memory_usage_strict
is_memory_usage_unrestricted = _settings.is_memory_usage_unrestricted
allow_flex_compile = _settings.allow_flex_compile
allow_flex_compile_backprop = _settings.allow_flex_compile_backprop
disable_flex_compile = _settings.disable_flex_compile
disable_flex_compile_backprop = _settings.disable_flex_compile_backprop
is_flex_compile_allowed = _settings.is_flex_compile_allowed
is_flex_compile_backprop_allowed = _settings.is_flex_compile_backprop_allowed


class NattenContext:
    """The switches as NATTEN's own tests address them."""

    @staticmethod
    def reset() -> None:
        """All switches back to their defaults."""
        _settings.reset()
