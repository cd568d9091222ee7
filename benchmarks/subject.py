"""A subject: something that is timed, ready to be called."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class NotHere(Exception):
    """A peer that cannot run a case, or not on this machine. The text is the reason that the report gives."""


#: Calls a function ``repeats`` times; seconds a call for each thing it measures.
Run = Callable[[int], dict[str, float]]


@dataclass
class Subject:
    """Something to time.

    Args:
        name: as in the report.
        runs: the ways to run it, by name; each measures one or more quantities.
        units: what its time is divided by before it is compared with another subject's: queries, or images.
        output: the result in the layout of ``nbhd``, to be checked; None if it is another function (Swin's windows).
        gradients: of its leaves, for the gradient of ``output``.
        once: runs the named way once and gives back every tensor that it returns, for the memory measurement.
        only_at: the one number of threads it may run with; None for any.
        notes: run -> why it has none of this name.
        is_compiled: needs a compiler at run time, whose memory is not told from its own.
    """

    name: str
    runs: dict[str, Run]
    units: int
    output: Callable[[], Tensor] | None = None
    gradients: Callable[[Tensor], list[Tensor]] | None = None
    once: Callable[[str], list[Tensor]] | None = None
    only_at: int | None = None
    notes: dict[str, str] | None = None
    is_compiled: bool = False


def attention_subject(
    name: str,
    call: Callable[[], Tensor],
    leaves: list[Tensor],
    units: int,
    in_our_layout: Callable[[Tensor], Tensor] | None,
    backward: str | None = None,
) -> Subject:
    """A subject out of a function from leaves (that require gradients) to an output.

    It is timed without gradients (``forward``) and with them: recording (``recording``) and ``backward`` apart, in one
    go, the gradients of all leaves being asked for.

    Args:
        in_our_layout: brings the output to ``[batch, *spatial, heads, dim]``; None where it is another function.
        backward: why there is no backward; None where there is one.
    """
    with torch.no_grad():
        shape = call()
    d_out = torch.randn(shape.shape, generator=torch.Generator().manual_seed(1)).to(shape.dtype)
    del shape

    def forward(repeats: int) -> dict[str, float]:
        with torch.no_grad():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return {"forward": (time.perf_counter() - start) / repeats}

    def training(repeats: int) -> dict[str, float]:
        recording = backward = 0.0
        for _ in range(repeats):
            start = time.perf_counter()
            out = call()
            between = time.perf_counter()
            gradients = torch.autograd.grad(out, leaves, d_out)
            end = time.perf_counter()
            recording += between - start
            backward += end - between
            del out, gradients
        return {"recording": recording / repeats, "backward": backward / repeats}

    def once(run: str) -> list[Tensor]:
        if run == "forward":
            with torch.no_grad():
                return [call()]
        out = call()
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    def output() -> Tensor:
        assert in_our_layout is not None
        with torch.no_grad():
            return in_our_layout(call())

    def gradients(d_output: Tensor) -> list[Tensor]:
        assert in_our_layout is not None
        return list(torch.autograd.grad(in_our_layout(call()), leaves, d_output))

    runs: dict[str, Run] = {"forward": forward}
    if backward is None:
        runs["training"] = training
    return Subject(
        name,
        runs,
        units,
        output=None if in_our_layout is None else output,
        gradients=None if in_our_layout is None else gradients,
        once=once,
        notes=None if backward is None else {"training": backward},
    )
