"""``natten.utils.checks`` of 0.21.5 to 0.21.7."""

from __future__ import annotations

from torch import Tensor

from nbhd.compat.natten.core import checks as before
from nbhd.compat.natten.core.checks import (
    check_all_args,
    check_args_against_input,
    check_causal_arg,
    check_dilation_arg,
    check_input_size_arg,
    check_kernel_schedule,
    check_kernel_size_arg,
    check_stride_arg,
    fmha_tensor_checks,
    get_num_na_weights,
    na_tensor_checks,
)

__all__ = [
    "check_all_args",
    "check_args_against_input",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_schedule",
    "check_kernel_size_arg",
    "check_stride_arg",
    "fmha_tensor_checks",
    "get_num_na_weights",
    "is_self_attention",
    "na_tensor_checks",
]


def is_self_attention(
    input_tensor: Tensor,
    kernel_size: tuple[int, ...],
    is_causal: tuple[bool, ...],
    has_additional_attention: bool = False,
) -> bool:
    """Whether this is attention over all keys: the window the whole map, and no axis causal.

    A sequence with nothing beside it may be causal: that is causal attention.
    """
    if input_tensor.ndim == 4 and not has_additional_attention:
        is_causal = (False,)
    return before.is_self_attention(input_tensor, kernel_size, is_causal)
