"""From a call to kernel launches: grids, arguments, constants. Nothing here waits for the device or reads from it.

``plan_*`` gives the launches of a call without running them, so that what is compiled ahead of time, counted and tuned
is what runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nbhd.backends.triton import boxes, configurations, score_tiles
from nbhd.backends.triton.boxes import Axis, Tile, Triple
from nbhd.backends.triton.configurations import Problem, Row
from nbhd.geometry import Neighborhood

T = TypeVar("T")

LOG2E = 1.4426950408889634

#: Most bytes of partial tables of the bias gradient at a time.
TABLE_BYTES = 256 << 20
#: Programs that the second and the third axis of a grid hold.
MOST_ROWS = 65535
#: Programs of small boxes from which it pays to do several images in each.
MANY_PROGRAMS = 2048
MOST_IMAGES = 16
#: Layouts that are remembered, and launches of each: several scales make several.
MOST_MAPS, MOST_KEPT = 4096, 64
#: Most entries of a slab of the bias gradient, all axes together.
SLAB = 1024


class Target(NamedTuple):
    """For what kernels are made. ``vendor``: ``cuda``, ``hopper`` (cuda too), ``hip``, ``xpu`` or ``interpreter``;
    ``shared``: bytes of shared memory that a program may have; ``device``: what was measured is kept under this name,
    such as ``sm_90`` or ``gfx942``, empty where nothing is to be looked up.
    """

    vendor: str
    shared: int
    device: str = ""

    @property
    def is_nvidia(self) -> bool:
        return self.vendor in ("cuda", "hopper")


@dataclass
class Launch:
    """A kernel with everything it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: list[Any]
    constants: dict[str, Any]
    row: Row | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Fixed:
    """A launch but for its tensors: what a layout decides. ``grid`` and ``numbers`` may want something added."""

    kernel: Any
    grid: tuple[int, ...]
    numbers: list[Any]
    constants: dict[str, Any]
    row: Row
    options: dict[str, Any]

    def launch(self, tensors: Iterable[Tensor], grid: tuple[int, ...] = (), numbers: tuple[int, ...] = ()) -> Launch:
        arguments = [*tensors, *self.numbers, *numbers]
        return Launch(self.kernel, (*self.grid, *grid), arguments, self.constants, self.row, self.options)


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.lru_cache(maxsize=64)
def _device(kind: str, index: int) -> Target:
    if kind == "xpu":
        properties: Any = torch.xpu.get_device_properties(index)
        return Target("xpu", int(getattr(properties, "local_mem_size", 64 << 10)), str(properties.name))
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = str(properties.gcnArchName).partition(":")[0]
        return Target("hip", int(getattr(properties, "shared_memory_per_block", 64 << 10)), architecture)
    vendor = "hopper" if properties.major == 9 else "cuda"
    shared = int(getattr(properties, "shared_memory_per_block_optin", 96 << 10))
    return Target(vendor, shared, f"sm_{properties.major}{properties.minor}")


def target_of(tensor: Tensor) -> Target:
    """What a tensor lies on, and how much shared memory a program has there."""
    if is_interpreted():
        return Target("interpreter", 1 << 30)
    device = tensor.device
    return _device(device.type, device.index or 0)


def float32_precision(target: Target) -> str:
    """How float32 is multiplied: as torch's own switch says, ``ieee`` or ``tf32``."""
    if not target.is_nvidia:
        return "ieee"
    wanted = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if wanted is None:
        wanted = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    elif wanted == "none":  # not said there: the general switch
        wanted = getattr(torch.backends, "fp32_precision", "ieee")
    return "tf32" if wanted == "tf32" else "ieee"


