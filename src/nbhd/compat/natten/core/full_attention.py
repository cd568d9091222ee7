"""``attention`` of 0.20 and later: all keys, sequences of one length or packed."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from nbhd.compat.natten.core import dense
from nbhd.compat.natten.core.signature import Signature
from nbhd.compat.natten.core.tensors import autocast, check_tensor


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
    _check(signature, query, key, value)
    if not isinstance(is_causal, bool):
        raise signature.error(f"is_causal must be a bool, got {is_causal!r}.")
    if scale is not None and (isinstance(scale, (bool, Tensor, str)) or not hasattr(scale, "__float__")):
        raise signature.error(f"scale must be a number or None, got {scale!r}.")
    query, key, value = autocast(query, key, value)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if all(given is None for given in lengths):
        out, lse = dense.attend(query, key, value, factor, is_causal, return_lse)
        return (out, lse) if return_lse else out
    if query.shape[0] != 1:
        raise signature.error(
            "Variable length Attention only supports sequence-packed memory layout (batch = 1), got batch "
            f"{query.shape[0]}."
        )
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


Range = tuple[int, int]


def _sequences(
    signature: Signature, query: Tensor, key: Tensor, value: Tensor, given: tuple[Any, ...]
) -> list[tuple[Range, Range]]:
    lengths_q, lengths_kv, sum_q, sum_kv, max_q, max_kv = given
    if lengths_q is not None or lengths_kv is not None:
        if any(other is not None for other in given[2:]):
            raise signature.error("Pass seqlens_Q and seqlens_KV, or cumulative_seqlen and max_seqlen, not both.")
        sums = [[0, *itertools.accumulate(lengths)] for lengths in _from_lengths(signature, lengths_q, lengths_kv)]
    else:
        if any(part is None for part in (sum_q, sum_kv, max_q, max_kv)):
            raise signature.error(
                "Variable length Attention requires all of cumulative_seqlen_{Q,KV} and max_seqlen_{Q,KV} to be set."
            )
        sums = [
            _cumulative(signature, "cumulative_seqlen_Q", sum_q),
            _cumulative(signature, "cumulative_seqlen_KV", sum_kv),
        ]
        for name, most, row in (("max_seqlen_Q", max_q, sums[0]), ("max_seqlen_KV", max_kv, sums[1])):
            longest = max(b - a for a, b in itertools.pairwise(row))
            if isinstance(most, bool) or not isinstance(most, int) or most < longest:
                raise signature.error(
                    f"{name} must be an int of at least {longest}, the longest sequence, got {most!r}."
                )
        if len(sums[0]) != len(sums[1]):
            raise signature.error(
                f"cumulative_seqlen_Q and cumulative_seqlen_KV must be of one size, got {len(sums[0])}, {len(sums[1])}."
            )
    for name, row, total in (("query", sums[0], query.shape[1]), ("key", sums[1], key.shape[1])):
        if row[-1] != total:
            raise signature.error(f"The sequences of {name} have {row[-1]} tokens together, {name} has {total}.")
    return list(zip(itertools.pairwise(sums[0]), itertools.pairwise(sums[1]), strict=True))


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


def _cumulative(signature: Signature, name: str, given: Any) -> list[int]:
    row = given.tolist() if isinstance(given, Tensor) and given.dtype in (torch.int32, torch.int64) else None
    if not isinstance(row, list) or len(row) < 2 or row[0] != 0 or any(a > b for a, b in itertools.pairwise(row)):
        raise signature.error(f"{name} must be a 1-D int32 tensor that starts at 0 and does not fall, got {given!r}.")
    return row


def _check(signature: Signature, query: Any, key: Any, value: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(signature, name, tensor, 4)
    shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    if query.dtype != key.dtype or query.dtype != value.dtype:
        kinds = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise signature.error(f"Query, key, and value must assume the same data type, got {kinds}.")
    if not query.is_floating_point():
        raise signature.error(f"Query, key, and value must be floating point, got {query.dtype}.")
    if query.device != key.device or query.device != value.device:
        places = f"{query.device}, {key.device}, {value.device}"
        raise signature.error(f"Query, key, and value must be on the same device, got {places}.")
    if query.shape[-1] != key.shape[-1]:
        raise signature.error(f"Q and K head dims must match, got {shapes}.")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise signature.error(f"Q, K, and V must match in batch size, got {shapes}.")
    if key.shape[1] != value.shape[1]:
        raise signature.error(f"K and V must match in sequence length, got {shapes}.")
    if key.shape[2] != value.shape[2]:
        raise signature.error(f"Key and value must always have the same number of heads, got {shapes}.")
    if key.shape[2] < 1 or query.shape[2] % key.shape[2]:
        raise signature.error(f"Key/value heads must evenly divide query heads, got {shapes}.")
