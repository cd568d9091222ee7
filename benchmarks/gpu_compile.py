"""The table of machine code: every row of the GPU kernels' configurations, compiled for real targets without a GPU.

    python -m benchmarks.gpu_compile                    compile, print, exit 1 where one spills or does not fit
    python -m benchmarks.gpu_compile --only 'forward*'  some rows (globs over id or kernel)
    python -m benchmarks.gpu_compile --write            keep the results (with --only, of those rows):
                                                        benchmarks/results/gpu-code.json, the table in docs/gpu.md,
                                                        shared memory and costs in the table of configurations
    python -m benchmarks.gpu_compile --output FILE      keep the results there and nowhere else
    python -m benchmarks.gpu_compile --others           for other GPUs (gpu_code.OTHERS): do rows compile, do they fit

Needs Triton, on Linux. About half an hour the first time on one core; Triton keeps what it compiled.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import pages
from benchmarks.cases import Case
from nbhd._files import write_json, write_whole
from nbhd.backends.triton import configurations
from nbhd.backends.triton.configurations import Row

if TYPE_CHECKING:  # it imports Triton, which may not be there
    from nbhd.backends.triton.launches import Target

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu-code.json"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- gpu-code -->", "<!-- /gpu-code -->"

#: The window each kernel is compiled with: registers hardly depend on it.
WINDOWS = {"forward_once": (7, 7), "query_once": (7, 7), "key_once": (7, 7)}
OTHER_WINDOW = (13, 13)
LARGE_WINDOW = (33, 33)  # rows of 128 queries


@dataclass(frozen=True)
class Line:
    """One compilation: a row, a kind of launch, with or without a bias, how float32 is multiplied."""

    row: Row
    kind: str
    has_bias: bool
    precision: str

    @property
    def name(self) -> str:
        return " ".join([self.row.id, self.kind, *["bias"] * self.has_bias, *[self.precision] * (self.row.bits == 32)])

    @property
    def case(self) -> Case:
        large = self.row.queries * self.row.keys >= 128 * 64
        window = WINDOWS.get(self.row.kernel, LARGE_WINDOW if large else OTHER_WINDOW)
        return Case(
            self.row.id, spatial=tuple(2 * k + 2 for k in window), heads=2, head_dim=self.row.dim, kernel_size=window,
            has_bias=self.has_bias, dtype="bfloat16" if self.row.bits == 16 else "float32",
        )  # fmt: skip


#: Kinds of launches that run each kernel.
KINDS = {
    "forward_once": ("forward",), "forward_loop": ("forward",), "query_once": ("query",),
    "query_loop": ("query",), "table_loop": ("table",), "key_once": ("key",), "key_loop": ("key",),
    "pairs": ("pairs",), "gather": ("gather", "gather-table"), "scatter": ("scatter",),
}  # fmt: skip
#: Kinds for which a bias changes nothing, and those that are there for its sake.
WITHOUT_BIAS = ("gather", "scatter")
FOR_THE_BIAS = ("table", "gather-table")


def lines() -> Iterator[Line]:
    """What is compiled: everything a row may be asked for."""
    for row in configurations.rows():
        for kind in KINDS[row.kernel]:
            for has_bias in (False, True):
                if row.bias is not None and row.bias != has_bias:
                    continue
                if (kind in WITHOUT_BIAS and has_bias) or (kind in FOR_THE_BIAS and not has_bias):
                    continue
                has_tf32 = row.bits == 32 and any(configurations.runs_on(row, vendor) for vendor in ("cuda", "hopper"))
                for precision in ("ieee", "tf32") if has_tf32 else ("ieee",):
                    yield Line(row, kind, has_bias, precision)


def sources() -> str:
    """A digest of what decides the machine code: the kernels and the shapes of their boxes, without comments, and the
    rows, without what is compiled from them. It is kept with the results, so that a test sees when they are old.
    """
    folder = configurations.PATH.parent
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*kernels.py")), *sorted(folder.glob("*tiles.py")), folder / "boxes.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        digest.update(ast.unparse(tree).encode())
    for row in configurations.rows():
        digest.update(repr({**vars(row), "cost": None, "shared": None}).encode())
    return digest.hexdigest()[:16]


def compile_line(line: Line, target: str, *, anyway: bool = False) -> Any:
    """The ``gpu_code.Code`` of a line for a target, or None where the row is not for it, but for ``anyway``."""
    from benchmarks import gpu_code

    gpu, limits = gpu_code.TARGETS[target]
    if not anyway and not _is_for(line, limits):
        return None
    return gpu_code.read(_compiled(line, gpu, limits), line.row.queries * line.row.keys)


def _is_for(line: Line, limits: Target) -> bool:
    return configurations.runs_on(line.row, limits.vendor) and (line.precision != "tf32" or limits.is_nvidia)


def _compiled(line: Line, gpu: Any, limits: Target) -> Any:
    """What Triton compiled of a line for one of its targets."""
    from benchmarks import gpu_code

    torch.backends.cuda.matmul.fp32_precision = line.precision
    for kind, call, launches in gpu_code.plans(line.case, limits):
        if kind == line.kind:
            tile = gpu_code.tile_of(kind, call, line.row, line.has_bias)
            assert tile is not None, line.name
            return gpu_code.compiled(gpu_code.main_launch(launches(line.row, tile)), gpu)
    raise LookupError(line.name)


def why_not(line: Line, target: str) -> str | None:
    """Why a line cannot run on one of ``gpu_code.OTHERS``; None if it can, or would not be chosen there."""
    from benchmarks import gpu_code

    gpu, limits = gpu_code.OTHERS[target]
    if not _is_for(line, limits) or line.row.shared.get(limits.vendor, 0) > limits.shared:
        return None
    try:
        shared: int = _compiled(line, gpu, limits).metadata.shared
    except Exception as error:  # the compiler's, of many classes
        return f"{type(error).__name__}: {error}"
    return f"{shared} bytes of shared memory, of {limits.shared}" if shared > limits.shared else None


#: Most bytes that a thread of a row may spill. The float32 backward with more than 128 channels holds all of them in
#: registers. The others spill nearly all outside their inner loops (``turn`` in the results; a test holds them to it).
MAY_SPILL = {
    "ql32-256": 600, "kl32-256": 100, "ko16-32-two": 200, "ko16-64": 40, "kl16-128": 140, "kl16-64-hopper": 40,
    "kl16-128-amd": 60, "fl16-256": 60, "ko32-32": 100, "tl16-128": 240, "tl16-256": 240, "tl32-256": 100,
    "tl32-256-small": 300,
}  # fmt: skip
#: The same of any other row with another Triton than the table's: a few registers.
A_FEW = 16


def fits(line: Line, code: Any, target: str, is_other: bool = False) -> bool:
    from benchmarks import gpu_code

    most = MAY_SPILL.get(line.row.id, A_FEW * is_other)
    return code.spilled <= most and code.shared <= gpu_code.TARGETS[target][1].shared


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_compile", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="glob over rows' ids and kernels")
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--others", action="store_true", help="other GPUs: whether rows compile for them and fit")
    parser.add_argument("--output", type=Path, help="a JSON for the results alone: for another Triton than the table's")
    options = parser.parse_args(arguments)
    try:
        import triton

        from benchmarks import gpu_code
    except ImportError as error:
        print(f"gpu_compile needs Triton: {error}. Install it on Linux: pip install triton", file=sys.stderr)
        return 2
    chosen = [line for line in lines() if any(fnmatchcase(x, options.only) for x in (line.row.id, line.row.kernel))]
    if options.others:
        if options.write or options.output:
            parser.error("--others keeps nothing: leave out --write and --output")
        return _try_others(chosen)
    is_other = options.output is not None
    path = options.output or RESULTS
    if options.only != "*" and (options.write or is_other) and not _is_of_today(path):
        print(
            f"gpu_compile: {path} is of other kernels than today's, so --only {options.only!r} would leave others "
            "old. Compile all of them: leave out --only.",
            file=sys.stderr,
        )
        return 2
    found: dict[str, dict[str, Any]] = {}
    bad = []
    for line in chosen:
        found[line.name] = {}
        for target in gpu_code.TARGETS:
            code = compile_line(line, target)
            if code is None:
                continue
            found[line.name][target] = code._asdict()
            if not fits(line, code, target, is_other):
                bad.append(f"{line.name} on {target}: {code.spilled} bytes spilled, {code.shared} bytes shared")
            print(f"{line.name:32} {target:7} {_cell(code._asdict())}", flush=True)
    for each in bad:
        print(f"does not fit: {each}", file=sys.stderr)
    if (options.write or is_other) and not bad:
        found = _merged(path, triton.__version__, {name: codes for name, codes in found.items() if codes})
        document = {"triton": triton.__version__, "sources": sources(), "columns": list(gpu_code.Code._fields)}
        write_json(path, {**document, "lines": found})
        if not is_other:
            _write_configurations(found)
            pages.replace(PAGE, BEGIN, END, f"\n{table(triton.__version__, found)}\n")
    return 1 if bad else 0


def _try_others(chosen: list[Line]) -> int:
    from benchmarks import gpu_code

    bad = 0
    for target in gpu_code.OTHERS:
        whys = {line.name: why for line in chosen if (why := why_not(line, target)) is not None}
        for name, why in whys.items():
            print(f"{name} on {target}: {why}", file=sys.stderr, flush=True)
        print(f"{target:8} {len(whys)} of {len(chosen)} do not run", flush=True)
        bad += len(whys)
    return 1 if bad else 0


def _is_of_today(path: Path) -> bool:
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("sources") == sources()


def _merged(path: Path, version: str, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The new results among those of the same Triton that are there, in the order of the table."""
    before: dict[str, Any] = {}
    if path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
        before = document["lines"] if document["triton"] == version else {}
    both = {**before, **found}
    return {line.name: both[line.name] for line in lines() if line.name in both}


