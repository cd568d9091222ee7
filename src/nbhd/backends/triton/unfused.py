"""The unfused pair: launches of scores, weighted sums and their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nbhd.backends.triton import boxes, unfused_kernels
from nbhd.backends.triton.boxes import Tile
from nbhd.backends.triton.configurations import Row
from nbhd.backends.triton.launches import Launch, Map, Slabs, execute, split
from nbhd.geometry import Neighborhood


def run_scores(
    query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> Tensor:  # fmt: skip
    """Scores before the softmax, minus infinity in unused slots."""
    return _pairs(query, key, rel_pos_bias, neighborhood, scale, -math.inf)


def run_scores_backward(
    d_scores: Tensor, query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and bias from those of the scores."""
    d_query, d_table = _gather(d_scores, key, neighborhood, scale, with_table=rel_pos_bias is not None)
    d_key = _scatter(d_scores, query, key.shape[-2], neighborhood, scale)
    if rel_pos_bias is None or d_table is None:
        return d_query, d_key, None
    return d_query, d_key, d_table.view(rel_pos_bias.shape).to(rel_pos_bias.dtype)


def run_weighted_sum(weights: Tensor, value: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Each query's weights times the values of its window."""
    return _gather(weights, value, neighborhood, 1.0, with_table=False)[0]


def run_weighted_sum_backward(
    d_out: Tensor, weights: Tensor, value: Tensor, neighborhood: Neighborhood
) -> tuple[Tensor, Tensor]:
    """Gradients of weights (zero in unused slots) and value."""
    d_out = d_out.to(value.dtype)
    d_weights = _pairs(d_out, value, None, neighborhood, 1.0, 0.0)
    return d_weights, _scatter(weights, d_out, value.shape[-2], neighborhood, 1.0)


def _pairs(
    query: Tensor, key: Tensor, bias: Tensor | None, neighborhood: Neighborhood, scale: float, unused: float
) -> Tensor:
    """``unused`` is what slots without a key hold."""
    call = Map(query, key.shape[-2], query.shape[-1], query.shape[-1], neighborhood)
    slots = query.new_empty((*query.shape[:-1], neighborhood.slots))
    if any(neighborhood.is_causal):
        slots.fill_(unused)
    execute(call, "pairs", bias is not None, PairsPlan(call, query, key, bias, slots, scale).launches)
    return slots


class PairsPlan:
    """``launches(row, tile)`` of scores."""

    def __init__(
        self, call: Map, query: Tensor, key: Tensor, bias: Tensor | None, slots: Tensor, scale: float
    ) -> None:  # fmt: skip
        self.call, self.query, self.key, self.bias, self.slots, self.scale = call, query, key, bias, slots, scale
        call.admit(query, key)
        call.admit_rows(slots.shape[-1])

    def launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        call = self.call
        table, made = call.padded_bias(self.bias, tile, self.slots)
        yield from made
        arguments = [
            self.query, self.key, table, self.slots, *call.strides(self.query), *call.strides(self.key),
            *call.sizes(self.scale),
        ]  # fmt: skip
        constants = call.constants(row, tile, HAS_BIAS=self.bias is not None, INLINE=call.inline)
        constants |= channels(call)
        grid = (boxes.programs(call.lengths, call.axes, tile.queries), *split(call.batch * call.heads))
        yield Launch(unfused_kernels.pairs, grid, arguments, constants, row, call.options(row))


def _gather(
    slots: Tensor, key: Tensor, neighborhood: Neighborhood, scale: float, with_table: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    call = Map(slots, key.shape[-2], key.shape[-1], key.shape[-1], neighborhood)
    plan = GatherPlan(call, slots, key, scale)
    execute(call, "gather", False, plan.launches)
    if not with_table:
        return plan.out, None
    sizes = [2 * a.kernel_size - 1 for a in call.axes]
    plan.d_bias = torch.zeros((call.heads, *sizes), dtype=torch.float32, device=slots.device)
    execute(call, "gather", False, plan.table_launches)
    return plan.out, plan.d_bias


class GatherPlan:
    """``launches(row, tile)`` of a weighted sum, ``table_launches`` of the gradient of the bias of scores."""

    def __init__(self, call: Map, slots: Tensor, key: Tensor, scale: float) -> None:
        self.call, self.slots, self.key, self.scale = call, slots.contiguous(), key, scale
        self.out = key.new_empty((*slots.shape[:-1], key.shape[-1]))
        self.d_bias: Tensor | None = None
        call.admit(key)
        call.admit_rows(max(slots.shape[-1], key.shape[-1]))

    def _launch(self, row: Row, tile: Tile, tables: Tensor, slabs: Slabs | None, *where: int) -> Launch:
        call = self.call
        count = tables.shape[0] if slabs is not None else boxes.programs(call.lengths, call.axes, tile.queries)
        arguments = [
            self.slots, self.key, self.out, tables, *call.strides(self.key), *call.sizes(self.scale), *where
        ]  # fmt: skip
        constants = call.constants(row, tile, WANT_ROWS=slabs is None, WANT_TABLE=slabs is not None)
        constants |= channels(call) | {"W": (1, 1, 1) if slabs is None else slabs.width}
        grid = (count, *split(call.batch * call.heads))
        return Launch(unfused_kernels.gather, grid, arguments, constants, row, call.options(row))

    def launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        yield self._launch(row, tile, self.out, None, 0, 0, 0, 0)

    def table_launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        call = self.call
        assert self.d_bias is not None
        slabs = Slabs(call.axes, tile, is_whole=False)
        count = boxes.programs(call.lengths, call.axes, tile.queries)

        def launch(tables: Tensor, first_box: int, origin: boxes.Triple) -> Launch:
            return self._launch(row, tile, tables, slabs, first_box, *origin)

        yield from slabs.launches(self.d_bias, count, call.batch, launch)


def _scatter(slots: Tensor, query: Tensor, kv_heads: int, neighborhood: Neighborhood, scale: float) -> Tensor:
    call = Map(query, kv_heads, query.shape[-1], query.shape[-1], neighborhood)
    plan = ScatterPlan(call, slots, query, scale)
    execute(call, "scatter", False, plan.launches)
    return plan.out


class ScatterPlan:
    """``launches(row, tile)`` of the gradient of keys or values."""

    def __init__(self, call: Map, slots: Tensor, query: Tensor, scale: float) -> None:
        self.call, self.slots, self.query, self.scale = call, slots.contiguous(), query, scale
        self.out = query.new_empty((*query.shape[:-2], call.kv_heads, query.shape[-1]))
        call.admit(query)
        call.admit_rows(max(slots.shape[-1], query.shape[-1]))

    def launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        call = self.call
        arguments = [self.slots, self.query, self.out, *call.strides(self.query), *call.sizes(self.scale)]
        constants = call.constants(row, tile) | channels(call)
        grid = (boxes.programs(call.lengths, call.axes, tile.keys), *split(call.batch * call.kv_heads))
        yield Launch(unfused_kernels.scatter, grid, arguments, constants, row, call.options(row))


def channels(call: Map) -> dict[str, int]:
    """Channels, as they are and padded, for the kernels."""
    return {"D": call.dim, "BD": max(16, boxes.power_of_two(call.dim))}
