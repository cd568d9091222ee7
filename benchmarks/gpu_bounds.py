"""What a kernel's machine code costs at least: cycles of a multiprocessor for 1000 visited pairs. No time: arithmetic.

    python -m benchmarks.gpu_bounds            for each case of gpu_check the least time that the committed machine code
                                               leaves on an H200, beside the time to move its tensors
    python -m benchmarks.gpu_bounds --write    the same into docs/gpu.md

The inner loop of a kernel (a box of queries by a box of keys each turn) is counted by the pipe that an instruction goes
through. Rates are those that NVIDIA's programming guide and white papers give for compute capability 9.0, for one
multiprocessor and cycle: 4 instructions, 128 bytes of shared memory or first-level cache, 16 exponentials, 2048 fused
multiply-adds of 16 bits in ``wgmma`` and about 1260 in ``mma.sync`` (1024 on 8.0, which nothing here is bound by).

Two numbers are rules of thumb: an instruction every 4.5 cycles is what a warp manages alone, and data that is asked for
in the turn that needs it is 700 cycles away. Programs that run at a time hide both, as many as registers and shared
memory let in.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import pages
from benchmarks.cases import Case
from benchmarks.gpu_cases import CASES
from nbhd.backends.triton import boxes, configurations

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu-code.json"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- gpu-bounds -->", "<!-- /gpu-bounds -->"

#: An H200: multiprocessors, cycles a second as under load, bytes a second of its memory.
PROCESSORS, CLOCK, BANDWIDTH = 132, 1.75e9, 4.8e12
VENDOR, TARGET = "hopper", "sm_90"

WARP_CYCLES = 4.5
MEMORY_CYCLES = 700
#: Registers and shared memory (bytes) of a multiprocessor, most programs it runs at a time.
REGISTERS, SHARED, MOST_PROGRAMS = 65536, 227 << 10, 32
#: Shared memory that a program takes beyond its own, bytes.
RESERVED = 1024

_LINE = re.compile(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(.*?);", re.MULTILINE)


class Bounds(NamedTuple):
    """Cycles of a multiprocessor for 1000 pairs: issuing, shared memory and cache, exponentials, products, waiting."""

    issue: float
    memory: float
    exponentials: float
    products: float
    waiting: float


def bounds(loop: list[str], pairs: int, warps: int, registers: int, shared: int) -> Bounds:
    """The bounds of a kernel from its inner loop.

    ``pairs``: queries times keys of a turn of the inner loop; ``registers`` of a thread, ``shared`` bytes of a program.
    """
    issue = len(loop)
    memory = sum(_memory(each) for each in loop)
    exponentials = sum(8 for each in loop if _name(each).startswith("MUFU"))
    products = sum(_products(each) for each in loop)
    allocated = -(-registers // 8) * 8 * 32 * warps
    programs = max(1, min(REGISTERS // allocated, SHARED // (shared + RESERVED), MOST_PROGRAMS))
    is_ahead = any(_name(each).startswith("LDGSTS") for each in loop)
    waiting = (issue * WARP_CYCLES + (0 if is_ahead else MEMORY_CYCLES)) / programs
    each = 1000 / pairs
    quarter = warps / 4 * each  # of a multiprocessor's four parts
    return Bounds(issue * quarter, memory * warps * each, exponentials * quarter, products * quarter, waiting * each)


def inner_loop(assembly: str) -> list[str]:
    """The instructions of the shortest loop that multiplies, of everything where there is none.

    ``assembly``: of ``nvdisasm -c``.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for label, instruction in _LINE.findall(assembly):
        if label:
            labels[label] = len(instructions)
            continue
        instructions.append(instruction)
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        begin = labels.get(target.group(1)) if target else None
        if begin is not None:
            body = instructions[begin:]
            if any("MMA" in _name(each) or _name(each).startswith("FFMA") for each in body):
                loops.append(body)
    with_matrices = [body for body in loops if any("MMA" in _name(each) for each in body)]
    return min(with_matrices or loops or [instructions], key=len)


