"""``make gpu-check``: is what the GPU computes right, and how fast is it? One JSON, in under ten minutes.

    python -m benchmarks.gpu_check                     numerics, benchmarks against peers, whole networks; one JSON
    python -m benchmarks.gpu_check --numerics          numerics alone
    python -m benchmarks.gpu_check --networks          NAT's numerics, then whole networks alone, compiled ones too
    python -m benchmarks.gpu_check --networks 'swin*' --compiled    some of them (a glob), compiled alone
    python -m benchmarks.gpu_check --interpret         a few numerics under Triton's interpreter: no GPU, a minute
    python -m benchmarks.gpu_check --case '*nat*'      some benchmarks (globs); --list has the names
    python -m benchmarks.gpu_check --anyway            go on to what is timed also where numerics are wrong

Needs this repository and the packages torch 2.11, triton 3.6, numpy, transformers and pillow (the last two for whole
networks), or newer ones. First the numerics, in several processes: where one fails nothing is timed. Then the cases in
the order of their weight, the operator's and the whole layers', until the minutes that the networks need are all that
is left; the networks as they are; then those under torch.compile that there is still time for. ``--networks`` gives
these all of it. What was left out is named. The JSON is written after each piece, NaN and infinities in it as strings.
Exit status: 0 all went well, 1 something is wrong, 2 a wrong call or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import nbhd
from benchmarks import gpu_cases, gpu_children, gpu_numerics
from benchmarks.cases import Case
from benchmarks.gpu_children import LATE, Children, Job
from benchmarks.models import NETWORKS
from nbhd._files import write_json
from nbhd.backends import triton as backend
from nbhd.errors import FileError

RESULTS = Path(__file__).resolve().parent / "results"
#: Seconds that the networks need without torch.compile.
NETWORKS_SECONDS = 90.0
#: What is not plain from its name in the JSON.
FIELDS = {
    "errors": "root mean square and largest, relative to float64's; then those of plain PyTorch in the same dtype",
    "graph_ms": "milliseconds of a call in replays of a CUDA graph, by sample",
    "eager_ms": "milliseconds of a call as Python makes it, by sample",
    "input_copies": "calls of a sample, each on copies of the inputs and with results of its own: the L2 helps none",
    "first_call_seconds": "Triton may have the kernels on disk, from the numerics; cold_first_calls has none",
    "ratios": "times of each to ours, both of the same kind",
}
#: Processes that compile the numerics' kernels.
MOST_WORKERS = 8
#: Seconds that a contender of a case, or a network, may take to be compiled.
CASE_LIMIT, NETWORK_LIMIT = 120.0, 240.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numerics", action="store_true", help="numerics alone")
    parser.add_argument("--interpret", action="store_true", help="a few numerics under Triton's interpreter, no GPU")
    parser.add_argument("--anyway", action="store_true", help="time also where numerics are wrong")
    parser.add_argument("--case", default="*", help="glob over the benchmarks")
    parser.add_argument("--networks", nargs="?", const="*", metavar="GLOB", help="whole networks alone, all or some")
    parser.add_argument("--compiled", action="store_true", help="with --networks: those under torch.compile alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default 9)")
    parser.add_argument("--output", type=Path, help="the JSON (default benchmarks/results/gpu-NAME-DATE-TIME.json)")
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
        os.environ["TRITON_INTERPRET"] = "1"  # it is read when Triton is imported
        device = torch.device("cpu")
    elif backend.asks_for_interpreter():
        return _refuse("TRITON_INTERPRET is set: the kernels would not run on the GPU. Unset it, or add --interpret.")
    elif not torch.cuda.is_available():
        return _refuse(
            "PyTorch sees no GPU (torch.cuda.is_available() is False). Run this on a machine with one and a build of "
            "PyTorch for it; --interpret runs a part of the numerics without."
        )
    else:
        device = torch.device("cuda", torch.cuda.current_device())
    check = Check(device, options)
    try:
        check.save()  # what cannot be written is better known now
        check.part("numerics", check.numerics)
        if check.is_refuted and not options.anyway:
            print("the numerics are wrong: nothing was timed.", file=sys.stderr)
        elif not (options.numerics or options.interpret):
            if options.networks is None:
                check.part("cases", lambda: check.cases(chosen))
            if options.networks is not None or options.case == "*":
                check.part("networks", check.networks)
    except FileError as error:
        return _refuse(str(error))
    if check.path is not None:
        print(check.path)
    return 1 if check.is_wrong else 0


class Check:
    """A run: the report so far, whether something in it is wrong, and whether the numerics are."""

    def __init__(self, device: torch.device, options: argparse.Namespace) -> None:
        self.device, self.options = device, options
        self.begun = time.monotonic()
        self.until = self.begun + 60 * options.minutes
        begun = datetime.now(UTC)
        self.report: dict[str, Any] = {
            "machine": machine(device), "begun": begun.isoformat(timespec="seconds"), "fields": FIELDS,
        }  # fmt: skip
        self.is_wrong = self.is_refuted = False
        self.path: Path | None = options.output
        if self.path is None and device.type == "cuda":
            what = "" if options.networks is None else "-networks" + "-compiled" * options.compiled
            self.path = result_path(f"gpu-{slug(self.report)}{what}", begun)

    def save(self, **part: Any) -> None:
        self.report.update(part, seconds=time.monotonic() - self.begun)
        if self.path is not None:
            write_json(self.path, encoded(self.report))

    def part(self, name: str, run: Any) -> None:
        """Run one of the parts: if it breaks off, what it saved stays, and the next one has its turn."""
        try:
            run()
        except FileError:
            raise
        except Exception as error:
            traceback.print_exc()
            self.is_wrong = True
            self.save(**{f"{name}_error": gpu_children.why(error)})

    def numerics(self) -> None:
        """They may take at most half of the time: what they leave out is named and not called right."""
        options = self.options
        results: list[dict[str, Any]] = []
        names = () if options.networks is None else gpu_numerics.NETWORKS
        workers = 1 if options.interpret else max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))
        until = self.begun + 30 * options.minutes
        for result in gpu_numerics.check(
            self.device, names=names, quick=options.interpret, until=until, workers=workers
        ):  # fmt: skip
            results.append(result)
            self.is_refuted |= result["passed"] is False
            self.save(numerics=results)
            verdict = {True: "ok", False: "WRONG", None: "left out"}[result["passed"]]
            say(verdict, result["name"], _said(result))
        self.is_wrong |= self.is_refuted or not any(result["passed"] for result in results)

    def cases(self, chosen: list[Case]) -> None:
        from benchmarks import gpu_timing

        until = self.until - (NETWORKS_SECONDS if self.options.case == "*" else 0.0)
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder, Children(environment={"TRITON_CACHE_DIR": folder}) as fresh:
            case = chosen[0]
            name = gpu_cases.contenders(case)[0]
            outcome = self._one(fresh, Job(gpu_timing.cold, (case, name, self.device)), until)
            self.save(cold_first_calls={"case": case.name, "seconds": outcome.value, "error": outcome.error})
        with Children() as children:
            outcome = self._one(children, Job(gpu_timing.copy_rate, (self.device,)), until)
            self.report["machine"]["copy_bytes_per_second"] = outcome.value
            for case in chosen:
                names = gpu_cases.contenders(case)
                if time.monotonic() > until:
                    found[case.name] = {"skipped": LATE.error}
                    continue

                def keep(each: dict[str, Any], case: Case = case) -> None:
                    if case.name in gpu_cases.PUBLISHED:
                        each["natten_published_ms_on_h100"] = gpu_cases.PUBLISHED[case.name]
                    found[case.name] = each
                    self.save(cases=found)

                each = gpu_children.study(
                    children, gpu_timing.measure, case, names, self.device, until=until, limit=CASE_LIMIT, save=keep
                )
                if "contenders" in each:  # it may have been broken off
                    gpu_timing.summarise(case, each)
                keep(each)
                self.is_wrong |= _is_wrong(names[0], each)
                say(case.name, _summary(each))
        self.save(cases=found)

    def networks(self) -> None:
        from benchmarks import gpu_networks

        options = self.options
        forms = (True,) if options.compiled else (False, True)
        with Children() as children:
            found = gpu_children.study(
                children, gpu_networks.measure, self.device, self.until, options.networks or "*", forms,
                until=self.until, limit=NETWORK_LIMIT, save=lambda each: self.save(networks=each),
            )  # fmt: skip
        for name, entry in found.get("networks", {}).items():
            rates = ", ".join(
                f"{how} {rate:.0f} images/s {entry['peak_bytes'][how] / 2**30:.2f} GiB"
                for how, rate in entry.get("images_per_second", {}).items()
            )
            say(name, rates)
        for label, reason in found["notes"].items():
            say(label, reason)
            self.is_wrong |= label.startswith(("nat-", "all")) and reason != LATE.error

    @staticmethod
    def _one(children: Children, job: Job, until: float) -> gpu_children.Outcome:
        [(_, outcome)] = children.run([job], until=until, limit=CASE_LIMIT)
        return outcome


def say(*columns: str) -> None:
    """A line of progress; the last column as long as it is."""
    widths = (9, 44) if len(columns) == 3 else (44,)
    line = "".join(f"{text:{width}}" for text, width in zip(columns, widths, strict=False))
    print(f"{line} {columns[-1]}", file=sys.stderr, flush=True)


def encoded(value: Any) -> Any:
    """``value`` with the numbers that JSON has not as strings: ``"nan"``, ``"inf"``, ``"-inf"``."""
    if isinstance(value, dict):
        return {key: encoded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def slug(report: dict[str, Any]) -> str:
    """The GPU's name for a file's."""
    return "".join(c if c.isalnum() else "-" for c in report["machine"]["gpu"].lower()).strip("-")


def result_path(name: str, begun: datetime) -> Path:
    """Where a run's JSON goes if nothing else is said: no two of them in one file."""
    with contextlib.suppress(OSError):  # writing the file says it better
        RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}-{begun:%Y-%m-%d-%H%M%S}.json"


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
            "l2_bytes": properties.L2_cache_size, "cuda": torch.version.cuda, "hip": torch.version.hip,
        }  # fmt: skip
    return found


