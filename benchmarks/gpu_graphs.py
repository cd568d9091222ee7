"""Calls as CUDA graphs: what the device needs for them, without the time in which the host asks for it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu_children


@functools.cache
def _side() -> Any:
    """The stream of all recording. Warming up on it too, so that autograd's nodes belong to it."""
    return torch.cuda.Stream()


def captured(run: Callable[[], Any], warm_up: int = 3) -> Callable[[], Any]:
    """What replays ``run`` on the tensors that it had, and gives its results, which a replay overwrites.

    Before, it is called ``warm_up`` times on the stream of the recording. Without a GPU it is ``run`` itself. Whatever
    stops the recording is raised; the allocator and the random numbers of this process may then still be in a recording
    that has no end, so it takes no further jobs.
    """
    if not torch.cuda.is_available():
        return run
    current, side = torch.cuda.current_stream(), _side()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            run()
    current.wait_stream(side)
    gc.collect()  # so that no older graph is destroyed while this one is recorded
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            results = run()
    except Exception:
        gpu_children.retire()
        torch.cuda.set_stream(current)  # PyTorch leaves its own behind where the end of a recording fails
        raise

    def replay() -> Any:
        graph.replay()
        return results

    return replay
