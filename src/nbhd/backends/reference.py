"""Neighborhood attention in plain PyTorch: any device, any dtype, any setting. The truth the fast backends are held to.

Keys are gathered slot by slot, for a chunk of queries at a time:

    queries of a chunk          their windows, gathered                  scores
    [batch, kv_heads,           [batch, kv_heads,                        [batch, kv_heads,
     n, groups, dim]      x      n, slots, dim]                    ->     n, groups, slots]

so memory beyond inputs and outputs is bounded by ``CHUNK_ELEMENTS`` whatever the size of the map. ``attend``,
``scores`` and ``weighted_sum`` are differentiable to any order by autograd; ``forward`` and ``backward`` are the same
mathematics with the backward written out, so that no chunk has to be kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from nbhd.backends import Call
from nbhd.geometry import Neighborhood, window
from nbhd.qkv import Three

NAME = "reference"

#: Gathered elements of one chunk: small enough for a CPU's last-level cache, large enough to fill a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 22}
CHUNK_ELEMENTS_ELSEWHERE = 1 << 26


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _without_autocast(run: Callable[_P, _R]) -> Callable[_P, _R]:
    """Autocast has had its say in ``functional``; here it would cast the products of the sums."""

    @functools.wraps(run)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or not torch._C._is_any_autocast_enabled():
            return run(*args, **kwargs)
        device = next(t.device.type for t in args if isinstance(t, Tensor))
        with torch.autocast(device, enabled=False):
            return run(*args, **kwargs)

    return wrapped


def why_unusable() -> str | None:
    return None


def why_not(call: Call) -> str | None:
    return None


@dataclass(frozen=True)
class _Windows:
    """The windows of a chunk of queries, flattened row-major over map positions and window slots."""

    begin: int
    end: int
    index: Tensor  # [n * slots] flat position of the key in each slot
    valid: Tensor | None  # [n, slots] whether the slot holds a key; None where all do (no causal axis)
    bias_index: Tensor | None  # [n * slots] flat index into one head's bias table


def _windows(
    neighborhood: Neighborhood, spatial: tuple[int, ...], begin: int, end: int, device: torch.device, with_bias: bool
) -> _Windows:
    """The windows of the queries at flat positions ``begin`` to ``end``."""
    n = end - begin
    flat = torch.arange(begin, end, device=device)
    inner = math.prod(spatial)
    index: Tensor | None = None
    valid: Tensor | None = None
    bias_index: Tensor | None = None
    for axis, length in enumerate(spatial):
        k, d = neighborhood.kernel_size[axis], neighborhood.dilation[axis]
        inner //= length
        position = flat // inner % length
        first, count = window(position, length, k, neighborhood.stride[axis], d, neighborhood.is_causal[axis])
        slot = torch.arange(k, device=device)
        # An unused slot repeats the window's last key: in bounds, and ignored through `valid`.
        used = torch.minimum(slot, count[:, None] - 1) if neighborhood.is_causal[axis] else slot
        key = first[:, None] + used * d  # [n, k]
        index = key if index is None else (index[:, :, None] * length + key[:, None, :]).reshape(n, -1)
        if neighborhood.is_causal[axis]:
            here = slot < count[:, None]
        else:
            here = torch.ones(1, k, dtype=torch.bool, device=device)
        if any(neighborhood.is_causal):
            valid = here if valid is None else (valid[:, :, None] & here[:, None, :]).flatten(1)
        if with_bias:
            relative = (key - position[:, None]) // d + k - 1  # exact: both lie in one dilation group
            table = 2 * k - 1
            bias_index = (
                relative
                if bias_index is None
                else (bias_index[:, :, None] * table + relative[:, None, :]).reshape(n, -1)
            )
    assert index is not None
    if valid is not None:
        valid = valid.expand(n, -1)
    return _Windows(begin, end, index.flatten(), valid, None if bias_index is None else bias_index.flatten())


class _Map:
    """Tensors as ``[batch, kv_heads, positions, ...]`` views in the accumulation dtype, and the map cut into chunks."""

    def __init__(
        self, heads: int, kv_heads: int, channels: int, like: Tensor, bias: Tensor | None, neighborhood: Neighborhood
    ) -> None:
        self.spatial = tuple(like.shape[1:-2])
        self.batch = like.shape[0]
        self.positions = math.prod(self.spatial)
        self.kv_heads = kv_heads
        self.groups = heads // kv_heads
        self.device = like.device
        self.neighborhood = neighborhood
        self.bias = None if bias is None else bias.to(accumulation_dtype(like.dtype)).flatten(1)
        per_query = max(1, self.batch * neighborhood.slots * (kv_heads * channels + heads))
        self.chunk = max(1, CHUNK_ELEMENTS.get(like.device.type, CHUNK_ELEMENTS_ELSEWHERE) // per_query)

    def chunks(self) -> Iterator[_Windows]:
        for begin in range(0, self.positions, self.chunk):
            end = min(begin + self.chunk, self.positions)
            yield _windows(self.neighborhood, self.spatial, begin, end, self.device, self.bias is not None)

    def queries(self, tensor: Tensor) -> Tensor:
        """``[batch, *spatial, heads, c]`` as ``[batch, kv_heads, positions, groups, c]``."""
        flat = tensor.reshape(self.batch, self.positions, self.kv_heads, self.groups, tensor.shape[-1])
        return flat.movedim(2, 1).to(accumulation_dtype(tensor.dtype))

    def keys(self, tensor: Tensor) -> Tensor:
        """``[batch, *spatial, kv_heads, c]`` as ``[batch, kv_heads, positions, c]``."""
        flat = tensor.reshape(self.batch, self.positions, self.kv_heads, tensor.shape[-1])
        return flat.movedim(2, 1).to(accumulation_dtype(tensor.dtype))

    def to_map(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``[batch, kv_heads, positions, groups, c]`` as contiguous ``[batch, *spatial, heads, c]``."""
        return tensor.movedim(1, 2).reshape(self.batch, *self.spatial, -1, tensor.shape[-1]).to(dtype).contiguous()

    def gather(self, keys: Tensor, windows: _Windows) -> Tensor:
        """``[batch, kv_heads, n, slots, c]`` of the keys (or values) of each slot."""
        picked = keys.index_select(2, windows.index)
        shape = (*picked.shape[:2], windows.end - windows.begin, self.neighborhood.slots, picked.shape[-1])
        return picked.view(shape)

    def scatter_add(self, total: Tensor, windows: _Windows, parts: Tensor) -> Tensor:
        """Add ``[batch, kv_heads, n, slots, c]`` into ``total`` ``[batch, kv_heads, positions, c]``, in place."""
        return total.index_add_(2, windows.index, parts.flatten(2, 3))

    def chunk_scores(self, query: Tensor, key: Tensor, windows: _Windows, scale: float) -> Tensor:
        """``[batch, kv_heads, n, groups, slots]`` scores with the bias; minus infinity in unused slots."""
        rows = query[:, :, windows.begin : windows.end] * scale
        scores = torch.matmul(rows, self.gather(key, windows).transpose(-1, -2))
        if self.bias is not None and windows.bias_index is not None:
            bias = self.bias.index_select(1, windows.bias_index)  # [heads, n * slots]
            scores = scores + bias.view(self.kv_heads, self.groups, -1, self.neighborhood.slots).transpose(1, 2)
        if windows.valid is not None:
            scores = scores.masked_fill(~windows.valid[:, None, :], -math.inf)
        return scores

    def bias_gradient(self, total: Tensor, windows: _Windows, d_scores: Tensor) -> Tensor:
        """Add ``d_scores`` ``[batch, kv_heads, n, groups, slots]`` into ``total`` ``[heads, table]``, in place."""
        assert windows.bias_index is not None
        parts = d_scores.sum(0).transpose(1, 2).reshape(total.shape[0], -1)
        return total.index_add_(1, windows.bias_index, parts)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _map(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, neighborhood: Neighborhood) -> _Map:
    return _Map(query.shape[-2], key.shape[-2], key.shape[-1] + value.shape[-1], query, bias, neighborhood)


