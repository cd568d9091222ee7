"""``make gpu-tune``: time every row of the configurations that can run a call, and keep the fastest.

    python -m benchmarks.gpu_tune                time all cases; print the fastest row of each kernel
    python -m benchmarks.gpu_tune --case 'gpu/nat*'
    python -m benchmarks.gpu_tune --write        write the choices to the package's table of configurations
    python -m benchmarks.gpu_tune --table FILE   write the table with the choices there, and leave the package's
    python -m benchmarks.gpu_tune --output FILE  the times as JSON (default
                                                 benchmarks/results/gpu-tune-NAME-DATE-TIME.json)

Needs a GPU. What is timed: the kernels of forward, query and key gradients and bias gradient, and those of the unfused
pair where its weights take no more than 1 GiB; by CUDA graphs. Results are not looked at: ``make gpu-check`` comes
after. First all rows are compiled, in several processes (Triton keeps them on disk), then the cases are timed one by
one until the minutes are over; everything is written after each. Where several maps run the same machine code, the row
is kept that is fastest by the geometric mean over the maps. Nothing else in the package measures anything: without this
the rows are chosen by estimates. Exit status: 0 all went well, 1 nothing could be timed, 2 a wrong call or no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_cases, gpu_children
from benchmarks.cases import Case
from benchmarks.gpu_check import encoded, machine, result_path, say, slug
from benchmarks.gpu_children import Children, Job, why
from nbhd._files import write_json, write_whole
from nbhd.backends import triton as backend
from nbhd.backends.triton import configurations
from nbhd.errors import FileError

ROUNDS = 5
#: A row that takes so many times as long as the fastest is not timed again.
HOPELESS = 2.0
#: A sample is as many calls as take this long.
SAMPLE_SECONDS = 0.01
#: Most bytes of the unfused pair's weights.
MOST_WEIGHTS = 1 << 30
#: Of the time, what compiling ahead may take; seconds that a row may take; most processes that compile.
COMPILING, LIMIT, MOST_WORKERS = 0.5, 60.0, 14
#: Rows of a case that may take their process with them, and one.
ATTEMPTS = 12

KINDS = ("forward", "query", "table", "key", "pairs", "gather", "scatter")
#: Kernels whose rows are chosen regardless of a bias.
WITHOUT_BIAS = ("gather", "scatter")

#: By key of the call and case: ``ms`` by row, ``notes``: why others have none, ``timed``: ``graph`` or ``eager``,
#: ``is_whole``: all rows had their turn; ``input_copies``: calls of a sample, each on tensors of its own.
Times = dict[str, dict[str, dict[str, Any]]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="*", help="glob over the cases of gpu_check")
    parser.add_argument("--write", action="store_true", help="keep the choices in the package's table")
    parser.add_argument("--table", type=Path, help="write the table of configurations with the choices there")
    parser.add_argument("--output", type=Path, help="the JSON")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default 9)")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        return _refuse(f"--minutes must be positive, got {options.minutes}.")
    if backend.why_unusable() is not None:
        return _refuse(str(backend.why_unusable()))
    if not torch.cuda.is_available():
        return _refuse("PyTorch sees no GPU, and only one can say what is fast. Run this where there is one.")
    chosen = [case for name, case in gpu_cases.CASES.items() if fnmatchcase(name, options.case)]
    if not chosen:
        return _refuse(
            f"--case {options.case!r} matches nothing. `python -m benchmarks.gpu_check --list` has the names."
        )
    try:
        return _run(chosen, torch.device("cuda", torch.cuda.current_device()), options)
    except FileError as error:
        return _refuse(str(error))


def _run(chosen: list[Case], device: torch.device, options: argparse.Namespace) -> int:
    from nbhd.backends.triton import launches

    begun, now = time.monotonic(), datetime.now(UTC)
    until = begun + 60 * options.minutes
    report: dict[str, Any] = {"machine": machine(device), "begun": now.isoformat(timespec="seconds")}
    output = options.output or result_path(f"gpu-tune-{slug(report)}", now)
    tables = [*([options.table] if options.table is not None else []), *[configurations.PATH] * options.write]
    times: Times = {}
    notes: dict[str, str] = {}

    def save() -> None:
        picked = choices(times)
        report.update(times=times, choices=picked, notes=notes, seconds=time.monotonic() - begun)
        write_json(output, encoded(report))
        for path in tables:
            keep(picked, target.device, path)

    target = launches.target_of(torch.empty(0, device=device))
    save()  # what cannot be written is better known now
    failed = compile_ahead(chosen, target, begun + COMPILING * (until - begun))
    report["compiling_seconds"] = time.monotonic() - begun
    with Children() as children:
        for case in chosen:

            def add(found: dict[str, Any], case: Case = case) -> None:
                _add(times, notes, case, found)
                save()

            found = gpu_children.study(
                children, tune, case, device, failed, until=until, limit=LIMIT, attempts=ATTEMPTS, save=add
            )
            for each in found.get("kernels", {}).values():
                ms = each["ms"]
                fast = min(ms, key=lambda row: ms[row], default=None)
                say(each["key"], "no row runs" if fast is None else f"{fast} {ms[fast]:.4f} ms ({each['timed']})")
                failed |= {f"{each['key']} {row}": reason for row, reason in each["notes"].items()}
            for name, reason in found["notes"].items():
                say(f"{case.name} {name}", reason)
    print(output)
    return 0 if choices(times) else 1


def _add(times: Times, notes: dict[str, str], case: Case, found: dict[str, Any]) -> None:
    for each in found.get("kernels", {}).values():
        kept = {name: reported for name, reported in each.items() if name != "key"}
        maps = times.setdefault(each["key"], {})
        if each["is_whole"] or not maps.get(case.name, {"is_whole": False})["is_whole"]:  # begun anew after a failure
            maps[case.name] = kept
    notes.update({f"{case.name} {name}": reason for name, reason in found["notes"].items()})


def choices(times: Times) -> dict[str, str]:
    """The fastest row by key of the call: over all of its maps, each weighing the same."""
    found = {}
    for key, maps in times.items():
        slower: dict[str, list[float]] = {}
        for each in (each for each in maps.values() if each["is_whole"]):
            for row, ms in each["ms"].items():
                slower.setdefault(row, []).append(ms / min(each["ms"].values()))
        # a row that could not run some of the maps stands behind those that could
        if slower:
            found[key] = min(slower, key=lambda row: (-len(slower[row]), statistics.geometric_mean(slower[row])))
    return found


def keep(picked: dict[str, str], device: str, path: Path) -> None:
    """Write the package's table with these choices for a device (``Target.device``) to ``path``."""
    document = json.loads(configurations.PATH.read_text(encoding="utf-8"))
    if picked:
        configurations.remember(document, device, picked)
    with write_whole(path, "w") as file:
        file.write(configurations.as_text(document))


