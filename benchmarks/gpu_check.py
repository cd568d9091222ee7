"""``make gpu-check``: is what the GPU computes right, and how fast is it? One JSON, in under ten minutes.

    python -m benchmarks.gpu_check                     numerics, benchmarks against peers, whole networks; one JSON
    python -m benchmarks.gpu_check --numerics          numerics alone
    python -m benchmarks.gpu_check --networks          NAT's numerics, then whole networks alone, compiled ones too
    python -m benchmarks.gpu_check --networks 'swin*' --compiled    some of them (a glob), compiled alone
    python -m benchmarks.gpu_check --interpret         a few numerics under Triton's interpreter: no GPU, a minute
    python -m benchmarks.gpu_check --case '*nat*'      some benchmarks (globs); --list has the names

Needs this repository and the packages torch 2.11, triton 3.6, numpy and transformers (the last for whole networks), or
newer ones. First the numerics, in several processes: where one fails nothing is timed. Then the cases in the order of
their weight, the operator's and the whole layers', until the minutes that the networks need are all that is left; the
networks as they are; then those under torch.compile that there is still time for. ``--networks`` gives these all of it.
What was left out is named. The JSON is written after each part. Exit status: 0 all went well, 1 something is wrong, 2 a
wrong call or no GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import nbhd
from benchmarks import gpu_cases, gpu_numerics
from benchmarks.models import NETWORKS
from nbhd._files import write_json
from nbhd.backends import triton as backend
from nbhd.errors import FileError

RESULTS = Path(__file__).resolve().parent / "results"
#: Seconds that the networks need without torch.compile.
NETWORKS_SECONDS = 90.0
#: Processes that compile the numerics' kernels.
MOST_WORKERS = 8


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numerics", action="store_true", help="numerics alone")
    parser.add_argument("--interpret", action="store_true", help="a few numerics under Triton's interpreter, no GPU")
    parser.add_argument("--case", default="*", help="glob over the benchmarks")
    parser.add_argument("--networks", nargs="?", const="*", metavar="GLOB", help="whole networks alone, all or some")
    parser.add_argument("--compiled", action="store_true", help="with --networks: those under torch.compile alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default 9)")
    parser.add_argument("--output", type=Path, help="the JSON (default benchmarks/results/gpu-NAME-DATE.json)")
    parser.add_argument("--list", action="store_true", help="the benchmarks")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(gpu_cases.ALL))
        return 0
    if options.compiled and options.networks is None:
        return _refuse("--compiled says which networks: use it with --networks.")
    if options.networks is not None and not any(fnmatchcase(name, options.networks) for name in NETWORKS):
        return _refuse(f"--networks {options.networks!r} matches nothing. There are {', '.join(NETWORKS)}.")
    if not options.minutes > 0:
        return _refuse(f"--minutes must be positive, got {options.minutes}.")
    chosen = [case for name, case in gpu_cases.ALL.items() if fnmatchcase(name, options.case)]
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
    path = _path(report, device, options)

    def save(**part: Any) -> None:
        report.update(part, seconds=time.monotonic() - begun)
        if path is not None:
            write_json(path, report)

    try:
        # the numerics may take at most half of the time: what they leave out is named and not called right
        results, passed = _numerics(device, options, begun + 30 * options.minutes)
        save(numerics=results)
        if not passed:
            print("the numerics are wrong: nothing was timed.", file=sys.stderr)
        elif not (options.numerics or options.interpret):
            if options.networks is None:
                reserved = NETWORKS_SECONDS if options.case == "*" else 0.0
                save(cases=_cases(chosen, device, until - reserved))
            if options.networks is not None or options.case == "*":
                save(networks=_networks(device, until, options, lambda found: save(networks=found)))
    except FileError as error:
        return _refuse(str(error))
    if path is not None:
        print(path)
    return 0 if passed else 1


def _path(report: dict[str, Any], device: torch.device, options: argparse.Namespace) -> Path | None:
    path: Path | None = options.output
    if path is None and device.type == "cuda":
        name = "".join(c if c.isalnum() else "-" for c in report["machine"]["gpu"].lower()).strip("-")
        what = "" if options.networks is None else "-networks" + "-compiled" * options.compiled
        path = RESULTS / f"gpu-{name}{what}-{report['begun'][:10]}.json"
        path.parent.mkdir(exist_ok=True)
    return path


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


def _numerics(
    device: torch.device, options: argparse.Namespace, until: float
) -> tuple[list[dict[str, Any]], bool]:  # fmt: skip
    results, passed = [], True
    names = () if options.networks is None else gpu_numerics.NETWORKS
    workers = 1 if options.interpret else max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))
    for result in gpu_numerics.check(device, names=names, quick=options.interpret, until=until, workers=workers):
        results.append(result)
        verdict = {True: "ok", False: "WRONG", None: "left out"}[result["passed"]]
        worst = max((e[1] for e in result.get("errors", {}).values()), default=0.0)
        said = result.get("error") or f"largest error {worst:.1e}"
        print(f"{verdict:9}{result['name']:44}{said}", file=sys.stderr, flush=True)
        passed &= result["passed"] is not False
    return results, passed


def _cases(chosen: list[Any], device: torch.device, until: float) -> dict[str, Any]:
    from benchmarks import gpu_timing

    found: dict[str, Any] = {}
    for case in chosen:
        if time.monotonic() > until:
            found[case.name] = {"skipped": "no time left"}
            continue
        each = gpu_timing.measure(case, gpu_cases.contenders(case), device)
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
        return f"no result: {each['notes'].get(each['first'])}"
    peers = " ".join(
        f"{name} {ratio['forward']:.2f}x {ratio['both']:.2f}x"
        for name, ratio in each["ratios"].items()
        if name != each["first"]
    )
    return f"{ms['forward']:.3f} ms, with backward {ms['both']:.3f} ms  {peers}"


def _networks(
    device: torch.device, until: float, options: argparse.Namespace, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    from benchmarks import gpu_networks

    found = gpu_networks.measure(
        device, until, names=options.networks or "*", with_eager=not options.compiled, save=save
    )  # fmt: skip
    for name, entry in found["networks"].items():
        rates = ", ".join(
            f"{how} {rate:.0f} images/s {entry['peak_bytes'][how] / 2**30:.2f} GiB"
            for how, rate in entry["images_per_second"].items()
        )
        print(f"{name:44}{rates}", file=sys.stderr, flush=True)
    for label, reason in found["notes"].items():
        print(f"{label:44}{reason}", file=sys.stderr, flush=True)
    return found


def _refuse(why: str) -> int:
    print(f"gpu-check: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
