"""The process-wide switches of ``natten.context``: kept and told back, without effect on results.

They choose among kernels that NATTEN has and nbhd has not, so each says once that it changes nothing here. NATTEN's
own rules about them (which values, which combinations) hold.
"""

from __future__ import annotations

import enum
from typing import Any

import torch

from nbhd.compat.natten.core import knobs
from nbhd.errors import ArgumentError


class MemoryUsagePreference(enum.StrEnum):
    """The three preferences; each equals its name as a string."""

    Default = "default"
    Strict = "strict"
    Unrestricted = "unrestricted"


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ArgumentError(f"Expected `bool`, got {type(value).__name__}: {value!r}. Pass True or False.")
    return value


class Settings:
    """The switches of one era.

    Args:
        kv_parallelism: whether KV parallelism is on from the start (it is from 0.20 on).
    """

    def __init__(self, kv_parallelism: bool) -> None:
        self._kv_parallelism_default = kv_parallelism
        self.reset()

    def reset(self) -> None:
        """Back to the defaults."""
        self._kv_parallelism = self._kv_parallelism_default
        self._fused = False
        self._deterministic = False
        self._memory = MemoryUsagePreference.Default
        self._flex = {"use": False, "force": False}
        self._switches = {"gemm_na": True, "tiled_na": True, "tf32": True}
        self._flex_compile = {"forward": False, "backward": False}
        self.reset_autotuner()

    def reset_autotuner(self) -> None:
        """The autotuner's defaults: off."""
        self._autotuner = {"forward": False, "backward": False, "thorough_forward": False, "thorough_backward": False}

    # ---- fused attention
    # ------------------------------------------------------------------------------------------------------------------

    def use_fused_na(
        self,
        mode: bool = True,
        kv_parallel: bool = True,
        use_flex_attention: bool = False,
        force_flex_attention: bool = False,
    ) -> None:
        """Ask for fused attention in modules. nbhd always fuses, but where attention dropout needs the weights.

        Raises:
            RuntimeError: KV parallelism is asked for, as it is by default, and NATTEN's deterministic mode is on.
        """
        flex = {"use": _bool(use_flex_attention), "force": _bool(force_flex_attention)}
        self.use_kv_parallelism_in_fused_na(_bool(mode) & _bool(kv_parallel))
        self._fused = mode
        self._flex = flex if mode else {"use": False, "force": False}
        knobs.ignored("use_fused_na", "modules are fused wherever the attention weights are not needed")

    def is_fused_na_enabled(self) -> bool:
        """What :meth:`use_fused_na` was last told."""
        return self._fused

    def use_flex_attention(self) -> None:
        """``use_fused_na`` with FlexAttention, which nbhd does not use."""
        self.use_fused_na(use_flex_attention=True)
        knobs.ignored("use_flex_attention", "nbhd has kernels of its own")

    def force_flex_attention(self) -> None:
        """``use_fused_na`` with FlexAttention and nothing else, which nbhd does not use."""
        self.use_fused_na(use_flex_attention=True, force_flex_attention=True)
        knobs.ignored("force_flex_attention", "nbhd has kernels of its own")

    def should_use_flex_attention(self) -> bool:
        """Whether FlexAttention was last asked for."""
        return self._flex["use"]

    def should_force_flex_attention(self) -> bool:
        """Whether nothing but FlexAttention was last asked for."""
        return self._flex["force"]

    # ---- determinism and memory
    # ------------------------------------------------------------------------------------------------------------------

    def use_kv_parallelism_in_fused_na(self, mode: bool = True) -> None:
        """Ask for a backward that is parallel over keys.

        Raises:
            RuntimeError: NATTEN's deterministic mode is on.
        """
        if not _bool(mode):
            self._kv_parallelism = False
            return
        if self._deterministic:
            raise RuntimeError("KV parallelism cannot be used with deterministic algorithms. Switch those off first.")
        if torch.are_deterministic_algorithms_enabled():
            knobs.ignored("use_kv_parallelism_in_fused_na", "PyTorch's deterministic algorithms are on")
            return
        self._kv_parallelism = True
        knobs.ignored("use_kv_parallelism_in_fused_na", "the backward decides how it splits keys")

    def is_kv_parallelism_in_fused_na_enabled(self) -> bool:
        """What :meth:`use_kv_parallelism_in_fused_na` was last told."""
        return self._kv_parallelism

    def use_deterministic_algorithms(self, mode: bool = True) -> None:
        """Ask for the same bits at every run. PyTorch's own flag is the one that nbhd's backends read."""
        self._deterministic = _bool(mode)
        if mode:
            self._kv_parallelism = False
            self.reset_autotuner()
            knobs.ignored("use_deterministic_algorithms", "use torch.use_deterministic_algorithms")

    def are_deterministic_algorithms_enabled(self) -> bool:
        """What :meth:`use_deterministic_algorithms` was last told."""
        return self._deterministic

    def set_memory_usage_preference(self, pref: str = "default") -> None:
        """Ask for more or less workspace: ``"default"``, ``"strict"`` or ``"unrestricted"``.

        Raises:
            ArgumentError: it is none of the three.
        """
        if pref not in tuple(MemoryUsagePreference):
            raise ArgumentError(
                "natten.set_memory_usage_preference allows only one of three settings: `default`, `strict`, and "
                f"`unrestricted`. Got {pref!r}."
            )
        self._memory = MemoryUsagePreference(pref)
        if pref != "default":
            knobs.ignored("set_memory_usage_preference", "memory is linear in the size of the map")

    def get_memory_usage_preference(self) -> MemoryUsagePreference:
        """What :meth:`set_memory_usage_preference` was last told."""
        return self._memory

    def is_memory_usage_default(self) -> bool:
        """Whether the preference is ``"default"``."""
        return self._memory is MemoryUsagePreference.Default

    def is_memory_usage_strict(self) -> bool:
        """Whether the preference is ``"strict"``."""
        return self._memory is MemoryUsagePreference.Strict

    def is_memory_usage_unrestricted(self) -> bool:
        """Whether the preference is ``"unrestricted"``."""
        return self._memory is MemoryUsagePreference.Unrestricted

    # ---- autotuner (0.17)
    # ------------------------------------------------------------------------------------------------------------------

    def use_autotuner(
        self,
        forward_pass: bool | None = None,
        backward_pass: bool | None = None,
        thorough_mode_forward: bool | None = None,
        thorough_mode_backward: bool | None = None,
        warmup_steps_forward: int | None = None,
        warmup_steps_backward: int | None = None,
        steps_forward: int | None = None,
        steps_backward: int | None = None,
    ) -> None:
        """Ask for kernels tuned at first use.

        Raises:
            RuntimeError: NATTEN's deterministic mode is on.
        """
        asked = {
            "forward": forward_pass,
            "backward": backward_pass,
            "thorough_forward": thorough_mode_forward,
            "thorough_backward": thorough_mode_backward,
        }
        given = {name: _bool(mode) for name, mode in asked.items() if mode is not None}
        if any(given.values()) and self._deterministic:
            raise RuntimeError("The autotuner cannot be used with deterministic algorithms. Switch those off first.")
        if any(given.values()):
            knobs.ignored("use_autotuner", "nothing is tuned at run time")
            if torch.are_deterministic_algorithms_enabled():
                return
        self._autotuner.update(given)

    def disable_autotuner(self) -> None:
        """Switch the autotuner off."""
        self.reset_autotuner()

    def is_autotuner_enabled(self) -> bool:
        """Whether it was asked for in either pass."""
        return self._autotuner["forward"] or self._autotuner["backward"]

    def is_autotuner_enabled_for_forward(self) -> bool:
        """Whether it was asked for in the forward pass."""
        return self._autotuner["forward"]

    def is_autotuner_enabled_for_backward(self) -> bool:
        """Whether it was asked for in the backward pass."""
        return self._autotuner["backward"]

    def is_autotuner_thorough_for_forward(self) -> bool:
        """Whether thorough search was asked for in the forward pass."""
        return self._autotuner["thorough_forward"]

    def is_autotuner_thorough_for_backward(self) -> bool:
        """Whether thorough search was asked for in the backward pass."""
        return self._autotuner["thorough_backward"]

    # ---- kernels of the unfused operators (0.15, 0.17)
    # ------------------------------------------------------------------------------------------------------------------

    def _switch(self, name: str, mode: bool) -> None:
        self._switches[name] = _bool(mode)
        knobs.ignored(f"use_{name}", "it chooses among CUDA kernels of NATTEN")

    def use_gemm_na(self, mode: bool = True) -> None:
        """Ask for NATTEN's matrix-multiply kernels."""
        self._switch("gemm_na", mode)

    def use_tf32_in_gemm_na(self, mode: bool = True) -> None:
        """Ask for TF32 in NATTEN's matrix-multiply kernels."""
        self._switch("tf32", mode)

    def use_tiled_na(self, mode: bool = True) -> None:
        """Ask for NATTEN's tiled kernels."""
        self._switch("tiled_na", mode)

    def is_gemm_na_enabled(self) -> bool:
        """What :meth:`use_gemm_na` was last told."""
        return self._switches["gemm_na"]

    def is_tf32_in_gemm_na_enabled(self) -> bool:
        """What :meth:`use_tf32_in_gemm_na` was last told."""
        return self._switches["tf32"]

    def is_tiled_na_enabled(self) -> bool:
        """What :meth:`use_tiled_na` was last told."""
        return self._switches["tiled_na"]

    def enable_gemm_na(self) -> None:
        """``use_gemm_na(True)``."""
        self.use_gemm_na(True)

    def disable_gemm_na(self) -> None:
        """``use_gemm_na(False)``."""
        self.use_gemm_na(False)

    def enable_tf32(self) -> None:
        """``use_tf32_in_gemm_na(True)``."""
        self.use_tf32_in_gemm_na(True)

    def disable_tf32(self) -> None:
        """``use_tf32_in_gemm_na(False)``."""
        self.use_tf32_in_gemm_na(False)

    def enable_tiled_na(self) -> None:
        """``use_tiled_na(True)``."""
        self.use_tiled_na(True)

    def disable_tiled_na(self) -> None:
        """``use_tiled_na(False)``."""
        self.use_tiled_na(False)

    # ---- FlexAttention (0.20 and later)
    # ------------------------------------------------------------------------------------------------------------------

    def allow_flex_compile(self, mode: bool = True, backprop: bool = False) -> None:
        """Allow compiled FlexAttention, which nbhd does not use."""
        self._flex_compile = {"forward": _bool(mode), "backward": _bool(backprop)}
        knobs.ignored("allow_flex_compile", "nbhd does not use FlexAttention")

    def allow_flex_compile_backprop(self, mode: bool = True) -> None:
        """Allow compiled FlexAttention in the backward."""
        self._flex_compile["backward"] = _bool(mode)
        knobs.ignored("allow_flex_compile_backprop", "nbhd does not use FlexAttention")

    def disable_flex_compile(self) -> None:
        """Disallow compiled FlexAttention. (In NATTEN 0.21 this enables it.)"""
        self._flex_compile = {"forward": False, "backward": False}

    def disable_flex_compile_backprop(self) -> None:
        """Disallow compiled FlexAttention in the backward."""
        self._flex_compile["backward"] = False

    def is_flex_compile_allowed(self) -> bool:
        """What was last asked for."""
        return self._flex_compile["forward"]

    def is_flex_compile_backprop_allowed(self) -> bool:
        """What was last asked for."""
        return self._flex_compile["backward"]