class Plan(NamedTuple):
    """A kernel of a case: ``launches(row, tile)`` of a call, and those that go with a row."""

    kind: str
    has_bias: bool
    call: Any
    launches: Callable[[Any, Any], Iterator[Any]]
    more: Callable[[Any], Iterator[Any]]

    @property
    def key(self) -> str:
        return str(self.call.problem(self.kind, self.has_bias).key)

    def rows(self) -> tuple[tuple[Any, Any], ...]:
        from nbhd.backends.triton import launches

        return launches.rows_of(self.call, self.kind, self.has_bias)

    def run(self, row: Any, tile: Any) -> None:
        for launch in itertools.chain(self.launches(row, tile), self.more(row)):
            launch.run()


def plans(case: Case, device: torch.device, target: Any = None) -> Iterator[Plan]:
    """The kernels of a case on tensors of their own. On ``meta``, for a ``target``: to be compiled alone."""
    from nbhd.backends.triton import attention, launches, unfused

    shape, bias = (case.batch, *case.spatial, case.heads, case.head_dim), None
    query, key, value, out, d_out = (torch.randn(shape, device=device, dtype=case.torch_dtype) for _ in range(5))
    if case.has_bias:
        bias = torch.randn(case.heads, *(2 * k - 1 for k in case.kernel_size), device=device)
    lse = torch.zeros(shape[:-1], device=device)
    scale = case.head_dim**-0.5

    def call() -> launches.Map:
        return launches.Map(query, case.heads, case.head_dim, case.head_dim, case.neighborhood, target)

    def nothing(row: Any) -> Iterator[Any]:
        return iter(())

    made = call()
    yield Plan(
        "forward", case.has_bias, made, attention.ForwardPlan(made, query, key, value, bias, out, lse, scale).launches,
        nothing,
    )  # fmt: skip
    made = call()
    back = attention.BackwardPlan(made, d_out, None, query, key, value, bias, out, lse, scale)

    def table(row: Any) -> Iterator[Any]:
        """A walk leaves the gradient of the bias to launches of its own: they are part of its time."""
        if case.has_bias and row.kernel == "query_loop":
            yield from back.table_launches(*launches.rows_of(made, "table", True)[0])

    yield Plan("query", case.has_bias, made, back.query_launches, table)
    if case.has_bias:
        yield Plan("table", True, made, back.table_launches, nothing)
    yield Plan("key", case.has_bias, made, back.key_launches, nothing)
    weights = (*shape[:-1], case.neighborhood.slots)
    if math.prod(weights) * case.torch_dtype.itemsize > MOST_WEIGHTS:
        return
    slots = torch.zeros(weights, device=device, dtype=case.torch_dtype)
    pairs, gather, scatter = call(), call(), call()
    yield Plan(
        "pairs", case.has_bias, pairs, unfused.PairsPlan(pairs, query, key, bias, slots, scale).launches, nothing
    )  # fmt: skip
    yield Plan("gather", False, gather, unfused.GatherPlan(gather, slots, key, scale).launches, nothing)
    yield Plan("scatter", False, scatter, unfused.ScatterPlan(scatter, slots, query, scale).launches, nothing)