class Map:
    """What every launch of a call has in common. It holds no tensors, so it serves all calls of the same layout."""

    def __init__(
        self, query: Tensor, kv_heads: int, dim: int, dim_v: int, neighborhood: Neighborhood,
        target: Target | None = None,
    ) -> None:  # fmt: skip
        spatial = tuple(query.shape[1:-2])
        self.neighborhood = neighborhood
        self.batch, self.heads, self.kv_heads = query.shape[0], query.shape[-2], kv_heads
        self.dim, self.dim_v = dim, dim_v
        self.dtype, self.device = query.dtype, query.device
        self.axes = boxes.axes_of(neighborhood, spatial)
        self.lengths: Triple = boxes.three(spatial, 1)
        self.target = target_of(query) if target is None else target
        self.constexpr_axes = tuple(x for a in self.axes for x in (a.kernel_size, a.stride, int(a.is_causal)))
        self.precision = float32_precision(self.target) if self.dtype == torch.float32 else "ieee"
        self.wide = False
        self.align = 16
        self._kept: dict[Any, Any] = {}

    @property
    def tokens(self) -> int:
        return math.prod(self.lengths)

    def problem(self, kernel: str, has_bias: bool) -> Problem:
        bits = 32 if self.dtype == torch.float32 else 16
        dim = max(_padded(self.dim), _padded(self.dim_v))
        return Problem(kernel, bits, dim, self.axes, has_bias)

    def keep(self, name: Any, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once. ``name`` has all that it depends on beside this map."""
        found: T | None = self._kept.get(name)
        if found is None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            found = self._kept[name] = make()
        return found

    def admit(self, *tensors: Tensor) -> None:
        """Take note of what divides the strides of ``tensors`` and whether offsets in an image need 64 bits."""
        wide, align = self.wide, self.align
        for tensor in tensors:
            is_wide, of_tensor = _layout(tensor.shape, tensor.stride())
            wide, align = wide or is_wide, min(align, of_tensor)
        self._note(wide, align)

    def admit_rows(self, width: int) -> None:
        """The same for a contiguous tensor ``[batch, *spatial, heads, width]``."""
        self._note(self.wide or self.tokens * self.heads * width >= 1 << 31, self.align)

    def _note(self, wide: bool, align: int) -> None:
        if (wide, align) != (self.wide, self.align):
            self.wide, self.align = wide, align
            self._kept.clear()

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """Strides of batch, three axes and head, in units of ``align``; 0 where there is but one."""
        return _strides(tensor.shape, tensor.stride(), self.align)

    def sizes(self, scale: float) -> list[Any]:
        dilation = [a.dilation for a in self.axes]
        return [self.batch, self.heads, self.heads // self.kv_heads, *self.lengths, *dilation, float(scale)]

    def constants(self, row: Row, found: Tile, **more: Any) -> dict[str, Any]:
        return {
            "AXES": self.constexpr_axes, "TQ": found.queries, "TK": found.keys,
            "ALIGN": self.align, "WIDE": self.wide, "PREC": self.precision, **more,
        }  # fmt: skip

    def options(self, row: Row) -> dict[str, Any]:
        if self.target.vendor == "interpreter":
            return {}
        # the default of fused multiply-adds changes between versions of Triton
        options = {"num_warps": row.warps, "num_stages": row.stages, "enable_fp_fusion": True}
        if row.registers is not None and self.target.is_nvidia:
            options["maxnreg"] = row.registers
        return options

    @property
    def inline(self) -> bool:
        return self.target.is_nvidia

    def images(self, programs: int) -> int:
        """Images that a program of the ``once`` kernels does: several where there are programs enough without."""
        return max(1, min(MOST_IMAGES, self.batch, self.batch * programs // MANY_PROGRAMS))

    def padded_bias(self, bias: Tensor | None, found: Tile, stand_in: Tensor) -> tuple[Tensor, list[Launch]]:
        """The bias as the kernels gather from it (float32, base 2, padded), and the launch that makes it."""
        if bias is None:
            return stand_in, []
        shape, grid, constants, options = self.keep(
            ("bias", found, bias.shape), lambda: self._of_bias(bias[0].numel(), found)
        )
        padded = torch.empty(shape, dtype=torch.float32, device=bias.device)
        arguments = [bias.detach().contiguous(), padded]
        return padded, [Launch(score_tiles.pad_table, grid, arguments, constants, None, options)]

    def _of_bias(
        self, size: int, found: Tile
    ) -> tuple[tuple[int, int], tuple[int, int], dict[str, int], dict[str, int]]:
        padding = int(score_tiles.bias_padding(self.constexpr_axes, found.queries, found.keys))
        shape = (self.heads, size + 2 * padding)
        constants = {"SIZE": size, "PADDING": padding, "BLOCK": 1024}
        options = {} if self.target.vendor == "interpreter" else {"num_warps": 4}
        return shape, (self.heads, math.ceil(shape[1] / 1024)), constants, options  # the first axis is the long one


#: Maps by layout. A model makes the same calls over and over, and a small one is over sooner than it is planned.
_maps: dict[Any, Map] = {}


def map_of(neighborhood: Neighborhood, query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> Map:
    """The map of a call with tensors laid out like these, float32 being multiplied as it is told to be now."""
    precision = float32_precision(target_of(query)) if query.dtype == torch.float32 else None
    tensors = (query, key, value, *others)
    layout = (neighborhood, query.dtype, query.device, precision, *[(t.shape, t.stride()) for t in tensors])
    found = _maps.get(layout)
    if found is None:
        if len(_maps) >= MOST_MAPS:
            _maps.clear()
        found = _maps[layout] = Map(query, key.shape[-2], query.shape[-1], value.shape[-1], neighborhood)
    return found


@functools.lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[bool, int]:
    """Whether offsets in an image need 64 bits, and the power of two, up to 16, that divides all strides."""
    inner = list(zip(shape[1:-2], strides[1:-2], strict=True))
    span = sum((size - 1) * stride for size, stride in inner) + shape[-1]
    divisor = math.gcd(16, *(stride for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size > 1))
    return span >= 1 << 31, divisor


@functools.lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...], strides: tuple[int, ...], align: int) -> tuple[int, ...]:
    found = [0 if n == 1 else s for n, s in zip(shape[:-1], strides[:-1], strict=True)]
    axes = boxes.three(tuple(found[1:-1]), 0)
    return tuple(x // align for x in (found[0], *axes, found[-1]))


def _padded(dim: int) -> int:
    """Channels of a tile: a power of two, at least what a matrix product takes."""
    return max(16, boxes.power_of_two(dim))


def split(n: int) -> tuple[int, int]:
    """``n`` programs on two axes of a grid that hold ``MOST_ROWS`` each; a few more than ``n`` leave at once."""
    outer = math.ceil(n / MOST_ROWS)
    return math.ceil(n / outer), outer


def channels(key: Tensor, value: Tensor) -> dict[str, Any]:
    """Channels, as they are and padded. ``TWIN``: key and value lie alike, so one set of offsets serves both."""
    dim, dim_v = key.shape[-1], value.shape[-1]
    twin = key.shape == value.shape and key.stride() == value.stride()
    return {"D": dim, "BD": _padded(dim), "DV": dim_v, "BDV": _padded(dim_v), "TWIN": twin}


class Slabs:
    """How the gradient of a bias is cut: the slab's size, and where the slabs begin."""

    def __init__(self, axes: tuple[Axis, Axis, Axis], found: Tile, is_whole: bool) -> None:
        sizes = [2 * a.kernel_size - 1 for a in axes]
        width = [boxes.power_of_two(n) for n in sizes]
        if not is_whole:
            # a tile touches no more than this along an axis
            reach = [boxes.power_of_two(q + k - 1) for q, k in zip(found.queries, found.keys, strict=True)]
            width = [min(w, r) for w, r in zip(width, reach, strict=True)]
            while math.prod(width) > SLAB:
                width[width.index(max(width))] //= 2
        self.sizes: Triple = (sizes[0], sizes[1], sizes[2])
        self.width: Triple = (width[0], width[1], width[2])
        self.entries = math.prod(width)

    def origins(self) -> Iterator[Triple]:
        for a in range(0, self.sizes[0], self.width[0]):
            for b in range(0, self.sizes[1], self.width[1]):
                for c in range(0, self.sizes[2], self.width[2]):
                    yield a, b, c

    def launches(
        self, total: Tensor, count: int, groups: int, launch: Callable[[Tensor, int, Triple], Launch]
    ) -> Iterator[Launch]:
        """Fill ``total [heads, n0, n1, n2]``: slab by slab, some of ``count`` boxes at a time.

        ``launch(tables, first_box, origin)`` makes what fills ``tables [boxes, groups, heads, W2 * W1 * W0]``, zeros.
        """
        heads = total.shape[0]
        some = max(1, min(count, MOST_ROWS, TABLE_BYTES // (groups * heads * self.entries * 4)))
        tables = torch.empty((some, groups, heads, self.entries), dtype=torch.float32, device=total.device)
        for origin in self.origins():
            for begin in range(0, count, some):
                part = tables[: min(some, count - begin)].zero_()
                yield launch(part, begin, origin)
                self.add(total, part, origin)

    def add(self, total: Tensor, tables: Tensor, origin: Triple) -> None:
        """Add tables ``[..., heads, W2 * W1 * W0]`` into ``total [heads, n0, n1, n2]``, in a fixed order."""
        found = tables.view(-1, *tables.shape[-2:]).sum(0)
        found = found.view(found.shape[0], self.width[2], self.width[1], self.width[0]).permute(0, 3, 2, 1)
        ends = [min(n, o + w) for n, o, w in zip(self.sizes, origin, self.width, strict=True)]
        part = total[:, origin[0] : ends[0], origin[1] : ends[1], origin[2] : ends[2]]
        part += found[:, : part.shape[1], : part.shape[2], : part.shape[3]]


def rows_of(call: Map, kernel: str, has_bias: bool) -> tuple[tuple[Row, Tile], ...]:
    """The rows that can run a kernel of a call, best first.

    Raises:
        LookupError: none can.
    """
    problem = call.problem(kernel, has_bias)
    found = configurations.ranked(problem, *call.target)
    if not found:
        raise LookupError(f"no configuration runs {problem.key!r} on {call.target}.")
    return found


_too_large: set[tuple[Target, str, str]] = set()


def execute(
    call: Map, kernel: str, has_bias: bool, build: Callable[[Row, Tile], Iterable[Launch]]
) -> None:  # fmt: skip
    """Run the launches of the best row that the device takes: one too large for it is not tried twice."""
    found = call.keep(("rows", kernel, has_bias), lambda: rows_of(call, kernel, has_bias))
    for i, (row, tile) in enumerate(found):
        if _too_large and (call.target, call.problem(kernel, has_bias).key, row.id) in _too_large:
            continue
        try:
            for launch in build(row, tile):
                launch.run()
            return
        except OutOfResources:
            if i == len(found) - 1:
                raise
            _too_large.add((call.target, call.problem(kernel, has_bias).key, row.id))
    raise LookupError(f"no configuration of {kernel} fits {call.target}.")
