"""Interleaved samples: in each round every subject is timed once at each number of threads, in a new order.

A pair of samples of one round saw the same machine, so ratios are taken within rounds. ``torch.mm`` is timed in each
round at each number of threads: that is the rate shares are taken of.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.subject import Run, Subject

#: Rows and columns of the product that sets the pace: out of the second-level caches, 2 GFLOP.
MM_SIZE = 1024


@dataclass(frozen=True)
class Pace:
    """How much is sampled.

    Args:
        seconds: what all rounds of one case should take together.
        sample_s: a sample is as many calls as take this long.
        least_rounds, most_rounds: limits, whatever the seconds say.
        slow_s: a call that takes longer is made in one round alone: PyTorch's 16 bits take a minute for a training step
            on processors that have no instructions for them.
        mm_size: rows and columns of the product.
    """

    seconds: float = 4.0
    sample_s: float = 0.01
    least_rounds: int = 3
    most_rounds: int = 30
    slow_s: float = 15.0
    mm_size: int = MM_SIZE


#: Two short rounds: the numbers mean nothing.
QUICK = Pace(seconds=0.0, sample_s=0.0, least_rounds=2, most_rounds=2, mm_size=64)


@dataclass
class _Task:
    threads: int
    subject: str
    run: str
    call: Run
    repeats: int = 1
    cost: float = 0.0  # seconds a sample
    rounds: int = 0


def interleave(subjects: list[Subject], threads: tuple[int, ...], pace: Pace, first: str) -> dict[str, Any]:
    """Time all subjects against each other.

    Args:
        first: the subject the others are compared with. Each run takes part in as many rounds as its time allows, but
            in none without the same run of the first one.

    Returns:
        ``{threads: {"mm_flop_per_s": [...], "subjects": {name: {quantity: [seconds a call, or None where a round was
        left out]}}, "repeats": {name: {run: calls a sample}}}}``, one entry a round.
    """
    before = torch.get_num_threads()
    tasks = [
        _Task(t, subject.name, name, run)
        for t in threads
        for subject in subjects
        if subject.only_at in (None, t)
        for name, run in subject.runs.items()
    ]
    with _quiet_collector():
        try:
            rounds = _plan(tasks, threads, pace, first)
            return _rounds(tasks, threads, rounds, pace.mm_size)
        finally:
            torch.set_num_threads(before)


def _plan(tasks: list[_Task], threads: tuple[int, ...], pace: Pace, first: str) -> int:
    """Warm everything up, and decide how often each task runs. Returns the number of rounds."""
    for t in threads:
        torch.set_num_threads(t)
        matrix_product_rate(pace.mm_size)
        for task in tasks:
            if task.threads != t:
                continue
            start = time.perf_counter()
            task.call(1)
            if time.perf_counter() - start < 1.0:
                start = time.perf_counter()
                task.call(1)
            task.repeats = max(1, round(pace.sample_s / max(time.perf_counter() - start, 1e-7)))
            if task.repeats > 1:  # a single short call says little
                start = time.perf_counter()
                task.call(task.repeats)
                each = (time.perf_counter() - start) / task.repeats
                task.repeats = max(1, round(pace.sample_s / max(each, 1e-7)))
                task.cost = each * task.repeats
            else:
                task.cost = time.perf_counter() - start
    budget = pace.seconds / max(1, len(tasks))
    for task in tasks:
        least = pace.least_rounds if task.cost < pace.slow_s else 1
        task.rounds = min(pace.most_rounds, max(least, int(budget / max(task.cost, 1e-9))))
    limits = {(task.threads, task.run): task.rounds for task in tasks if task.subject == first}
    for task in tasks:
        task.rounds = min(task.rounds, limits.get((task.threads, task.run), pace.least_rounds))
    return max(task.rounds for task in tasks)


def spread_out(rounds: int) -> list[int]:
    """The rounds in an order of which every beginning is spread over all of them: 0, 4, 2, 6, 1, ... for eight.

    A run that takes part in ``n`` rounds takes the first ``n``, so the rounds of a rarer one are among those of any
    more frequent one.
    """
    bits = max(1, (rounds - 1).bit_length())
    return sorted(range(rounds), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))


def _rounds(tasks: list[_Task], threads: tuple[int, ...], rounds: int, mm_size: int) -> dict[str, Any]:
    order = random.Random(0)
    found: dict[str, Any] = {
        str(t): {
            "mm_flop_per_s": [],
            "subjects": {task.subject: {} for task in tasks if task.threads == t},
            "repeats": {},
        }
        for t in threads
    }
    for task in tasks:
        found[str(task.threads)]["repeats"].setdefault(task.subject, {})[task.run] = task.repeats
    rank = {i: place for place, i in enumerate(spread_out(rounds))}
    for i in range(rounds):
        for t in order.sample(threads, len(threads)):
            torch.set_num_threads(t)
            here = found[str(t)]
            here["mm_flop_per_s"].append(matrix_product_rate(mm_size))
            mine = [task for task in tasks if task.threads == t]
            for task in order.sample(mine, len(mine)):
                if rank[i] >= task.rounds:
                    continue
                for quantity, seconds in task.call(task.repeats).items():
                    row = here["subjects"][task.subject].setdefault(quantity, [None] * rounds)
                    row[i] = seconds
    return found


_operands: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}


def matrix_product_rate(size: int = MM_SIZE, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of one ``torch.mm`` of square matrices at the current number of threads."""
    if (size, dtype) not in _operands:
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        _operands[size, dtype] = (a, b, torch.empty_like(a))
    a, b, c = _operands[size, dtype]
    start = time.perf_counter()
    torch.mm(a, b, out=c)
    return 2 * size**3 / (time.perf_counter() - start)


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection in a sample."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def best_of(call: Callable[[], float], times: int) -> list[float]:
    """``times`` results of ``call`` after one that does not count."""
    call()
    return [call() for _ in range(times)]
