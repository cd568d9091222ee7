"""``natten.flops`` of 0.17: that of before, and counts from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nbhd.compat.natten.core import flops as before
from nbhd.compat.natten.core.flops import *  # noqa: F403
from nbhd.compat.natten.v0_17.utils import check_all_args
from nbhd.errors import ArgumentError

__all__ = [*before.__all__, "fna_flop_count", "na_av_flop_count", "na_qk_flop_count"]


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of fused attention: two a multiply-add, or one with ``return_macs``. Causal axes count in full.

    Raises:
        ArgumentError: the shapes differ, or a parameter does not fit.
    """
    _one_shape(q_shape, k_shape, v_shape)
    products = _products(q_shape, kernel_size, dilation, is_causal, is_heads_last)
    return (2 if return_macs else 4) * products


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of the scores, counted as in :func:`fna_flop_count`.

    Raises:
        ArgumentError: the shapes differ, or a parameter does not fit.
    """
    _one_shape(q_shape, k_shape)
    return (1 if return_macs else 2) * _products(q_shape, kernel_size, dilation, is_causal, is_heads_last)


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of weights times values, counted as in :func:`fna_flop_count`.

    Raises:
        ArgumentError: a parameter does not fit.
    """
    return (1 if return_macs else 2) * _products(v_shape, kernel_size, dilation, is_causal, is_heads_last)


def _one_shape(*shapes: Sequence[int]) -> None:
    if len({tuple(shape) for shape in shapes}) > 1:
        raise ArgumentError(f"Expected identical QKV shapes, got {', '.join(str(tuple(shape)) for shape in shapes)}.")


def _products(shape: Sequence[int], kernel_size: Any, dilation: Any, is_causal: Any, is_heads_last: bool) -> int:
    """Multiply-adds of one of the two halves: the ``dim`` of every query with every key of its window."""
    if len(shape) not in (4, 5, 6):
        layout = "[batch, *spatial, heads, dim]" if is_heads_last else "[batch, heads, *spatial, dim]"
        raise ArgumentError(f"Shapes must be {layout} with one to three spatial axes, got {tuple(shape)}.")
    window, _, _ = check_all_args(len(shape) - 3, kernel_size, dilation, is_causal)
    return math.prod(shape) * math.prod(window)