def compile_ahead(chosen: list[Case], target: Any, until: float) -> dict[str, str]:
    """Compile all rows of the cases in several processes; by key and row, why some cannot be."""
    jobs: dict[str, Job] = {}
    for case in chosen:
        for plan in plans(case, torch.device("meta"), target):
            for row, _ in plan.rows():
                jobs.setdefault(f"{plan.key} {row.id}", Job(compile_row, (case, plan.kind, row.id, target)))
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 1))
    failed: dict[str, str] = {}
    names = list(jobs)
    with Children(workers) as children:
        for index, outcome in children.run(list(jobs.values()), until=until, limit=LIMIT):
            if outcome.error is not None and not outcome.is_late:  # the late ones are compiled when they are timed
                failed[names[index]] = outcome.error
                say(names[index], outcome.error)
    return failed


def compile_row(case: Case, kind: str, row_id: str, target: Any) -> None:
    """Let Triton compile what a row runs, and keep it on disk."""
    for plan in plans(case, torch.device("meta"), target):
        if plan.kind == kind:
            for row, tile in plan.rows():
                if row.id == row_id:
                    for launch in plan.launches(row, tile):
                        launch.kernel.warmup(
                            *launch.arguments, grid=launch.grid, **launch.constants, **launch.options
                        )  # fmt: skip
            return


def tune(
    case: Case, device: torch.device, failed: dict[str, str], without: dict[str, str] | None = None, *,
    tell: Callable[[dict[str, Any], str | None], None] = lambda found, doing: None,
) -> dict[str, Any]:  # fmt: skip
    """By kernel the key of its call, milliseconds by row (interleaved, medians), and why other rows do not run.

    ``failed``, by key and row: what could not be compiled. An error after which this process is of no more use is
    raised: the caller begins anew ``without`` what ``tell`` was told last.
    """
    from benchmarks import gpu_timing

    without = without or {}
    moved = 3 * case.queries * case.head_dim * case.torch_dtype.itemsize
    found: dict[str, Any] = {"kernels": {}, "notes": {}}
    for same in zip(*(plans(case, device) for _ in range(gpu_timing.copies(moved, device))), strict=True):
        plan = same[0]
        entry: dict[str, Any] = {"key": plan.key, "ms": {}, "notes": {}, "timed": "graph", "is_whole": False}
        entry["input_copies"] = len(same)
        found["kernels"][plan.kind] = entry
        runs: dict[str, Callable[[], object]] = {}
        for row, tile in plan.rows():
            name = f"{plan.kind} {row.id}"
            reason = failed.get(f"{plan.key} {row.id}") or without.get(name)
            if reason is not None:
                entry["notes"][row.id] = reason
                continue

            def run(row: Any = row, tile: Any = tile, same: tuple[Plan, ...] = same) -> None:
                for each in same:
                    each.run(row, tile)

            tell(found, name)
            try:
                gpu_timing.first_call(run)
            except Exception as error:  # too large for this device: a result too
                if not gpu_children.is_usable():
                    raise
                entry["notes"][row.id] = why(error)
                continue
            runs[row.id] = run
        label = f"{plan.kind} as graphs"
        if label in without:
            entry["timed"] = "eager"
            found["notes"][label] = without[label]
        _time(entry, runs, len(same), label, lambda doing: tell(found, doing))
        entry["is_whole"] = True
        tell(found, f"what comes after {plan.kind}")
    return found


def _time(
    entry: dict[str, Any], runs: dict[str, Callable[[], object]], count: int, label: str, tell: Callable[[str], None]
) -> None:  # fmt: skip
    """Fill in the milliseconds of a call of each row, of which ``runs`` make ``count``: by graphs all, or none."""
    from benchmarks import gpu_graphs, gpu_timing

    if entry["timed"] == "graph":
        tell(label)
        runs = {name: gpu_graphs.captured(run, warm_up=1) for name, run in runs.items()}
    kind, samples, repeats = label.split()[0], dict[str, list[float]](), dict[str, int]()
    for name, run in runs.items():
        tell(f"{kind} {name}")
        once = min(gpu_timing.milliseconds(run, 1) for _ in range(2))
        repeats[name] = max(1, int(SAMPLE_SECONDS * 1e3 / max(1e-3, once)))
        entry["ms"][name] = once / count
    fastest = min(entry["ms"].values(), default=0.0)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            if entry["ms"][name] <= HOPELESS * fastest:
                tell(f"{kind} {name}")
                samples.setdefault(name, []).append(gpu_timing.milliseconds(run, repeats[name]) / count)
    entry["ms"] |= {name: statistics.median(each) for name, each in samples.items()}


def _refuse(why: str) -> int:
    print(f"gpu-tune: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
