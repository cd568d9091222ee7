"""``natten.utils.checks``: arguments to per-axis tuples. Callers import these to normalise their own arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nbhd.compat.natten.core import knobs
from nbhd.compat.natten.core.kinds import KernelSchedule
from nbhd.compat.natten.core.signature import Unsupported
from nbhd.errors import ArgumentError

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


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    """One length an axis."""
    return _ints("input_size", na_dim, input_size, 1, "an integer or iterable of integers, all >= 1")


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
    """Whether the window is the whole map and no axis is causal, as up to 0.21.1."""
    size = tuple(input_tensor.shape[1:-2])
    return all(k == n and not c for n, k, c in zip(size, kernel_size, is_causal, strict=True))


def check_kernel_schedule(kernel_schedule: Any) -> KernelSchedule | None:
    """The schedule that ``"non"``, ``"coop"`` or ``"pp"`` is short for; None and schedules as they are.

    Raises:
        ArgumentError: it is none of these.
    """
    knobs.check_schedule(kernel_schedule)
    by_name = dict(zip(("non", "coop", "pp"), KernelSchedule, strict=True))
    return by_name[kernel_schedule] if isinstance(kernel_schedule, str) else kernel_schedule


def na_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
    raise_error: bool = True,
    backend_name: str | None = None,
) -> bool:
    """Whether the three fit one another as ``[batch, *spatial, heads, dim]``.

    Raises:
        ArgumentError: they do not, unless ``raise_error`` is False.
        Unsupported: they are sparse or nested, likewise (a ``NotImplementedError``).
    """
    tensors = (query, key, value)
    return _fit(misfit(*tensors, True, must_match_head_dims, supports_gqa_mqa, backend_name), raise_error, *tensors)


def fmha_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
    raise_error: bool = True,
    backend_name: str | None = None,
) -> bool:
    """Whether the three fit one another as ``[batch, tokens, heads, dim]``; query may have more tokens, or fewer.

    Raises:
        ArgumentError: they do not, unless ``raise_error`` is False.
        Unsupported: they are sparse or nested, likewise (a ``NotImplementedError``).
    """
    tensors = (query, key, value)
    return _fit(misfit(*tensors, False, must_match_head_dims, supports_gqa_mqa, backend_name), raise_error, *tensors)


def misfit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_map: bool,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
    backend_name: str | None = None,
) -> str | None:
    """What keeps the three from being attended over, if anything: ``is_map`` for a neighborhood, or with all keys."""
    tensors = (query, key, value)
    if any(t.is_sparse for t in tensors):
        return "NATTEN does not support sparse tensors."
    if any(t.is_nested for t in tensors):
        return "NATTEN does not support nested tensors."
    if not query.dtype == key.dtype == value.dtype:
        kinds = f"{query.dtype}, {key.dtype}, {value.dtype}"
        return f"Query, key, and value must assume the same data type, got {kinds}."
    if not query.device == key.device == value.device:
        places = f"{query.device}, {key.device}, {value.device}"
        return f"Query, key, and value must be on the same device, got {places}."
    got = f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
    if not query.ndim == key.ndim == value.ndim:
        return f"Query, key, and value must have the same rank, {got}"
    if is_map and query.ndim not in (4, 5, 6):
        return f"Expected 4-D, 5-D, or 6-D tensors as inputs (corresponding to NA1D, NA2D, and NA3D), {got}"
    if not is_map and query.ndim != 4:
        return f"Expected 4-D tensors as inputs to FMHA, {got}"
    if query.shape[-1] != key.shape[-1]:
        return f"Q and K head dims must match, {got}"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return f"Q, K, and V must match in batch size, {got}"
    name = backend_name or "This operation/backend"
    if must_match_head_dims and query.shape[-1] != value.shape[-1]:
        return f"{name} does not support different head dims for QK and V, {got}"
    if is_map and not query.shape[1:-2] == key.shape[1:-2] == value.shape[1:-2]:
        return f"Neighborhood Attention operations require Q, K, and V to match in their token layouts, {got}"
    if key.shape[1] != value.shape[1]:
        return f"K and V must match in sequence length, {got}"
    if key.shape[-2] != value.shape[-2]:
        return f"Key and value must always have the same number of heads, {got}"
    if not supports_gqa_mqa and query.shape[-2] != key.shape[-2]:
        return f"{name} does not support GQA/MQA, therefore number of heads in Q, K, and V must match, {got}"
    if key.shape[-2] < 1 or query.shape[-2] % key.shape[-2]:
        return f"Key/value heads must evenly divide query heads, {got}"
    return None


def _fit(problem: str | None, raise_error: bool, *tensors: Tensor) -> bool:
    if problem is not None and raise_error:
        raise (Unsupported if any(t.is_sparse or t.is_nested for t in tensors) else ArgumentError)(problem)
    return problem is None


def get_num_na_weights(kernel_size: Any) -> int:
    """Number of keys in a window."""
    return math.prod(kernel_size) if isinstance(kernel_size, (tuple, list)) else int(kernel_size)