@_without_autocast
def attend(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, differentiable by autograd to any order and under ``torch.func`` transforms."""
    layout = _map(query, key, value, rel_pos_bias, neighborhood)
    q, k, v = layout.queries(query), layout.keys(key), layout.keys(value)
    outs, lses = [], []
    for windows in layout.chunks():
        scores = layout.chunk_scores(q, k, windows, scale)
        # not exp(scores - lse): of large scores the log-sum-exp is not exact enough for weights that add up to one
        outs.append(torch.matmul(torch.softmax(scores, -1), layout.gather(v, windows)))
        lses.append(torch.logsumexp(scores, -1))
    out = layout.to_map(torch.cat(outs, 2), query.dtype)
    return out, layout.to_map(torch.cat(lses, 2)[..., None], lses[0].dtype).squeeze(-1)


@_without_autocast
def forward(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    return attend(query, key, value, rel_pos_bias, neighborhood, scale)


@_without_autocast
def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    neighborhood: Neighborhood,
    scale: float,
    into: Three | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    layout = _map(query, key, value, rel_pos_bias, neighborhood)
    q, k, v = layout.queries(query), layout.keys(key), layout.keys(value)
    d_o = layout.queries(d_out)
    d_log_sum = None if d_lse is None else layout.queries(d_lse[..., None])
    d_key, d_value = torch.zeros_like(k), torch.zeros_like(v)
    d_bias = None if layout.bias is None else torch.zeros_like(layout.bias)
    d_queries = []
    for windows in layout.chunks():
        rows = slice(windows.begin, windows.end)
        weights = torch.softmax(layout.chunk_scores(q, k, windows, scale), -1)
        d_rows = d_o[:, :, rows]
        layout.scatter_add(d_value, windows, torch.matmul(weights.transpose(-1, -2), d_rows))
        d_weights = torch.matmul(d_rows, layout.gather(v, windows).transpose(-1, -2))
        delta = (weights * d_weights).sum(-1, keepdim=True)
        if d_log_sum is not None:
            delta = delta - d_log_sum[:, :, rows]
        d_scores = weights * (d_weights - delta)
        if d_bias is not None:
            layout.bias_gradient(d_bias, windows, d_scores)
        d_queries.append(torch.matmul(d_scores, layout.gather(k, windows)) * scale)
        layout.scatter_add(d_key, windows, torch.matmul(d_scores.transpose(-1, -2), q[:, :, rows]) * scale)
    return (
        layout.to_map(torch.cat(d_queries, 2), query.dtype),
        layout.to_map(d_key[:, :, :, None], key.dtype),
        layout.to_map(d_value[:, :, :, None], value.dtype),
        None if d_bias is None or rel_pos_bias is None else d_bias.view(rel_pos_bias.shape).to(rel_pos_bias.dtype),
    )


# The unfused pair: scores out, weights in. What is stored is [batch, *spatial, heads, slots].


@_without_autocast
def scores(query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float) -> Tensor:
    """``[batch, *spatial, heads, slots]`` scores before the softmax, minus infinity in unused slots. Differentiable."""
    layout = _Map(query.shape[-2], key.shape[-2], key.shape[-1], query, rel_pos_bias, neighborhood)
    q, k = layout.queries(query), layout.keys(key)
    parts = [layout.chunk_scores(q, k, windows, scale) for windows in layout.chunks()]
    return layout.to_map(torch.cat(parts, 2), query.dtype)


@_without_autocast
def scores_backward(
    d_scores: Tensor, query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    layout = _Map(query.shape[-2], key.shape[-2], key.shape[-1], query, rel_pos_bias, neighborhood)
    q, k, d_s = layout.queries(query), layout.keys(key), layout.queries(d_scores)
    d_key = torch.zeros_like(k)
    d_bias = None if layout.bias is None else torch.zeros_like(layout.bias)
    d_queries = []
    for windows in layout.chunks():
        d_rows = d_s[:, :, windows.begin : windows.end]
        if windows.valid is not None:
            d_rows = d_rows.masked_fill(~windows.valid[:, None, :], 0)
        if d_bias is not None:
            layout.bias_gradient(d_bias, windows, d_rows)
        d_queries.append(torch.matmul(d_rows, layout.gather(k, windows)) * scale)
        rows = q[:, :, windows.begin : windows.end]
        layout.scatter_add(d_key, windows, torch.matmul(d_rows.transpose(-1, -2), rows) * scale)
    return (
        layout.to_map(torch.cat(d_queries, 2), query.dtype),
        layout.to_map(d_key[:, :, :, None], key.dtype),
        None if d_bias is None or rel_pos_bias is None else d_bias.view(rel_pos_bias.shape).to(rel_pos_bias.dtype),
    )


@_without_autocast
def weighted_sum(weights: Tensor, value: Tensor, neighborhood: Neighborhood) -> Tensor:
    """``[batch, *spatial, heads, dim_v]``: each query's weights times the values of its window. Differentiable."""
    layout = _Map(weights.shape[-2], value.shape[-2], value.shape[-1], weights, None, neighborhood)
    w, v = layout.queries(weights), layout.keys(value)
    outs = []
    for windows in layout.chunks():
        rows = w[:, :, windows.begin : windows.end]
        if windows.valid is not None:
            rows = rows.masked_fill(~windows.valid[:, None, :], 0)
        outs.append(torch.matmul(rows, layout.gather(v, windows)))
    return layout.to_map(torch.cat(outs, 2), value.dtype)


@_without_autocast
def weighted_sum_backward(
    d_out: Tensor, weights: Tensor, value: Tensor, neighborhood: Neighborhood
) -> tuple[Tensor, Tensor]:
    layout = _Map(weights.shape[-2], value.shape[-2], value.shape[-1], weights, None, neighborhood)
    w, v, d_o = layout.queries(weights), layout.keys(value), layout.queries(d_out)
    d_value = torch.zeros_like(v)
    d_weights = []
    for windows in layout.chunks():
        rows, d_rows = w[:, :, windows.begin : windows.end], d_o[:, :, windows.begin : windows.end]
        d_part = torch.matmul(d_rows, layout.gather(v, windows).transpose(-1, -2))
        if windows.valid is not None:
            rows = rows.masked_fill(~windows.valid[:, None, :], 0)
            d_part = d_part.masked_fill(~windows.valid[:, None, :], 0)
        layout.scatter_add(d_value, windows, torch.matmul(rows.transpose(-1, -2), d_rows))
        d_weights.append(d_part)
    return layout.to_map(torch.cat(d_weights, 2), weights.dtype), layout.to_map(d_value[:, :, :, None], value.dtype)
