"""The fused operator: launches of its forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nbhd.backends.triton import boxes, forward_kernels, key_kernels, query_kernels, table_kernels
from nbhd.backends.triton.boxes import Tile
from nbhd.backends.triton.configurations import Row
from nbhd.backends.triton.launches import LOG2E, Launch, Map, Slabs, channels, execute, split
from nbhd.geometry import Neighborhood


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """The forward of :mod:`nbhd.backends`."""
    call = Map(query, key.shape[-2], query.shape[-1], value.shape[-1], neighborhood)
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    plan = ForwardPlan(call, query, key, value, rel_pos_bias, out, lse, scale)
    execute(call, "forward", rel_pos_bias is not None, plan.launches)
    return out, lse


class ForwardPlan:
    """``launches(row, tile)`` of a forward call."""

    def __init__(
        self, call: Map, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
        scale: float,
    ) -> None:  # fmt: skip
        self.call, self.bias, self.scale = call, bias, scale
        self.tensors = (query, key, value)
        self.results = (out, lse)
        call.admit(query, key, value)
        call.admit_rows(value.shape[-1])

    def launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        call = self.call
        table, made = call.padded_bias(self.bias, tile, self.results[1])
        yield from made
        arguments = [
            *self.tensors, *self.results, table, *(x for t in self.tensors for x in call.strides(t)),
            *call.sizes(self.scale * LOG2E),
        ]  # fmt: skip
        constants = call.constants(row, tile, HAS_BIAS=self.bias is not None, INLINE=call.inline)
        constants |= channels(*self.tensors[1:])
        if row.kernel == "forward_once":
            count = boxes.programs(call.lengths, call.axes, tile.queries)
            images = call.images(count * call.heads)
            grid = (math.ceil(call.batch / images) * call.heads, *split(count))
            yield Launch(forward_kernels.forward_once, grid, [*arguments, images], constants, row, call.options(row))
        else:
            constants["FINAL"] = self.bias is not None or not self.scale > 0
            grid = (boxes.programs(call.lengths, call.axes, tile.queries), *split(call.batch * call.heads))
            yield Launch(forward_kernels.forward_loop, grid, arguments, constants, row, call.options(row))


def run_backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None,
    out: Tensor, lse: Tensor, neighborhood: Neighborhood, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The backward of :mod:`nbhd.backends`."""
    call = Map(query, key.shape[-2], query.shape[-1], value.shape[-1], neighborhood)
    plan = BackwardPlan(call, d_out, d_lse, query, key, value, rel_pos_bias, out, lse, scale)
    has_bias = rel_pos_bias is not None
    execute(call, "query", has_bias, plan.query_launches)
    if plan.tables_are_missing:
        execute(call, "table", has_bias, plan.table_launches)
    execute(call, "key", has_bias, plan.key_launches)
    d_bias = None
    if rel_pos_bias is not None and plan.d_bias is not None:
        d_bias = plan.d_bias.view(rel_pos_bias.shape).to(rel_pos_bias.dtype)
    return plan.d_query, plan.d_key, plan.d_value, d_bias