def _said(result: dict[str, Any]) -> str:
    if result["passed"] is None:
        return str(result["skipped"])
    if "error" in result:
        return str(result["error"])
    if "unequal" in result:
        return "the same bits" if not result["unequal"] else f"other bits: {', '.join(result['unequal'])}"
    worst = max((each[1] for each in result["errors"].values()), default=0.0)
    return f"largest error {worst:.1e}"


def _is_wrong(ours: str, each: dict[str, Any]) -> bool:
    """Whether we failed in a case, or a peer that computes the same function disagrees."""
    failed = any(key.split()[0] in (ours, "all") and why != LATE.error for key, why in each["notes"].items())
    differences = [entry.get("difference_from_nbhd") for entry in each.get("contenders", {}).values()]
    return failed or any(found is not None and not found["agrees"] for found in differences)


def _summary(each: dict[str, Any]) -> str:
    """A line: our times and the peers' ratios to them, by graphs where there are some."""
    for kind in ("graph", "eager"):
        ms = each.get(kind, {}).get("nbhd_ms", {})
        if ms.keys() == {"forward", "both"}:
            peers = " ".join(
                f"{name} {ratio['forward']:.2f}x {ratio['both']:.2f}x"
                for name, ratio in each[kind]["ratios"].items()
                if name != each["first"] and ratio.keys() == ms.keys()
            )
            return f"{ms['forward']:.3f} ms, with backward {ms['both']:.3f} ms ({kind})  {peers}"
    return f"no result: {each['notes']}"


def _refuse(why: str) -> int:
    print(f"gpu-check: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