def _write_configurations(found: dict[str, dict[str, Any]]) -> None:
    document = json.loads(configurations.PATH.read_text(encoding="utf-8"))
    costs = {row.id: _costs(row, found) for row in configurations.rows()}
    for row in document["rows"]:
        row["cost"] = costs[row["id"]]
        shared: dict[str, int] = {}
        for name, codes in found.items():
            if name.split()[0] == row["id"]:
                for target, code in codes.items():
                    vendor = "hip" if target.startswith("gfx") else "cuda"
                    shared[vendor] = max(shared.get(vendor, 0), code["shared"])
        row["shared"] = shared
    with write_whole(configurations.PATH, "w") as file:
        file.write(configurations.as_text(document))


def _costs(row: Row, found: dict[str, dict[str, Any]]) -> list[int]:
    """Without and with a bias. A row that is not for NVIDIA costs what it would on compute capability 8.0."""
    costs: dict[bool, int] = {}
    for line in lines():
        if line.row.id == row.id and line.kind == KINDS[row.kernel][0] and line.precision == "ieee":
            codes = found.get(line.name, {})
            code = codes.get("sm_90") or codes.get("sm_80") or compile_line(line, "sm_80", anyway=True)._asdict()
            costs[line.has_bias] = max(code["cycles"].values())
    return [costs.get(has_bias, costs.get(not has_bias, 0)) for has_bias in (False, True)]


def _cell(code: dict[str, Any]) -> str:
    matrix = ", ".join(f"{count} {name}" for name, count in code["matrix"].items())
    cycles = code["cycles"]
    bound = [f"{most} {name}" for name, most in cycles.items() if most == max(cycles.values())][:1]
    return " / ".join([str(code["registers"]), str(code["spilled"]), f"{code['shared'] / 1024:g}", matrix, *bound])


def table(version: str, found: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    targets = list(dict.fromkeys(target for codes in found.values() for target in codes))
    rows = [
        f"| {name} | {' | '.join(_cell(codes[t]) if t in codes else '-' for t in targets)} |"
        for name, codes in found.items()
    ]
    head = f"| row, launch | {' | '.join(targets)} |\n|---|{'---|' * len(targets)}"
    return "\n".join(
        [f"Triton {version}. Registers / bytes spilled / KiB shared / matrix instructions / cycles.", "", head, *rows]
    )


if __name__ == "__main__":
    sys.exit(main())
