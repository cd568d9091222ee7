"""Attention over all keys, with a log-sum-exp that has a gradient: for additional tokens."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from nbhd._gradients import is_special
from nbhd._modes import is_transformed
from nbhd.backends.reference import accumulation_dtype as accumulation_dtype

#: Scores computed at once. Bounds the memory beyond inputs and outputs.
CHUNK_ELEMENTS = 1 << 22


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``[batch, queries, heads, dim]`` over ``[batch, keys, kv_heads, dim]``; causal is aligned top left.

    Returns:
        ``[batch, queries, heads, dim_v]`` in the dtype of ``query`` and, if asked for, the log-sum-exp ``[batch,
        queries, heads]`` in float32 (float64 for float64). Without keys output is 0 and log-sum-exp minus infinity.
    """
    if key.shape[1] == 0 or query.shape[1] == 0:
        zero = query[:0].sum() + key[:0].sum() + value[:0].sum()  # of nothing, and autograd knows it
        out = query.new_zeros((*query.shape[:-1], value.shape[-1])) + zero
        lse = torch.full(query.shape[:-1], -math.inf, dtype=accumulation_dtype(query.dtype), device=query.device) + zero
        return out, lse if with_lse else None
    if with_lse:
        if torch.compiler.is_compiling():  # which takes no tensor twice: one may be query, key and value at once
            key, value = key.view_as(key), value.view_as(value)
        elif is_transformed():
            return output_and_lse(query, key, value, scale, is_causal)
        out, lse = _Attend.apply(query, key, value, scale, is_causal)
        return out, lse
    out = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2), None


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which nothing is cast. The meta device has no autocast, and asking for it raises."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _rows(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[batch, tokens, heads, c]`` as ``[batch, kv_heads, groups, tokens, c]`` in the accumulation dtype."""
    batch, tokens, heads, channels = tensor.shape
    grouped = tensor.reshape(batch, tokens, kv_heads, heads // kv_heads, channels).permute(0, 2, 3, 1, 4)
    return grouped.to(accumulation_dtype(tensor.dtype))


def _back(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``[batch, kv_heads, groups, tokens, c]`` as ``[batch, tokens, heads, c]``."""
    batch, kv_heads, groups, tokens, channels = tensor.shape
    return tensor.permute(0, 3, 1, 2, 4).reshape(batch, tokens, kv_heads * groups, channels).to(dtype)


def _scores(query: Tensor, key: Tensor, begin: int, scale: float, is_causal: bool) -> Tensor:
    """``[batch, kv_heads, groups, rows, keys]`` of the query rows from ``begin`` on."""
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if is_causal:
        rows = torch.arange(begin, begin + query.shape[-2], device=query.device)
        hidden = torch.arange(key.shape[-2], device=key.device) > rows[:, None]
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def _chunks(query: Tensor, key: Tensor) -> list[tuple[int, int]]:
    per_row = max(1, query.shape[0] * query.shape[2] * key.shape[1])
    size = max(1, CHUNK_ELEMENTS // per_row)
    return [(begin, min(begin + size, query.shape[1])) for begin in range(0, query.shape[1], size)]


def output_and_lse(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over one or more keys, in ordinary operations where ``torch.func`` is at work."""
    if _suits_pytorchs(query, key, value, is_causal):
        return _by_pytorchs(query, key, value, scale)
    with no_autocast(query.device):
        kv_heads = key.shape[2]
        q, k, v = _rows(query, kv_heads), _rows(key, kv_heads), _rows(value, kv_heads)
        outs, lses = [], []
        for begin, end in _chunks(query, key):
            scores = _scores(q.narrow(3, begin, end - begin), k, begin, scale, is_causal)
            outs.append(torch.matmul(torch.softmax(scores, -1), v))
            lses.append(torch.logsumexp(scores, -1, keepdim=True))
        lse = torch.cat(lses, -2)
        return _back(torch.cat(outs, -2), query.dtype), _back(lse, lse.dtype).squeeze(-1)


def _suits_pytorchs(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> bool:
    """Whether PyTorch's own kernel for CPUs, which keeps no scores, takes the call."""
    if query.device.type != "cpu" or is_causal or query.shape[-1] != value.shape[-1]:
        return False
    if not torch.compiler.is_compiling() and is_transformed():
        return False  # ordinary operations have rules for everything
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def _by_pytorchs(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows, key, value = _rows_of_kv_heads(query, key.shape[2]), key.transpose(1, 2), value.transpose(1, 2)
    # it takes channels for neighbours in memory, and does not look
    rows, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (rows, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, key, value, scale=scale)
    return _heads_of(out, query.shape[1]), _heads_of(lse, query.shape[1])


def _gradients_by_pytorchs(
    d_out: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel knows no gradient of a log-sum-exp; one more channel makes it, 1 in values and d_lse in ``d_out``.

    With it dP is larger by d_lse, and with 0 in ``out`` rowsum(d_out * out) stays what it is.
    """
    kv_heads = key.shape[2]
    query, out, d_out = pad(query, (0, 1)), pad(out, (0, 1)), torch.cat([d_out, d_lse[..., None].to(d_out.dtype)], -1)
    rows, d_o, o, log_sum = (_rows_of_kv_heads(t, kv_heads) for t in (query, d_out, out, lse))
    k, v = pad(key, (0, 1)).transpose(1, 2), pad(value, (0, 1), value=1.0).transpose(1, 2)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    d_query, d_key, d_value = backward(d_o, rows, k, v, o, log_sum, 0.0, False, scale=scale)
    found = _heads_of(d_query, query.shape[1]), d_key.transpose(1, 2), d_value.transpose(1, 2)
    return found[0][..., :-1], found[1][..., :-1], found[2][..., :-1]


def _rows_of_kv_heads(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[batch, queries, heads, ...]`` as ``[batch, kv_heads, groups * queries, ...]``: as more queries of one head."""
    return tensor.unflatten(2, (kv_heads, -1)).movedim(1, 3).flatten(2, 3)


def _heads_of(tensor: Tensor, queries: int) -> Tensor:
    """The way back from there."""
    return tensor.unflatten(2, (-1, queries)).movedim(3, 1).flatten(2, 3)


def gradients(
    d_out: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value. Scores are computed again rather than kept.

    With P the probabilities: dS = P * (dP - rowsum(P * dP) + d_lse).
    """
    with no_autocast(query.device):
        kv_heads = key.shape[2]
        q, k, v = _rows(query, kv_heads), _rows(key, kv_heads), _rows(value, kv_heads)
        d_o = _rows(d_out, kv_heads)
        d_log_sum = _rows(d_lse[..., None], kv_heads)
        d_queries, d_key, d_value = [], torch.zeros_like(k), torch.zeros_like(v)
        for begin, end in _chunks(query, key):
            rows, d_rows, d_sums = (t.narrow(3, begin, end - begin) for t in (q, d_o, d_log_sum))
            probabilities = torch.softmax(_scores(rows, k, begin, scale, is_causal), -1)
            d_value = d_value + _over_groups(torch.matmul(probabilities.transpose(-1, -2), d_rows))
            d_probabilities = torch.matmul(d_rows, v.transpose(-1, -2))
            delta = (probabilities * d_probabilities).sum(-1, keepdim=True) - d_sums
            d_scores = probabilities * (d_probabilities - delta)
            d_queries.append(torch.matmul(d_scores, k) * scale)
            d_key = d_key + _over_groups(torch.matmul(d_scores.transpose(-1, -2), rows) * scale)
        d_query = _back(torch.cat(d_queries, -2), query.dtype)
        return d_query, _back(d_key, key.dtype), _back(d_value, value.dtype)


class _Attend(torch.autograd.Function):
    """:func:`output_and_lse` with :func:`gradients`, or those of PyTorch's kernel where it made the output."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
        return output_and_lse(query, key, value, scale, is_causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.scale, ctx.is_causal = inputs
        # in 16 bits d_lse would be rounded, and the compiler looks for one way
        is_exact = query.dtype == accumulation_dtype(query.dtype) and not torch.compiler.is_compiling()
        ctx.by_pytorchs = is_exact and _suits_pytorchs(query, key, value, ctx.is_causal)
        ctx.save_for_backward(query, key, value, *(output if ctx.by_pytorchs else ()))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, *made = ctx.saved_tensors
        is_plain = not (torch.is_grad_enabled() or is_transformed() or is_special(d_out) or is_special(d_lse))
        if ctx.by_pytorchs and is_plain:
            return *_gradients_by_pytorchs(d_out, d_lse, query, key, value, made[0], made[1], ctx.scale), None, None
        return *gradients(d_out, d_lse, query, key, value, ctx.scale, ctx.is_causal), None, None


def _over_groups(tensor: Tensor) -> Tensor:
    """Sum over the query heads that share a key head."""
    return tensor.sum(2, keepdim=True)