def _name(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def spilled(loop: list[str]) -> tuple[int, int]:
    """Spilled values that a turn of a loop reads back, and stores."""
    kinds = [_name(each).partition(".")[0] for each in loop]
    return kinds.count("LDL"), kinds.count("STL")


def _memory(instruction: str) -> float:
    """Cycles of the pipe to shared memory and the cache, 128 bytes each, for a warp."""
    name = _name(instruction)
    kind, *rest = name.split(".")
    if instruction.startswith("@!PT"):
        return 0  # never runs
    if kind in ("LDSM", "STSM"):
        return 4 if "4" in rest else 2 if "2" in rest else 1
    bytes_each = 16 if "128" in rest else 8 if "64" in rest else 4
    if kind in ("LDS", "STS", "LDGSTS", "STG", "LDL", "STL"):
        return bytes_each / 4
    if kind == "LDG":  # single numbers are gathered: they lie in several lines
        return max(4 if bytes_each == 4 else 2, bytes_each / 4)
    return kind == "SHFL"


def _products(instruction: str) -> float:
    """Cycles of a quarter's matrix unit."""
    name = _name(instruction)
    if name.startswith("HMMA"):
        return 6.5 if ".16816." in name else 3.25
    wide = re.match(r"HGMMA\.64x(\d+)x(\d+)", name)
    return 64 * int(wide.group(1)) * int(wide.group(2)) / 2048 if wide else 0


class Estimate(NamedTuple):
    """A kernel of a case: its row, pairs visited over pairs needed, what binds it, and the least time in ms."""

    kernel: str
    row: str
    waste: float
    bound: str
    ms: float


def estimates(case: Case, lines: dict[str, Any]) -> Iterator[Estimate]:
    """Of each kernel of a forward and backward call, from the results of ``gpu_compile``.

    What programs do beside their inner loop is not counted.
    """
    axes, lengths = boxes.axes_of(case.neighborhood, case.spatial), boxes.three(case.spatial, 1)
    needed = math.prod(boxes.visits(length, axis, 1, 1) for length, axis in zip(lengths, axes, strict=True))
    has_tables = False
    for kernel in ("forward", "query", "table", "key"):
        if kernel == "table" and not has_tables:
            continue
        problem = configurations.Problem(kernel, 16, case.head_dim, axes, case.has_bias)
        row, tile = configurations.ranked(problem, VENDOR, SHARED)[0]
        has_tables = case.has_bias and row.kernel == "query_loop"
        own, met = configurations.owned_and_met(tile, problem)
        visited = math.prod(own) * math.prod(met)
        for length, axis, o, m in zip(lengths, axes, own, met, strict=True):
            visited *= boxes.visits(length, axis, o, m, inverse=kernel in configurations.OF_KEYS)
        cycles = lines[" ".join([row.id, kernel, *["bias"] * case.has_bias])][TARGET]["cycles"]
        bound = max(cycles, key=lambda name: cycles[name])
        seconds = visited * case.batch * case.heads / 1000 * cycles[bound] / (PROCESSORS * CLOCK)
        yield Estimate(kernel, row.id, visited / needed, bound, 1e3 * seconds)


def moved(case: Case) -> float:
    """Milliseconds to read query, key and value and to write the output once, 16 bits each."""
    return 1e3 * 2 * 4 * case.batch * math.prod(case.spatial) * case.heads * case.head_dim / BANDWIDTH


def table() -> str:
    """The estimates of every case as Markdown."""
    head = "| case | moving its tensors | forward | backward | kernels: row, visited / needed, what binds |"
    rows = [head, "|---|---|---|---|---|"]
    lines = json.loads(RESULTS.read_text(encoding="utf-8"))["lines"]
    for case in CASES.values():
        each = list(estimates(case, lines))
        forward = each[0].ms
        backward = sum(e.ms for e in each[1:])
        kernels = "; ".join(f"{e.row} {e.waste:.2f} {e.bound}" for e in each)
        name = case.name.removeprefix("gpu/")
        rows.append(f"| {name} | {moved(case):.3g} | {forward:.3g} | {backward:.3g} | {kernels} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bounds", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md")
    options = parser.parse_args(arguments)
    if options.write:
        pages.replace(PAGE, BEGIN, END, f"\n{table()}\n")
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
