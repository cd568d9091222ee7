"""``make gpu-tune``: time every row of the configurations that can run a call, and keep the fastest.

    python -m benchmarks.gpu_tune                time all cases; print the fastest row of each kernel
    python -m benchmarks.gpu_tune --case 'gpu/nat*'
    python -m benchmarks.gpu_tune --write        write the choices to the table of configurations, the times to
                                                 benchmarks/results/gpu-tune-NAME-DATE.json

Needs a GPU. Nothing else in the package measures anything: without this the rows are chosen by estimates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_cases
from benchmarks.cases import Case
from nbhd._files import write_json, write_whole
from nbhd.backends import triton as backend
from nbhd.backends.triton import configurations

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tune", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="*", help="glob over the cases of gpu_check")
    parser.add_argument("--write", action="store_true", help="keep what was measured")
    options = parser.parse_args(arguments)
    if backend.why_unusable() is not None:
        return _refuse(str(backend.why_unusable()))
    if not torch.cuda.is_available():
        return _refuse("PyTorch sees no GPU, and only one can say what is fast. Run this where there is one.")
    chosen = [case for name, case in gpu_cases.CASES.items() if fnmatchcase(name, options.case)]
    if not chosen:
        return _refuse(
            f"--case {options.case!r} matches nothing. `python -m benchmarks.gpu_check --list` has the names."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    times: dict[str, dict[str, float | str]] = {}
    for case in chosen:
        for key, each in tune(case, device).items():
            times[key] = each
            fast = min((ms, name) for name, ms in each.items() if isinstance(ms, float)) if each else None
            print(f"{key:60}{fast[1] if fast else 'no row runs'} {fast[0] if fast else 0:.4f} ms", flush=True)
        torch.cuda.empty_cache()
    if options.write:
        _keep(times)
    return 0


def tune(case: Case, device: torch.device) -> dict[str, dict[str, float | str]]:
    """By key of the call and kernel: milliseconds of each row, or why it does not run. Interleaved, medians."""
    from benchmarks import gpu_timing
    from nbhd.backends.triton import attention, launches

    shape = (case.batch, *case.spatial, case.heads, case.head_dim)
    query, key, value, d_out = (torch.randn(shape, device=device, dtype=case.torch_dtype) for _ in range(4))
    bias = torch.randn(case.heads, *(2 * k - 1 for k in case.kernel_size), device=device) if case.has_bias else None
    scale = case.head_dim**-0.5
    out, lse = attention.run_forward(query, key, value, bias, case.neighborhood, scale)

    def call() -> launches.Map:
        return launches.Map(query, case.heads, case.head_dim, case.head_dim, case.neighborhood)

    made = call()
    forward = attention.ForwardPlan(made, query, key, value, bias, out, lse, scale)
    other = call()
    back = attention.BackwardPlan(other, d_out, None, query, key, value, bias, out, lse, scale)
    plans: dict[str, tuple[launches.Map, Callable[..., Any]]] = {
        "forward": (made, forward.launches), "query": (other, back.query_launches), "key": (other, back.key_launches),
    }  # fmt: skip
    found: dict[str, dict[str, float | str]] = {}
    for kernel, (of, build) in plans.items():
        problem = of.problem(kernel, case.has_bias)
        samples: dict[str, list[float]] = {}
        each: dict[str, float | str] = {}
        runs = {}
        for row, tile in launches.rows_of(of, kernel, case.has_bias):
            # a walk leaves the gradient of the bias to launches of its own: they are part of its time
            more = launches.rows_of(of, "table", True)[0] if case.has_bias and row.kernel == "query_loop" else None

            def run(row: Any = row, tile: Any = tile, build: Callable[..., Any] = build, more: Any = more) -> None:
                for launch in build(row, tile):
                    launch.run()
                if more is not None:
                    for launch in back.table_launches(*more):
                        launch.run()

            try:
                gpu_timing.first_call(run)
                runs[row.id] = run
            except Exception as error:  # too large for this device: a result too
                each[row.id] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        repeats = {name: max(1, int(10 / max(1e-3, gpu_timing.milliseconds(run, 1)))) for name, run in runs.items()}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                samples.setdefault(name, []).append(gpu_timing.milliseconds(run, repeats[name]))
        each |= {name: sorted(s)[len(s) // 2] for name, s in samples.items()}
        found[problem.key] = each
    return found


def _keep(times: dict[str, dict[str, float | str]]) -> None:
    document = json.loads(configurations.PATH.read_text(encoding="utf-8"))
    for key, each in times.items():
        measured = {name: ms for name, ms in each.items() if isinstance(ms, float)}
        if measured:
            document["measured"][key] = min(measured, key=lambda name: measured[name])
    with write_whole(configurations.PATH, "w") as file:
        file.write(configurations.as_text(document))
    from benchmarks.gpu_check import machine

    here = machine(torch.device("cuda", torch.cuda.current_device()))
    name = "".join(c if c.isalnum() else "-" for c in here["gpu"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    date = datetime.now(UTC).date().isoformat()
    write_json(RESULTS / f"gpu-tune-{name}-{date}.json", {"machine": here, "ms": times})


def _refuse(why: str) -> int:
    print(f"gpu-tune: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
