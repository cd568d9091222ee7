"""``natten.utils`` and ``natten.utils.checks`` of 0.17: three arguments in, three tuples out; there was no stride."""

from __future__ import annotations

from typing import Any

from nbhd.compat.natten.core.checks import (
    check_causal_arg,
    check_dilation_arg,
    check_input_size_arg,
    check_kernel_size_arg,
    get_num_na_weights,
)

__all__ = [
    "check_all_args",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "get_num_na_weights",
]


def check_all_args(
    na_dim: int, kernel_size: Any, dilation: Any, is_causal: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """All three as per-axis tuples."""
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )
