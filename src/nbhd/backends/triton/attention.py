"""The fused operator: launches of its forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nbhd.backends.triton import boxes, forward_kernels, key_kernels, query_kernels, table_kernels
from nbhd.backends.triton.boxes import Tile
from nbhd.backends.triton.configurations import Row
from nbhd.backends.triton.launches import LOG2E, Fixed, Launch, Map, Slabs, T, channels, execute, map_of, split
from nbhd.geometry import Neighborhood
from nbhd.qkv import Three

#: Below it a product of scale and score is not a normal float32 number any more.
SMALLEST_SCALE = 1e-30


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """The forward of :mod:`nbhd.backends`."""
    call = map_of(neighborhood, query, key, value)
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
        name = (row.id, tile, self.bias is None, self.scale)
        fixed = call.keep(name, lambda: self._fixed(row, tile))
        yield fixed.launch((*self.tensors, *self.results, table))

    def _fixed(self, row: Row, tile: Tile) -> Fixed:
        call = self.call
        numbers = [*(x for t in self.tensors for x in call.strides(t)), *call.sizes(self.scale * LOG2E)]
        constants = call.constants(row, tile, HAS_BIAS=self.bias is not None, INLINE=call.inline)
        constants |= channels(*self.tensors[1:])
        count = boxes.programs(call.lengths, call.axes, tile.queries)
        if row.kernel == "forward_once":
            images = call.images(count * call.heads)
            grid = (math.ceil(call.batch / images) * call.heads, *split(count))
            return Fixed(forward_kernels.forward_once, grid, [*numbers, images], constants, row, call.options(row))
        # as float32, which the kernels have it in, a tiny scale may be zero
        constants["FINAL"] = self.bias is not None or not self.scale > SMALLEST_SCALE
        grid = (count, *split(call.batch * call.heads))
        return Fixed(forward_kernels.forward_loop, grid, numbers, constants, row, call.options(row))


def run_backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None,
    out: Tensor, lse: Tensor, neighborhood: Neighborhood, scale: float, into: Three | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The backward of :mod:`nbhd.backends`."""
    d_out = d_out.to(query.dtype)
    if d_out.stride(-1) != 1 and d_out.shape[-1] != 1:
        d_out = d_out.contiguous()
    call = map_of(neighborhood, query, key, value, d_out)
    plan = BackwardPlan(call, d_out, d_lse, query, key, value, rel_pos_bias, out, lse, scale, into)
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
    """The launches of a backward call. The query kernel comes first: it stores delta, which the others read.

    ``d_out`` has the dtype of ``query`` and contiguous channels.
    """

    def __init__(
        self, call: Map, d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        bias: Tensor | None, out: Tensor, lse: Tensor, scale: float, into: Three | None = None,
    ) -> None:  # fmt: skip
        self.call, self.bias, self.scale = call, bias, scale
        self.d_out = d_out
        self.d_lse = None if d_lse is None else d_lse.to(torch.float32).contiguous()
        self.tensors = (query, key, value)
        self.out, self.lse = out.contiguous(), lse.contiguous()
        self.delta = torch.empty_like(self.lse)
        # the kernels know gradients that are contiguous, and parts of one tensor
        self.parts = 1 if into is None else 3
        made = into or tuple(t.new_empty(t.shape) for t in (query, key, value))
        self.d_query, self.d_key, self.d_value = made
        self.d_bias: Tensor | None = None
        if bias is not None:
            sizes = [2 * a.kernel_size - 1 for a in call.axes]
            self.d_bias = torch.zeros((call.heads, *sizes), dtype=torch.float32, device=query.device)
        self.tables_are_missing = False
        call.admit(query, key, value, self.d_out)
        call.admit_rows(self.parts * max(query.shape[-1], value.shape[-1]))

    def _fixed(self, kernel: Any, row: Row, tile: Tile, grid: tuple[int, ...], *more: int, **constants: Any) -> Fixed:
        """``kernel`` for the layout of this call; ``more`` numbers and constants than all kernels take."""
        call = self.call
        numbers = [x for t in (*self.tensors, self.d_out) for x in call.strides(t)]
        numbers += [*call.sizes(self.scale * LOG2E), *more]
        constants = call.constants(row, tile, INLINE=call.inline, **constants) | channels(*self.tensors[1:])
        return Fixed(kernel, grid, numbers, constants, row, call.options(row))

    def _keep(self, kernel: str, row: Row, tile: Tile, make: Callable[[Row, Tile], T]) -> T:
        name = (kernel, row.id, tile, self.bias is None, self.d_lse is None, self.scale, self.parts)
        return self.call.keep(name, lambda: make(row, tile))

    def query_launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        # said anew by each row that is tried: the first may be too large for the device
        self.tables_are_missing = row.kernel == "query_loop" and self.bias is not None
        padded, made = self.call.padded_bias(self.bias, tile, self.lse)
        yield from made
        d_lse = self.lse if self.d_lse is None else self.d_lse
        given = [*self.tensors, self.out, self.d_out, self.lse, d_lse, padded, self.d_query, self.delta]
        fixed, slabs, count, groups = self._keep("query", row, tile, self._query)
        if row.kernel == "query_loop":
            yield fixed.launch(given)
        elif self.d_bias is None:
            yield fixed.launch((*given, self.lse), split(count), (0,))
        else:

            def launch(tables: Tensor, first_box: int, origin: boxes.Triple) -> Launch:
                return fixed.launch((*given, tables), (tables.shape[0],), (first_box,))

            yield from slabs.launches(self.d_bias, count, groups, launch)

    def _query(self, row: Row, tile: Tile) -> tuple[Fixed, Slabs, int, int]:
        """Also how the bias gradient of ``query_once`` is cut, the boxes and the groups of images."""
        call = self.call
        options: dict[str, Any] = {
            "HAS_BIAS": self.bias is not None, "HAS_DLSE": self.d_lse is not None, "PARTS": self.parts
        }  # fmt: skip
        slabs = Slabs(call.axes, tile, is_whole=True)
        count = boxes.programs(call.lengths, call.axes, tile.queries)
        if row.kernel == "query_loop":
            grid = (count, *split(call.batch * call.heads))
            return self._fixed(query_kernels.query_loop, row, tile, grid, **options), slabs, count, 0
        images = call.images(count * call.heads)
        groups = math.ceil(call.batch / images)
        options["W"] = slabs.width
        fixed = self._fixed(query_kernels.query_once, row, tile, (groups * call.heads,), images, **options)
        return fixed, slabs, count, groups

    def table_launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        """The bias gradient of windows that are walked, slab by slab, some boxes at a time."""
        assert self.d_bias is not None
        padded, made = self.call.padded_bias(self.bias, tile, self.lse)
        yield from made
        given = [*self.tensors, self.d_out, self.lse, self.delta, padded]
        fixed, slabs, count, groups = self._keep("table", row, tile, self._table)

        def launch(tables: Tensor, first_box: int, origin: boxes.Triple) -> Launch:
            return fixed.launch((*given, tables), (tables.shape[0],), (first_box, *origin))

        yield from slabs.launches(self.d_bias, count, groups, launch)

    def _table(self, row: Row, tile: Tile) -> tuple[Fixed, Slabs, int, int]:
        call = self.call
        slabs = Slabs(call.axes, tile, is_whole=False)
        count = boxes.programs(call.lengths, call.axes, tile.queries)
        images = call.images(count * call.heads)
        groups = math.ceil(call.batch / images)
        fixed = self._fixed(table_kernels.table_loop, row, tile, (groups * call.heads,), images, W=slabs.width)
        return fixed, slabs, count, groups

    def key_launches(self, row: Row, tile: Tile) -> Iterator[Launch]:
        padded, made = self.call.padded_bias(self.bias, tile, self.lse)
        yield from made
        fixed = self._keep("key", row, tile, self._key)
        yield fixed.launch(
            (*self.tensors, self.d_out, self.lse, self.delta, padded, self.d_key, self.d_value)
        )  # fmt: skip

    def _key(self, row: Row, tile: Tile) -> Fixed:
        call = self.call
        options = {"HAS_BIAS": self.bias is not None, "PARTS": self.parts}
        count = boxes.programs(call.lengths, call.axes, tile.keys)
        if row.kernel == "key_once":
            images = call.images(count * call.kv_heads)
            grid = (math.ceil(call.batch / images) * call.kv_heads, *split(count))
            return self._fixed(key_kernels.key_once, row, tile, grid, images, **options)
        grid = (count, *split(call.batch * call.kv_heads))
        return self._fixed(key_kernels.key_loop, row, tile, grid, **options)
