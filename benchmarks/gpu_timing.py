"""Times and memory on the device: CUDA events, contenders interleaved round by round, medians.

Without a GPU the same code runs on the processor's clock and sees no memory, so that tests can go through it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import flops, gpu_layers, gpu_peers
from benchmarks.cases import Case
from benchmarks.gpu_peers import Contender
from benchmarks.subject import NotHere

#: A sample is as many calls as take this long.
SAMPLE_SECONDS = 0.02
ROUNDS = 7

PEERS = {**gpu_peers.PEERS, **gpu_layers.PEERS}


def forward(contender: Contender) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return contender.call()

    return run


def both(contender: Contender) -> Callable[[], object]:
    """Forward with its graph, then the gradients of all leaves."""
    gradient: list[Tensor] = []

    def run() -> object:
        out = contender.call()
        if not gradient:
            gradient.append(torch.ones_like(out))
        return torch.autograd.grad(out, contender.leaves, gradient[0])

    return run


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begun) * 1e3 / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def first_call(run: Callable[[], object]) -> float:
    """Seconds of a call, compilation and all."""
    _wait()
    begun = time.monotonic()
    run()
    _wait()
    return time.monotonic() - begun


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that a call held beyond what was there before it: whatever else lies on the device does not count."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, names: list[str], device: torch.device, rounds: int = ROUNDS) -> dict[str, Any]:
    """Samples in ms of every contender's forward and forward plus backward, interleaved; first calls; peaks.

    The first name is ours: the others are held against it.
    """
    first = names[0]
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    found: dict[str, Any] = {"first": first, "contenders": {}, "notes": {}}
    outputs = {}
    for name in names:
        try:
            contender = PEERS[name](case, device)
            each = {"forward": forward(contender), "both": both(contender)}
            entry: dict[str, Any] = {"first_call_seconds": {}, "peak_bytes": {}, "ms": {}}
            for how, run in each.items():
                entry["first_call_seconds"][how] = first_call(run)
                entry["peak_bytes"][how] = peak_bytes(run)
            if contender.comparable is not None:
                with torch.no_grad():
                    outputs[name] = contender.comparable(contender.call()).float()
        except NotHere as reason:
            found["notes"][name] = str(reason)
            continue
        except Exception as error:  # a peer that fails is a result too
            found["notes"][name] = why(error)
            free()
            continue
        found["contenders"][name] = entry
        runs |= {(name, how): run for how, run in each.items()}
    for name, out in outputs.items():
        if name != first and first in outputs:
            found["contenders"][name]["largest_difference_from_nbhd"] = (out - outputs[first]).abs().max().item()
    del outputs
    repeats = {key: max(1, int(SAMPLE_SECONDS * 1e3 / max(1e-3, milliseconds(run, 1)))) for key, run in runs.items()}
    for _ in range(rounds):
        for (name, how), run in runs.items():
            sample = milliseconds(run, repeats[name, how])
            found["contenders"][name]["ms"].setdefault(how, []).append(sample)
    ours = found["contenders"].get(first)
    if ours is not None:
        ms = {how: statistics.median(samples) for how, samples in ours["ms"].items()}
        found["nbhd_ms"] = ms
        if first == "nbhd":
            found["useful_tflops"] = {"forward": flops.forward_flop(case) / ms["forward"] / 1e9}
            bytes_forward = 4 * case.queries * case.head_dim * case.torch_dtype.itemsize
            found["memory_floor_bytes"] = {"forward": bytes_forward, "both": bytes_forward * 3}
        found["ratios"] = {
            name: {how: statistics.median(samples) / ms[how] for how, samples in entry["ms"].items()}
            for name, entry in found["contenders"].items()
        }
        # what ours takes of a peer's memory: less than 1 is less
        found["peak_ratios"] = {
            name: {how: ours["peak_bytes"][how] / peak for how, peak in entry["peak_bytes"].items() if peak > 0}
            for name, entry in found["contenders"].items()
        }
    return found


def why(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def free() -> None:
    """Give cached memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
