"""Times and memory on the device: CUDA events, contenders interleaved round by round, medians.

Each contender is timed twice: ``graph``, a replay of a CUDA graph of its calls, which is what the device needs; and
``eager``, the calls as Python makes them, which on small maps is what the host needs. A ratio is of two times of the
same kind. A sample goes through several copies of the tensors that are as large as the map, and keeps every result, so
that no call finds in the L2 what the call before it left there.

Without a GPU the same code runs on the processor's clock, knows no graphs and sees no memory, so that tests can go
through it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import flops, gpu_children, gpu_graphs, gpu_layers, gpu_peers
from benchmarks.cases import Case
from benchmarks.gpu_children import why
from benchmarks.gpu_peers import Contender
from benchmarks.subject import NotHere

#: A sample is as many calls as take this long.
SAMPLE_SECONDS = 0.02
ROUNDS = 7
#: Rounds for what takes longer than a sample should: minutes go to other cases.
FEW_ROUNDS, LONG_SECONDS = 3, 0.25
KINDS = ("graph", "eager")

#: Copies of the inputs are as large as so many times the L2; and most copies.
L2_TIMES = 3
MOST_COPIES = 16

PEERS = {**gpu_peers.PEERS, **gpu_layers.PEERS}

#: A contender's inputs, several times: other tensors with the same values.
Copies = list[list[Tensor]]


def copies(moved_bytes: int, device: torch.device) -> int:
    """How many copies of tensors of so many bytes a sample goes through."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_COPIES, math.ceil(L2_TIMES * cache / moved_bytes)))


def copied(contender: Contender, count: int) -> Copies:
    """The contender's inputs, and ``count - 1`` copies of them."""
    more = [[t.detach().clone().requires_grad_() for t in contender.inputs] for _ in range(count - 1)]
    return [contender.inputs, *more]


def forward(contender: Contender, sets: Copies) -> Callable[[], object]:
    """A call for each set of inputs; all results are kept until the last."""

    def run() -> object:
        with torch.no_grad():
            return [contender.call(*inputs) for inputs in sets]

    return run


def both(contender: Contender, sets: Copies) -> Callable[[], object]:
    """For each set of inputs forward with its graph, then the gradients of all leaves."""
    gradients: list[Tensor] = []

    def run() -> object:
        found = []
        for i, inputs in enumerate(sets):
            out = contender.call(*inputs)
            if i == len(gradients):
                gradients.append(torch.ones_like(out))
            leaves = [*inputs, *contender.parameters]
            found.append((out.detach(), torch.autograd.grad(out, leaves, gradients[i])))
        return found

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


def copy_rate(device: torch.device) -> float:
    """Bytes read and written in a second by a copy of 1 GiB."""
    source = torch.empty(1 << 30 if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds(lambda: target.copy_(source), 2)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), 10) * 1e3


def cold(case: Case, name: str, device: torch.device) -> dict[str, float]:
    """Seconds of the first calls of a process: of use where nothing has been compiled before."""
    contender = PEERS[name](case, device)
    sets = [contender.inputs]
    return {"forward": first_call(forward(contender, sets)), "both": first_call(both(contender, sets))}


def captured_name(name: str) -> str:
    """What ``measure`` calls the recording of a contender's graphs, in ``without`` and in notes."""
    return f"{name} as a graph"