class BackwardPlan:
    """The launches of a backward call. The query kernel comes first: it stores delta, which the others read."""

    def __init__(
        self, call: Map, d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        bias: Tensor | None, out: Tensor, lse: Tensor, scale: float,
    ) -> None:  # fmt: skip
        self.call, self.bias, self.scale = call, bias, scale
        self.d_out = d_out.to(query.dtype)
        if self.d_out.stride(-1) != 1 and self.d_out.shape[-1] != 1:
            self.d_out = self.d_out.contiguous()
        self.d_lse = None if d_lse is None else d_lse.to(torch.float32).contiguous()
        self.tensors = (query, key, value)
        self.out, self.lse = out.contiguous(), lse.contiguous()
        self.delta = torch.empty_like(self.lse)
        self.d_query, self.d_key, self.d_value = (t.new_empty(t.shape) for t in (query, key, value))
        self.d_bias: Tensor | None = None
        if bias is not None:
            sizes = [2 * a.kernel_size - 1 for a in call.axes]
            self.d_bias = torch.zeros((call.heads, *sizes), dtype=torch.float32, device=query.device)
        self.tables_are_missing = False
        call.admit(query, key, value, self.d_out)
        call.admit_rows(max(query.shape[-1], value.shape[-1]))

    def _strides(self) -> list[int]:
        return [x for t in (*self.tensors, self.d_out) for x in self.call.strides(t)]

    def query_launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        call = self.call
        padded, made = call.padded_bias(self.bias, tile, self.lse)
        yield from made
        d_lse = self.lse if self.d_lse is None else self.d_lse
        given = [*self.tensors, self.out, self.d_out, self.lse, d_lse, padded, self.d_query, self.delta]
        layout = [*self._strides(), *call.sizes(self.scale * LOG2E)]
        constants = call.constants(row, tile, HAS_BIAS=self.bias is not None, INLINE=call.inline)
        constants |= channels(*self.tensors[1:]) | {"HAS_DLSE": self.d_lse is not None}
        count = boxes.programs(call.lengths, call.axes, tile.queries)
        if row.kernel == "query_loop":
            self.tables_are_missing = self.bias is not None
            grid = (count, *split(call.batch * call.heads))
            yield Launch(query_kernels.query_loop, grid, [*given, *layout], constants, row, call.options(row))
            return
        images = call.images(count * call.heads)
        groups = math.ceil(call.batch / images)
        grid = (groups * call.heads, *split(count))
        slabs = Slabs(call.axes, tile, is_whole=True)
        tables = self.lse
        if self.bias is not None:
            # zeros: programs without a box leave their table as it is
            shape = (grid[1] * grid[2], groups, call.heads, slabs.entries)
            tables = torch.zeros(shape, dtype=torch.float32, device=self.lse.device)
        constants["W"] = slabs.width
        arguments = [*given, tables, *layout, images]
        yield Launch(query_kernels.query_once, grid, arguments, constants, row, call.options(row))
        if self.d_bias is not None:
            slabs.add(self.d_bias, tables, (0, 0, 0))

    def table_launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        """The bias gradient of windows that are walked, slab by slab, some boxes at a time."""
        call = self.call
        assert self.d_bias is not None
        padded, made = call.padded_bias(self.bias, tile, self.lse)
        yield from made
        slabs = Slabs(call.axes, tile, is_whole=False)
        count = boxes.programs(call.lengths, call.axes, tile.queries)
        images = call.images(count * call.heads)
        groups = math.ceil(call.batch / images)
        constants = call.constants(row, tile, INLINE=call.inline)
        constants |= channels(*self.tensors[1:]) | {"W": slabs.width}
        given = [*self.tensors, self.d_out, self.lse, self.delta, padded]
        layout = [*self._strides(), *call.sizes(self.scale * LOG2E), images]

        def launch(tables: Tensor, first_box: int, origin: boxes.Triple) -> Launch:
            arguments = [*given, tables, *layout, first_box, *origin]
            grid = (groups * call.heads, tables.shape[0])
            return Launch(table_kernels.table_loop, grid, arguments, constants, row, call.options(row))

        yield from slabs.launches(self.d_bias, count, groups, launch)

    def key_launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        call = self.call
        padded, made = call.padded_bias(self.bias, tile, self.lse)
        yield from made
        arguments = [
            *self.tensors, self.d_out, self.lse, self.delta, padded, self.d_key, self.d_value,
            *self._strides(), *call.sizes(self.scale * LOG2E),
        ]  # fmt: skip
        constants = call.constants(row, tile, HAS_BIAS=self.bias is not None, INLINE=call.inline)
        constants |= channels(*self.tensors[1:])
        count = boxes.programs(call.lengths, call.axes, tile.keys)
        if row.kernel == "key_once":
            images = call.images(count * call.kv_heads)
            grid = (math.ceil(call.batch / images) * call.kv_heads, *split(count))
            yield Launch(key_kernels.key_once, grid, [*arguments, images], constants, row, call.options(row))
        else:
            grid = (count, *split(call.batch * call.kv_heads))
            yield Launch(key_kernels.key_loop, grid, arguments, constants, row, call.options(row))
