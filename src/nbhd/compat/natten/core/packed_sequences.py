"""``attention`` over packed sequences as one operator of a compiled graph, for which lengths in a tensor are data.

Out of compiled graphs :mod:`.full_attention` goes from sequence to sequence itself, and is differentiable to any order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nbhd import dense
from nbhd.errors import ArgumentError

Range = tuple[int, int]


def ranges(sum_q: list[int], sum_kv: list[int], queries: int, keys: int) -> Iterator[tuple[Range, Range]]:
    """Begin and end of each sequence, in queries and in keys.

    Raises:
        ArgumentError: the sums do not start at 0, fall, differ in number, or end elsewhere than the tokens do.
    """
    for name, row, tensor, total in (
        ("cumulative_seqlen_Q", sum_q, "query", queries),
        ("cumulative_seqlen_KV", sum_kv, "key", keys),
    ):
        if len(row) < 2 or row[0] != 0 or any(a > b for a, b in itertools.pairwise(row)):
            raise ArgumentError(f"{name} must be a 1-D int32 tensor that starts at 0 and does not fall, got {row}.")
        if row[-1] != total:
            raise ArgumentError(f"The sequences of {tensor} have {row[-1]} tokens together, {tensor} has {total}.")
    if len(sum_q) != len(sum_kv):
        raise ArgumentError(
            f"cumulative_seqlen_Q and cumulative_seqlen_KV must be of one size, got {len(sum_q)}, {len(sum_kv)}."
        )
    return zip(itertools.pairwise(sum_q), itertools.pairwise(sum_kv), strict=True)


def attend(
    query: Tensor, key: Tensor, value: Tensor, sum_q: Tensor, sum_kv: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ``[1, tokens, heads, dim]``; the lengths are read when the graph runs."""
    out, lse = torch.ops.nbhd_natten.packed(query, key, value, sum_q, sum_kv, scale, is_causal)
    return out, lse


_library = torch.library.Library("nbhd_natten", "DEF")
_library.define(
    "packed(Tensor query, Tensor key, Tensor value, Tensor sum_q, Tensor sum_kv, float scale, bool is_causal) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "packed_backward(Tensor d_out, Tensor d_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor sum_q, Tensor sum_kv, float scale, bool is_causal) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, sum_q: Tensor, sum_kv: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _attend_fake(query, key, value, sum_q, sum_kv, scale, is_causal)
    out.zero_()
    lse.fill_(-math.inf)
    for (q0, q1), (k0, k1) in ranges(sum_q.tolist(), sum_kv.tolist(), query.shape[1], key.shape[1]):
        if q0 < q1 and k0 < k1:
            out[:, q0:q1], lse[:, q0:q1] = dense.output_and_lse(
                query[:, q0:q1], key[:, k0:k1], value[:, k0:k1], scale, is_causal
            )
    return out, lse


def _attend_fake(
    query: Tensor, key: Tensor, value: Tensor, sum_q: Tensor, sum_kv: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=dense.accumulation_dtype(query.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sum_q, sum_kv, ctx.scale, ctx.is_causal = inputs
    ctx.save_for_backward(query, key, value, sum_q, sum_kv)


def _autograd(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    of_inputs = torch.ops.nbhd_natten.packed_backward(d_out, d_lse, *ctx.saved_tensors, ctx.scale, ctx.is_causal)
    return *of_inputs, None, None, None, None


def _backward(
    d_out: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, sum_q: Tensor,
    sum_kv: Tensor, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_query, d_key, d_value = (tensor.new_zeros(tensor.shape) for tensor in (query, key, value))
    for (q0, q1), (k0, k1) in ranges(sum_q.tolist(), sum_kv.tolist(), query.shape[1], key.shape[1]):
        if q0 < q1 and k0 < k1:
            d_query[:, q0:q1], d_key[:, k0:k1], d_value[:, k0:k1] = dense.gradients(
                d_out[:, q0:q1], d_lse[:, q0:q1],
                query[:, q0:q1], key[:, k0:k1], value[:, k0:k1], scale, is_causal,
            )  # fmt: skip
    return d_query, d_key, d_value


def _backward_fake(
    d_out: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, sum_q: Tensor,
    sum_kv: Tensor, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


for _name, _run, _fake in (
    ("packed", _attend, _attend_fake),
    ("packed_backward", _backward, _backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nbhd_natten::{_name}", _fake, lib=_library)
torch.library.register_autograd("nbhd_natten::packed", _autograd, setup_context=_setup, lib=_library)
