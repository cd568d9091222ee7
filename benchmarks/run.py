"""A run: every case that was asked for, and what the machine is. The result is plain data for one JSON file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks import cases, ceilings, checks, flops, machine, memory, models
from benchmarks.cases import Case
from benchmarks.models import ModelCase
from benchmarks.peers import PEERS
from benchmarks.sampling import QUICK, Pace, interleave
from benchmarks.subject import NotHere, Subject

FORMAT = 1

#: What takes long before its first sample; a quick run has it only by name.
SLOW_TO_START = ("flex-compiled", "natten")

#: Peers that are timed at one thread too; the others, many times slower, only at the largest number.
AT_EVERY_NUMBER_OF_THREADS = (*cases.SWIN, "nbhd-float32", "nbhd-undilated", "nbhd-56x56")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to run.

    Args:
        cases: names in ``cases.CASES`` and ``models.CASES``.
        threads: numbers of threads, ascending.
        seconds: what all of it should take; every case gets its part by weight. Ignored by a quick run.
        peers: only these beside ours; None for all of a case's.
        is_quick: small maps, two rounds: to see that everything runs.
        measures_memory: peak memory where a case has it.
    """

    cases: list[str]
    threads: tuple[int, ...]
    seconds: float
    peers: frozenset[str] | None = None
    is_quick: bool = False
    measures_memory: bool = True


def registry() -> dict[str, Case | ModelCase]:
    """Every case by name."""
    return {**cases.CASES, **models.CASES}


def run(request: Request, say: Say) -> dict[str, Any]:
    """Run it. ``say`` gets a line on every step, and on everything that failed.

    Returns:
        The run, for ``json``; ``failures`` is ``{case: reason}``.
    """
    known = registry()
    todo = [known[name] for name in request.cases]
    started, load = time.monotonic(), machine.load_average()
    found: dict[str, Any] = {
        "format": FORMAT,
        "is_quick": request.is_quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "environment": machine.environment(),
        "threads": list(request.threads),
        "ceilings": ceilings.measure(request.threads, request.is_quick),
        "ceilings_meaning": ceilings.MEANING,
        "results": [],
        "failures": {},
    }
    left = sum(case.weight for case in todo)
    for i, case in enumerate(todo, 1):
        remaining = request.seconds - (time.monotonic() - started)
        pace = QUICK if request.is_quick else Pace(seconds=max(0.0, remaining) * case.weight / left)
        left -= case.weight
        say(f"[{i}/{len(todo)}] {case.name}")
        try:
            which = case.small() if request.is_quick else case
            one = _model(which, request, pace) if isinstance(which, ModelCase) else _attention(which, request, pace)
            found["results"].append(one)
        except Exception as error:
            reason = str(error) if isinstance(error, checks.Wrong) else f"{type(error).__name__}: {error}"
            found["failures"][case.name] = reason
            say(f"{case.name} failed: {reason}")
            continue
        for name, reason in found["results"][-1]["failed_peers"].items():
            found["failures"][f"{case.name} {name}"] = reason
            say(f"{case.name}: {name} failed: {reason}")
    found["seconds"] = round(time.monotonic() - started, 1)
    found["load_average"] = {"before": load, "after": machine.load_average()}
    return found


def _attention(case: Case, request: Request, pace: Pace) -> dict[str, Any]:
    threads = request.threads[:1] if case.single_threaded else request.threads
    errors = {"nbhd": checks.check_ours(case)}
    torch.set_num_threads(threads[-1])
    ours = PEERS["nbhd"](case)
    assert ours.output is not None
    expected = ours.output()
    subjects, skipped, failed = [ours], {}, {}
    for name in case.peers:
        if request.peers is not None and name not in request.peers:
            continue
        if request.is_quick and name in SLOW_TO_START and request.peers is None:
            skipped[name] = "it takes longer to start than a quick run does; name it with --peer"
            continue
        try:
            subject = PEERS[name](case)
            error = checks.check_peer(subject, expected)
        except NotHere as reason:
            skipped[name] = str(reason)
            continue
        except Exception as fault:
            failed[name] = f"{type(fault).__name__}: {fault}"
            continue
        if name not in AT_EVERY_NUMBER_OF_THREADS:
            subject.only_at = threads[-1]
        subjects.append(subject)
        if error is not None:
            errors[name] = error
    del expected
    return {
        "name": case.name,
        "kind": "attention",
        "case": dataclasses.asdict(case),
        "first": "nbhd",
        "units": {subject.name: subject.units for subject in subjects},
        "useful_flop": {"forward": flops.forward_flop(case), "backward": flops.backward_flop(case)},
        "largest_error": errors,
        "skipped": skipped,
        "failed_peers": failed,
        "notes": {subject.name: subject.notes for subject in subjects if subject.notes},
        "samples": interleave(subjects, threads, pace, "nbhd"),
        "peak_bytes": _memory(case, subjects, request) if case.measures_memory else {},
    }


def _model(case: ModelCase, request: Request, pace: Pace) -> dict[str, Any]:
    threads = request.threads[-1:]
    torch.set_num_threads(threads[-1])
    subjects, skipped, failed = [], {}, {}
    for name in case.networks:
        if request.peers is not None and name not in request.peers and name != case.networks[0]:
            continue
        try:
            subjects.append(models.prepare(name, case))
        except NotHere as reason:
            skipped[name] = str(reason)
        except Exception as fault:
            failed[name] = f"{type(fault).__name__}: {fault}"
    if not subjects or subjects[0].name != case.networks[0]:
        if case.networks[0] in failed:
            raise RuntimeError(failed[case.networks[0]])
        subjects = []
    return {
        "name": case.name,
        "kind": "model",
        "case": dataclasses.asdict(case),
        "first": case.networks[0],
        "units": {subject.name: subject.units for subject in subjects},
        "useful_flop": models.useful_flop(case),  # of our network
        "largest_error": {},
        "skipped": skipped,
        "failed_peers": failed,
        "notes": {subject.name: subject.notes for subject in subjects if subject.notes},
        "samples": interleave(subjects, threads, pace, case.networks[0]) if subjects else {},
        "peak_bytes": _memory(case, subjects, request),
    }


def _memory(case: Case | ModelCase, subjects: list[Subject], request: Request) -> dict[str, dict[str, Any]]:
    """``{subject: {run: bytes, or why not}}``."""
    reason = memory.why_not()
    if not request.measures_memory:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        for run_name in subject.runs:
            entry = found.setdefault(subject.name, {})
            if reason is not None:
                entry[run_name] = reason
            elif subject.is_compiled:
                entry[run_name] = "the compiler's memory would be measured too"
            else:
                try:
                    entry[run_name] = memory.measure(case, subject.name, run_name, request.threads[-1])
                except RuntimeError as error:
                    entry[run_name] = str(error)
    return found
