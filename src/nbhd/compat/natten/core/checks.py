"""``natten.utils.checks``: arguments to per-axis tuples. Callers import these to normalise their own arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nbhd.errors import ArgumentError

__all__ = [
    "check_all_args",
    "check_args_against_input",
    "check_causal_arg",
    "check_dilation_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "get_num_na_weights",
    "is_self_attention",
]


def _ints(name: str, axes: int, given: Any, least: int, rule: str) -> tuple[int, ...]:
    values = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,) * axes
    try:
        if len(values) != axes or any(isinstance(v, bool) for v in values):
            raise TypeError
        found = tuple(operator.index(v) for v in values)
        if any(v < least for v in found):
            raise TypeError
    except TypeError:
        raise ArgumentError(f"Invalid value for `{name}`; expected {rule}, got {given!r} for {axes} axes.") from None
    return found


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """One window an axis. 1 is accepted, which NATTEN refuses."""
    return _ints("kernel_size", na_dim, kernel_size, 1, "an integer or iterable of integers, all >= 1")


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """One stride an axis; None is 1."""
    rule = "an integer or tuple of positive integers"
    return _ints("stride", na_dim, 1 if stride is None else stride, 1, rule)


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    """One dilation an axis; None is 1."""
    rule = "an integer or tuple of positive integers"
    return _ints("dilation", na_dim, 1 if dilation is None else dilation, 1, rule)


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """One flag an axis; None is False."""
    given = False if is_causal is None else is_causal
    values = tuple(given) if isinstance(given, (tuple, list)) else (given,) * na_dim
    if len(values) != na_dim or not all(isinstance(v, bool) for v in values):
        raise ArgumentError(
            f"Invalid value for `is_causal`; expected a boolean or tuple of booleans, got {is_causal!r} for {na_dim}-D."
        )
    return values


def check_all_args(
    na_dim: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """All four as per-axis tuples, as from 0.20 on."""
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_stride_arg(na_dim, stride),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )


def check_args_against_input(
    input_tensor: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> None:
    """Whether the window fits the map of ``input_tensor`` ``[batch, *spatial, heads, dim]``.

    Raises:
        ArgumentError: it does not, or the stride is greater than the window.
    """
    size = tuple(input_tensor.shape[1:-2])
    if any(k * d > n for n, k, d in zip(size, kernel_size, dilation, strict=True)):
        raise ArgumentError(
            "The product of kernel size and dilation cannot be larger than input size along any dimension, got input "
            f"{size}, kernel_size {kernel_size}, dilation {dilation}."
        )
    if any(s > k for k, s in zip(kernel_size, stride, strict=True)):
        raise ArgumentError(
            f"Stride cannot be larger than kernel size along any dimension, got {stride} and {kernel_size}."
        )


def is_self_attention(input_tensor: Tensor, kernel_size: tuple[int, ...], is_causal: tuple[bool, ...]) -> bool:
    """Whether the window is the whole map and no axis is causal."""
    size = tuple(input_tensor.shape[1:-2])
    return all(k == n and not c for n, k, c in zip(size, kernel_size, is_causal, strict=True))


def get_num_na_weights(kernel_size: Any) -> int:
    """Number of keys in a window."""
    return math.prod(kernel_size) if isinstance(kernel_size, (tuple, list)) else int(kernel_size)
