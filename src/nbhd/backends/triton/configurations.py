"""The table of configurations: how large boxes are, how many warps work on them. No tuning at run time.

``configurations.json`` holds the rows. A row serves one kernel, dtypes of ``bits``, heads of up to ``dim`` channels,
and with ``bias`` true or false calls with or without a relative position bias (null: both). Its boxes have ``queries``
queries and ``keys`` keys; their shape is the one that visits the least for the window at hand
(:mod:`~nbhd.backends.triton.boxes`). ``cost`` is what a visited pair costs without and with a bias, next to the other
rows of the same kernel: ESTIMATES from machine code (``benchmarks/gpu_bounds.py``) until ``make gpu-tune`` has measured
them. ``shared`` is the shared memory that the compiler asked for, in bytes, by vendor; ``vendors`` are those a row is
for, where not for all. ``registers`` is the most that a thread may have, where the compiler left alone takes so many
that fewer programs run at a time.

``measured`` holds what ``make gpu-tune`` found: for a device (``Target.device``, such as ``sm_90`` or ``gfx942``) and a
call, by its key, the row that was fastest. A row that stands there by the call alone holds for every device.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbhd.backends.triton import boxes
from nbhd.backends.triton.boxes import Axis, Tile

PATH = Path(__file__).with_name("configurations.json")

#: The two forms of each kernel.
FORMS = {
    "forward": ("forward_once", "forward_loop"),
    "query": ("query_once", "query_loop"),
    "key": ("key_once", "key_loop"),
    "table": ("table_loop",),
    "pairs": ("pairs",),
    "gather": ("gather",),
    "scatter": ("scatter",),
}

#: Kernels whose programs own a box of keys and visit queries; of the others it is the other way round.
OF_KEYS = ("key", "scatter")

#: A vendor's GPUs that have rows of their own, and whose they are.
FAMILIES = {"hopper": "cuda"}


@dataclass(frozen=True)
class Row:
    """A line of the table, see above."""

    id: str
    kernel: str
    bits: int
    dim: int
    bias: bool | None
    queries: int
    keys: int
    warps: int
    stages: int
    cost: tuple[float, float]
    shared: dict[str, int]
    vendors: tuple[str, ...] = ()
    registers: int | None = None

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Problem:
    """What a choice depends on. Not the size of the map."""

    kernel: str
    bits: int
    dim: int
    axes: tuple[Axis, Axis, Axis]
    has_bias: bool

    @property
    def key(self) -> str:
        """As ``measured`` has it: the same for every map that runs the same machine code."""
        windows = ",".join(
            f"{a.kernel_size}{'c' if a.is_causal else ''}{'w' if a.is_whole else ''}/{a.stride}" for a in self.axes
        )
        return f"{self.kernel} {self.bits} {self.dim} {windows}{' bias' if self.has_bias else ''}"


@functools.cache
def _document() -> dict[str, Any]:
    document = json.loads(PATH.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


@functools.cache
def rows() -> tuple[Row, ...]:
    """The table, in the order of the file."""
    lists = ("vendors", "cost")
    return tuple(Row(**{**row, **{n: tuple(row.get(n, ())) for n in lists}}) for row in _document()["rows"])


def as_text(document: dict[str, Any]) -> str:
    """The file's text: one line a row."""
    lines = [",\n".join(f"    {json.dumps(row)}" for row in document["rows"])]
    # two levels, a line for each call
    measured = json.dumps(document["measured"], indent=2, sort_keys=True).replace("\n", "\n  ")
    return "\n".join(["{", f'  "measured": {measured},', '  "rows": [', *lines, "  ]", "}", ""])


def measured(device: str) -> dict[str, str]:
    """Row by key of a call, where one was measured on this kind of device, or on one that is not said."""
    found: dict[str, Any] = _document()["measured"]
    here: dict[str, str] = found.get(device, {})
    return {key: row for key, row in found.items() if isinstance(row, str)} | here


def remember(document: dict[str, Any], device: str, fastest: dict[str, str]) -> None:
    """Enter into the file's ``document`` what was measured on a device (``Target.device``): row by key of a call."""
    document["measured"].setdefault(device, {}).update(fastest)


def tile(row: Row, problem: Problem) -> Tile | None:
    """The boxes of a row for a call, None where it cannot do it."""
    if row.kernel not in FORMS[problem.kernel] or row.bits != problem.bits or row.dim < problem.dim:
        return None
    if row.bias is not None and row.bias != problem.has_bias:
        return None
    choose = boxes.once if row.kernel.endswith("_once") else boxes.loop
    if problem.kernel in OF_KEYS:
        found = choose(problem.axes, row.keys, row.queries)
        return None if found is None else Tile(found[1], found[0])
    found = choose(problem.axes, row.queries, row.keys)
    return None if found is None else Tile(*found)


def owned_and_met(found: Tile, problem: Problem) -> tuple[boxes.Triple, boxes.Triple]:
    """The box that a program owns, and the boxes that it visits."""
    return (found.keys, found.queries) if problem.kernel in OF_KEYS else (found.queries, found.keys)


def visited(row: Row, found: Tile, problem: Problem) -> float:
    """Pairs that a row visits over pairs that see each other, away from the ends of the axes."""
    own, met = owned_and_met(found, problem)
    if row.kernel.endswith("_once"):
        pairs = math.prod(met) * boxes.padding(problem.axes, own)
        return pairs / math.prod(a.kernel_size for a in problem.axes)
    return boxes.waste(problem.axes, own, met)


def estimate(row: Row, found: Tile, problem: Problem) -> float:
    """Relative time of a row: what it visits, times what a visited pair costs it."""
    # the gradient of the bias of a walk is a launch of its own, which visits the same boxes again
    launches = 2 if row.kernel == "query_loop" and problem.kernel == "query" and problem.has_bias else 1
    cost = launches * row.cost[problem.has_bias] * visited(row, found, problem)
    if row.kernel == "table_loop" or not row.kernel.endswith("_loop"):
        return cost
    # before and after a walk a program does what takes about as long as a turn; the others do it for many images
    turns = boxes.turns(problem.axes, *owned_and_met(found, problem))
    return cost * (1 + 1 / turns)


def runs_on(row: Row, vendor: str) -> bool:
    """Whether a row of the table is meant for this vendor, or for the family it belongs to."""
    return not row.vendors or vendor == "interpreter" or vendor in row.vendors or FAMILIES.get(vendor) in row.vendors


@functools.lru_cache(maxsize=4096)
def ranked(problem: Problem, vendor: str, shared: int, device: str = "") -> tuple[tuple[Row, Tile], ...]:
    """The rows that can run a call within ``shared`` bytes of shared memory, best first: measured, then estimated."""
    found: list[tuple[bool, float, int, Row, Tile]] = []
    chosen = measured(device).get(problem.key)
    for row in rows():
        if not runs_on(row, vendor):
            continue
        boxed = tile(row, problem)
        if boxed is not None and row.shared.get(FAMILIES.get(vendor, vendor), 0) <= shared:
            found.append((row.id != chosen, estimate(row, boxed, problem), len(found), row, boxed))
    return tuple((row, boxed) for *_, row, boxed in sorted(found, key=lambda each: each[:3]))