def measure(
    case: Case, names: list[str], device: torch.device, without: dict[str, str] | None = None, *,
    rounds: int = ROUNDS, tell: Callable[[dict[str, Any], str | None], None] = lambda found, doing: None,
) -> dict[str, Any]:  # fmt: skip
    """Samples in ms of every contender's forward and forward plus backward, interleaved; first calls; peaks.

    The first name is ours: the others are held against it. What cannot run is named in ``notes``. An error after which
    this process is of no more use is raised: the caller begins anew ``without`` what ``tell`` was told last.
    """
    first = names[0]
    without = without or {}
    count = copies(3 * case.queries * case.head_dim * case.torch_dtype.itemsize, device)
    found: dict[str, Any] = {"first": first, "input_copies": count, "contenders": {}, "notes": dict(without)}
    runs: dict[tuple[str, str, str], Callable[[], object]] = {}
    outputs = {}
    for name in names:
        if name in without:
            continue
        tell(found, name)
        try:
            contender = PEERS[name](case, device)
            entry: dict[str, Any] = {"first_call_seconds": {}, "peak_bytes": {}, "graph_ms": {}, "eager_ms": {}}
            for how, make in (("forward", forward), ("both", both)):
                one = make(contender, [contender.inputs])
                entry["first_call_seconds"][how] = first_call(one)
                entry["peak_bytes"][how] = peak_bytes(one)
            sets = copied(contender, count)
            each = {(name, how, "eager"): make(contender, sets) for how, make in (("forward", forward), ("both", both))}
            if contender.comparable is not None and len(names) > 1:  # last: who is in here is a contender
                with torch.no_grad():
                    outputs[name] = contender.comparable(contender.call(*contender.inputs)).float()
        except NotHere as reason:
            found["notes"][name] = str(reason)
            continue
        except Exception as error:  # a peer that fails is a result too
            _raise_if_dead(error)
            found["notes"][name] = why(error)
            free()
            continue
        found["contenders"][name] = entry
        runs |= each
    for name, out in outputs.items():
        if name != first and first in outputs:
            found["contenders"][name]["difference_from_nbhd"] = difference(out, outputs[first], case.torch_dtype)
    del outputs
    for name in found["contenders"]:
        label = captured_name(name)
        if label not in without:
            tell(found, label)
            for how in ("forward", "both"):
                runs[name, how, "graph"] = gpu_graphs.captured(runs[name, how, "eager"])
    repeats: dict[tuple[str, str, str], int] = {}
    most: dict[tuple[str, str, str], int] = {}
    for turn in range(rounds):
        for key, run in list(runs.items()):
            name, how, kind = key
            if turn >= most.get(key, rounds):
                continue
            tell(found, name)
            try:
                if key not in repeats:
                    seconds = min(milliseconds(run, 1) for _ in range(2)) / 1e3  # a graph is uploaded at first
                    repeats[key] = max(1, int(SAMPLE_SECONDS / max(1e-6, seconds)))
                    most[key] = FEW_ROUNDS if seconds > LONG_SECONDS or kind == "eager" else rounds
                sample = milliseconds(run, repeats[key]) / count
            except Exception as error:  # out of memory, say: this contender's, and no one else's
                _raise_if_dead(error)
                found["notes"][f"{name} {how} {kind}"] = why(error)
                del runs[key]
                free()
                continue
            found["contenders"][name][f"{kind}_ms"].setdefault(how, []).append(sample)
    summarise(case, found)
    return found


def difference(out: Tensor, ours: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """How far two results of the same function are apart, relative to ``ours``, and whether that is rounding."""
    off, unit = out - ours, torch.finfo(dtype).eps
    rms = (off.norm() / ours.norm()).item()
    largest = (off.abs().max() / ours.abs().max()).item()
    return {"root_mean_square": rms, "largest": largest, "agrees": rms <= 4 * unit and largest <= 16 * unit}


def summarise(case: Case, found: dict[str, Any]) -> None:
    """Add to what ``measure`` found, as far as it came: medians of ours, ratios to it, useful rates."""
    ours = found["contenders"].get(found["first"])
    if ours is None:
        return
    for kind in KINDS:
        ms = {how: statistics.median(samples) for how, samples in ours[f"{kind}_ms"].items()}
        found[kind] = {
            "nbhd_ms": ms,
            "ratios": {
                name: {how: statistics.median(s) / ms[how] for how, s in entry[f"{kind}_ms"].items() if how in ms}
                for name, entry in found["contenders"].items()
            },
        }
        if found["first"] == "nbhd" and "forward" in ms:
            found[kind]["useful_tflops"] = {"forward": flops.forward_flop(case) / ms["forward"] / 1e9}
    if found["first"] == "nbhd":
        bytes_forward = 4 * case.queries * case.head_dim * case.torch_dtype.itemsize
        found["memory_floor_bytes"] = {"forward": bytes_forward, "both": bytes_forward * 3}
    # what ours takes of a peer's memory: less than 1 is less
    found["peak_ratios"] = {
        name: {how: ours["peak_bytes"][how] / peak for how, peak in entry["peak_bytes"].items() if peak > 0}
        for name, entry in found["contenders"].items()
    }


def _raise_if_dead(error: Exception) -> None:
    if not gpu_children.is_usable():
        raise error


def free() -> None:
    """Give cached memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
