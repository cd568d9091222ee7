"""``natten.backends``: which backend a call would take. Here ``"nbhd"``, which takes the best of its own."""

from __future__ import annotations

from typing import Any

from nbhd.compat.natten.core.knobs import OWN_BACKEND
from nbhd.compat.natten.core.tile_configs import *  # noqa: F403
from nbhd.compat.natten.core.tile_configs import __all__ as _listings

__all__ = [
    "can_run_cutlass_blackwell_fmha",
    "can_run_cutlass_blackwell_fna",
    "can_run_cutlass_fmha",
    "can_run_cutlass_fna",
    "can_run_cutlass_hopper_fmha",
    "can_run_cutlass_hopper_fna",
    "can_run_flex_attention",
    "choose_backend",
    "choose_fmha_backend",
    "get_compatible_backends",
    "get_compatible_fmha_backends",
    *_listings,
]


def choose_backend(query: Any, key: Any, value: Any, torch_compile: bool = False) -> str:
    """``"nbhd"``, which can be passed as ``backend``."""
    return OWN_BACKEND


def choose_fmha_backend(
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> str:
    """``"nbhd"``, which can be passed as ``backend``."""
    return OWN_BACKEND


def get_compatible_backends(query: Any, key: Any, value: Any, torch_compile: bool = False) -> list[str]:
    """``["nbhd"]``."""
    return [OWN_BACKEND]


def get_compatible_fmha_backends(
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> list[str]:
    """``["nbhd"]``."""
    return [OWN_BACKEND]


def _cannot_run(*args: Any, **kwargs: Any) -> bool:
    """False: NATTEN's kernels are not here. Their names as ``backend`` are accepted all the same."""
    return False


can_run_cutlass_fna = can_run_cutlass_hopper_fna = can_run_cutlass_blackwell_fna = _cannot_run
can_run_cutlass_fmha = can_run_cutlass_hopper_fmha = can_run_cutlass_blackwell_fmha = _cannot_run
can_run_flex_attention = _cannot_run
