"""``attention`` of 0.20 and later: all keys, sequences of one length or packed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nbhd import dense
from nbhd.compat.natten.core import packed_sequences
from nbhd.compat.natten.core.checks import misfit
from nbhd.compat.natten.core.signature import Signature
from nbhd.compat.natten.core.tensors import autocast, check_tensor
from nbhd.errors import ArgumentError


def attention(
    signature: Signature,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    lengths: tuple[Any, Any, Any, Any, Any, Any],
    return_lse: bool,
) -> Any:
    """Checks, then one attention, or one for each packed sequence.

    ``lengths`` are ``seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV``.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(signature, name, tensor, 4)
    query, key, value = autocast(query, key, value)
    problem = misfit(query, key, value, is_map=False)
    if problem is not None:
        raise signature.error(problem)
    if not query.is_floating_point():
        raise signature.error(f"Query, key, and value must be floating point, got {query.dtype}.")
    if not isinstance(is_causal, bool):
        raise signature.error(f"is_causal must be a bool, got {is_causal!r}.")
    if scale is not None and (isinstance(scale, (bool, Tensor, str)) or not hasattr(scale, "__float__")):
        raise signature.error(f"scale must be a number or None, got {scale!r}.")
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not _is_packed(lengths):
        out, lse = dense.attend(query, key, value, factor, is_causal, return_lse)
        return (out, lse) if return_lse else out
    if query.shape[0] != 1:
        raise signature.error(
            "Variable length Attention only supports sequence-packed memory layout (batch = 1), got batch "
            f"{query.shape[0]}."
        )
    if torch.compiler.is_compiling() and any(isinstance(given, Tensor) for given in lengths):
        sum_q, sum_kv = _sums_in_a_graph(signature, lengths)
        out, lse = packed_sequences.attend(query, key, value, sum_q, sum_kv, factor, is_causal)
        return (out, lse) if return_lse else out
    outs, lses = [], []
    for (q0, q1), (k0, k1) in _sequences(signature, query, key, value, lengths):
        out, lse = dense.attend(query[:, q0:q1], key[:, k0:k1], value[:, k0:k1], factor, is_causal, return_lse)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs, 1)
    return (out, torch.cat([lse for lse in lses if lse is not None], 1)) if return_lse else out


def varlen_parameters(
    query: Tensor, key: Tensor, value: Tensor, seqlens_q: Any, seqlens_kv: Any
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Cumulative lengths (int32, from 0, on the device of ``query``) and greatest lengths of packed sequences.

    Without lengths: ``(None, None, 0, 0)``.

    Raises:
        ArgumentError: one of the two is missing, they differ in number, or a length is negative or no whole number.
    """
    if seqlens_q is None and seqlens_kv is None:
        return None, None, 0, 0
    signature = Signature("0.21", "generate_varlen_parameters", "(query, key, value, seqlens_Q, seqlens_KV)")
    pairs = _from_lengths(signature, seqlens_q, seqlens_kv)
    sums = [[0, *itertools.accumulate(lengths)] for lengths in pairs]
    tensors = [torch.tensor(s, dtype=torch.int32, device=query.device) for s in sums]
    return tensors[0], tensors[1], max(pairs[0]), max(pairs[1])


def _is_packed(given: tuple[Any, ...]) -> bool:
    """Not if nothing is given, nor if all there is are greatest lengths of 0, as from :func:`varlen_parameters`."""
    return any(part is not None for part in given[:4]) or any(most is not None and most != 0 for most in given[4:])


def _check_given(signature: Signature, given: tuple[Any, ...]) -> bool:
    """Whether the lengths are given, or else their sums."""
    if given[0] is not None or given[1] is not None:
        if any(other is not None for other in given[2:]):
            raise signature.error("Pass seqlens_Q and seqlens_KV, or cumulative_seqlen and max_seqlen, not both.")
        return True
    if any(part is None for part in given[2:]):
        raise signature.error(
            "Variable length Attention requires all of cumulative_seqlen_{Q,KV} and max_seqlen_{Q,KV} to be set."
        )
    return False


def _sums_in_a_graph(signature: Signature, given: tuple[Any, ...]) -> list[Tensor]:
    """Sums of the lengths as tensors, of which a graph in the making cannot ask what is in them."""
    are_lengths = _check_given(signature, given)
    what, rows = ("seqlens", given[:2]) if are_lengths else ("cumulative_seqlen", given[2:4])
    sums = []
    for end, row in zip(("Q", "KV"), rows, strict=True):
        tensor = torch.tensor(row) if isinstance(row, (list, tuple)) else row
        _check_ints(signature, f"{what}_{end}", tensor)
        sums.append(torch.nn.functional.pad(tensor.cumsum(0), (1, 0)) if are_lengths else tensor)
    return sums


def _check_ints(signature: Signature, name: str, given: Any) -> None:
    if not isinstance(given, Tensor) or given.ndim != 1 or given.dtype not in (torch.int32, torch.int64):
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise signature.error(f"{name} must be a 1-D int32 tensor, got {got}.")


def _sequences(
    signature: Signature, query: Tensor, key: Tensor, value: Tensor, given: tuple[Any, ...]
) -> Iterator[tuple[packed_sequences.Range, packed_sequences.Range]]:
    lengths_q, lengths_kv, sum_q, sum_kv, max_q, max_kv = given
    if _check_given(signature, given):
        sums = [[0, *itertools.accumulate(lengths)] for lengths in _from_lengths(signature, lengths_q, lengths_kv)]
    else:
        _check_ints(signature, "cumulative_seqlen_Q", sum_q)
        _check_ints(signature, "cumulative_seqlen_KV", sum_kv)
        sums = [sum_q.tolist(), sum_kv.tolist()]
        for name, most, row in (("max_seqlen_Q", max_q, sums[0]), ("max_seqlen_KV", max_kv, sums[1])):
            longest = max((b - a for a, b in itertools.pairwise(row)), default=0)
            if isinstance(most, bool) or not isinstance(most, int) or most < longest:
                raise signature.error(
                    f"{name} must be an int of at least {longest}, the longest sequence, got {most!r}."
                )
    try:
        return packed_sequences.ranges(sums[0], sums[1], query.shape[1], key.shape[1])
    except ArgumentError as error:
        raise signature.error(str(error)) from None


def _from_lengths(signature: Signature, lengths_q: Any, lengths_kv: Any) -> list[list[int]]:
    rows = []
    for name, given in (("seqlens_Q", lengths_q), ("seqlens_KV", lengths_kv)):
        row = given.tolist() if isinstance(given, Tensor) else list(given) if isinstance(given, (list, tuple)) else None
        if not isinstance(row, list) or not row or not all(type(n) is int and n >= 0 for n in row):
            raise signature.error(f"{name} must be a 1-D int tensor, one length a sequence, got {given!r}.")
        rows.append(row)
    if len(rows[0]) != len(rows[1]):
        raise signature.error(f"seqlens_Q and seqlens_KV must have one size, got {len(rows[0])} and {len(rows[1])}.")
    return rows
