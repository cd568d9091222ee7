"""``get_configs_for_*``: the tile shapes of NATTEN's kernels, of which nbhd has none to offer."""

from __future__ import annotations

from typing import Any

__all__ = [
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
]


def no_configs(query: Any = None, key: Any = None, value: Any = None, torch_compile: bool = False) -> list[Any]:
    """An empty list, as NATTEN returns where a backend cannot run: nothing to choose from, and nothing to tune."""
    return []


get_configs_for_cutlass_fna = no_configs
get_configs_for_cutlass_fmha = no_configs
get_configs_for_cutlass_hopper_fna = no_configs
get_configs_for_cutlass_hopper_fmha = no_configs
get_configs_for_cutlass_blackwell_fna = no_configs
get_configs_for_cutlass_blackwell_fmha = no_configs
get_configs_for_flex_fna = no_configs
get_configs_for_flex_fmha = no_configs
get_bwd_configs_for_cutlass_fna = no_configs
get_bwd_configs_for_cutlass_fmha = no_configs
get_bwd_configs_for_cutlass_hopper_fna = no_configs
get_bwd_configs_for_cutlass_hopper_fmha = no_configs
get_bwd_configs_for_cutlass_blackwell_fna = no_configs
get_bwd_configs_for_cutlass_blackwell_fmha = no_configs
