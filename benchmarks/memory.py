"""Peak memory of one call, in a process of its own.

A child is forked from a server that has imported everything and run nothing. It warms up on a small map, builds its
inputs, resets the kernel's peak of resident memory (``/proc/self/clear_refs``), runs once and reads the peak
(``VmHWM``). Blocks of 64 KiB and more go back to the system when they are freed (``MALLOC_MMAP_THRESHOLD_``), so the
peak is of memory in use. What is reported for attention is the peak beyond inputs and beyond what the call returns
(the output; in training also the gradients): scratch, scores, whatever is saved for the backward. For a network it is
the peak beyond the process without it: weights, gradients, optimizer state and activations. Good to about 1 MiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.cases import Case
from benchmarks.models import ModelCase

LIMIT_S = 300.0


def why_not() -> str | None:
    """Why peak memory cannot be measured here, or None."""
    if sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK):
        return "it takes Linux's /proc/self/clear_refs"
    return None


def measure(case: Case | ModelCase, subject: str, run: str, threads: int) -> int:
    """Peak bytes of one call, as the module says.

    Raises:
        RuntimeError: the child failed; the text is its reason.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, case, subject, run, threads), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT_S):
            raise RuntimeError(f"it took longer than {LIMIT_S:.0f} s")
        answer = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"its process ended with status {child.exitcode}") from None
    finally:
        if child.is_alive():
            child.join(5)
        if child.is_alive():
            child.kill()
        receiver.close()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return int(answer)


def _context() -> Any:
    """Processes forked from a server with the libraries in it; it alone gets the allocator's settings."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nbhd.models", "benchmarks.peers", "benchmarks.models"])
    before = dict(os.environ)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _child(sender: Connection, case: Case | ModelCase, name: str, run: str, threads: int) -> None:
    import torch

    from benchmarks.subject import NotHere

    torch.set_num_threads(threads)
    try:
        peak = _network(case, name, run) if isinstance(case, ModelCase) else _attention(case, name, run)
        sender.send(peak)
    except NotHere as reason:
        sender.send(str(reason))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _attention(case: Case, name: str, run: str) -> int:
    from benchmarks.peers import PEERS

    def once(which: Case) -> int:
        subject = PEERS[name](which)
        if run not in subject.runs:
            raise RuntimeError((subject.notes or {}).get(run, f"it has no {run}"))
        assert subject.once is not None
        before = _reset_peak()
        returned = subject.once(run)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in returned)
        return max(0, _status("VmHWM") - before - kept)

    once(case.small())
    return once(case)


def _network(case: ModelCase, name: str, run: str) -> int:
    from benchmarks.models import prepare

    small = prepare(name, case.small())
    assert small.once is not None
    small.once(run)
    del small
    before = _reset_peak()
    subject = prepare(name, case)
    assert subject.once is not None
    for _ in range(2):  # the optimizer has its state from the second step on
        subject.once(run)
    return _status("VmHWM") - before


def _reset_peak() -> int:
    """Give free memory back and start a new peak; returns the bytes resident now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
        peak.write("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
