"""``make gpu-check``: is what the GPU computes right, and how fast is it? One JSON, in under ten minutes.

    python -m benchmarks.gpu_check                     numerics, benchmarks against peers, one JSON
    python -m benchmarks.gpu_check --numerics          numerics alone
    python -m benchmarks.gpu_check --interpret         a few numerics under Triton's interpreter: no GPU, a minute
    python -m benchmarks.gpu_check --case '*nat*'      some benchmarks (globs); --list has the names

Needs this repository and the packages torch 2.11, triton 3.6, numpy and transformers (the last for whole networks), or
newer ones. First the numerics: where one fails nothing is timed. Then the cases in the order of their weight until the
minutes are over; what was left out is named. Exit status: 0 all went well, 1 something is wrong, 2 a wrong call or no
GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import nbhd
from benchmarks import gpu_cases, gpu_numerics
from nbhd._files import write_json
from nbhd.backends import triton as backend
from nbhd.errors import FileError

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numerics", action="store_true", help="numerics alone")
    parser.add_argument("--interpret", action="store_true", help="a few numerics under Triton's interpreter, no GPU")
    parser.add_argument("--case", default="*", help="glob over the benchmarks")
    parser.add_argument("--compiled", action="store_true", help="networks under torch.compile too (minutes more)")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default 9)")
    parser.add_argument("--output", type=Path, help="the JSON (default benchmarks/results/gpu-NAME-DATE.json)")
    parser.add_argument("--list", action="store_true", help="the benchmarks")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(gpu_cases.CASES))
        return 0
    if not options.minutes > 0:
        return _refuse(f"--minutes must be positive, got {options.minutes}.")
    chosen = [case for name, case in gpu_cases.CASES.items() if fnmatchcase(name, options.case)]
    if not chosen:
        return _refuse(f"--case {options.case!r} matches nothing. --list has the names.")
    if backend.why_unusable() is not None:
        return _refuse(str(backend.why_unusable()))
    if options.interpret:
        if os.environ.get("TRITON_INTERPRET") != "1":  # it is read when Triton is imported
            os.environ["TRITON_INTERPRET"] = "1"
        device = torch.device("cpu")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        return _refuse("TRITON_INTERPRET=1 is set: the kernels would not run on the GPU. Unset it, or add --interpret.")
    elif not torch.cuda.is_available():
        return _refuse(
            "PyTorch sees no GPU (torch.cuda.is_available() is False). Run this on a machine with one and a build of "
            "PyTorch for it; --interpret runs a part of the numerics without."
        )
    else:
        device = torch.device("cuda", torch.cuda.current_device())
    begun = time.monotonic()
    until = begun + 60 * options.minutes
    report: dict[str, Any] = {
        "machine": machine(device),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # the numerics may take at most half of the time: what they leave out is named and not called right
    report["numerics"], passed = _numerics(device, options.interpret, begun + 30 * options.minutes)
    if passed and not (options.numerics or options.interpret):
        report["cases"] = _cases(chosen, device, until)
        if options.case == "*":
            report["networks"] = _networks(device, until, options.compiled)
    report["seconds"] = time.monotonic() - begun
    return _finish(report, passed, device, options)


def _finish(report: dict[str, Any], passed: bool, device: torch.device, options: argparse.Namespace) -> int:
    path = options.output
    if path is None and device.type == "cuda":
        name = "".join(c if c.isalnum() else "-" for c in report["machine"]["gpu"].lower()).strip("-")
        path = RESULTS / f"gpu-{name}-{report['begun'][:10]}.json"
        path.parent.mkdir(exist_ok=True)
    try:
        if path is not None:
            write_json(path, report)
            print(path)
    except FileError as error:
        return _refuse(str(error))
    if not passed:
        print("the numerics are wrong: nothing was timed.", file=sys.stderr)
    return 0 if passed else 1


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions, as the JSON keeps them."""
    import triton

    found: dict[str, Any] = {
        "nbhd": nbhd.__version__, "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "gpu": "none: Triton's interpreter",
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda, "hip": torch.version.hip,
        }  # fmt: skip
        # what memory gives: bytes read and written by a copy of 1 GiB
        from benchmarks.gpu_timing import milliseconds

        source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        milliseconds(lambda: target.copy_(source), 2)
        found["copy_bytes_per_second"] = 2 * source.numel() / milliseconds(lambda: target.copy_(source), 10) * 1e3
    return found


def _numerics(device: torch.device, quick: bool, until: float) -> tuple[list[dict[str, Any]], bool]:
    results, passed = [], True
    for result in gpu_numerics.check(device, quick=quick, until=until):
        results.append(result)
        verdict = {True: "ok", False: "WRONG", None: "left out"}[result["passed"]]
        worst = max((e[1] for e in result.get("errors", {}).values()), default=0.0)
        print(f"{verdict:9}{result['name']:44}largest error {worst:.1e}", file=sys.stderr, flush=True)
        passed &= result["passed"] is not False
    return results, passed


def _cases(chosen: list[Any], device: torch.device, until: float) -> dict[str, Any]:
    from benchmarks import gpu_timing

    found: dict[str, Any] = {}
    for case in chosen:
        if time.monotonic() > until - 60:  # the networks need the rest
            found[case.name] = {"skipped": "no time left"}
            continue
        each = gpu_timing.measure(case, ["nbhd", *case.peers], device)
        published = gpu_cases.PUBLISHED.get(case.name)
        if published is not None:
            each["natten_published_ms_on_h100"] = published
        found[case.name] = each
        print(f"{case.name:44}{_summary(each)}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return found


def _summary(each: dict[str, Any]) -> str:
    ms = each.get("nbhd_ms")
    if ms is None:
        return f"no result: {each['notes'].get('nbhd')}"
    peers = " ".join(
        f"{name} {ratio['forward']:.2f}x {ratio['both']:.2f}x"
        for name, ratio in each["ratios"].items()
        if name != "nbhd"
    )
    return f"{ms['forward']:.3f} ms, with backward {ms['both']:.3f} ms  {peers}"


def _networks(device: torch.device, until: float, with_compile: bool) -> dict[str, Any]:
    from benchmarks import gpu_networks

    found = gpu_networks.measure(device, until, with_compile=with_compile)
    for name, entry in found["networks"].items():
        rates = ", ".join(f"{how} {rate:.0f} images/s" for how, rate in entry["images_per_second"].items())
        print(f"{name:44}{rates}", file=sys.stderr, flush=True)
    return found


def _refuse(why: str) -> int:
    print(f"gpu-check: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
