"""A result is right before it is fast."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.peers import ours
from benchmarks.peers.inputs import tensors
from benchmarks.subject import NotHere, Subject

#: Largest error allowed, for outputs of standard normal values: what separates another order of sums from a fault.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class Wrong(Exception):
    """A result that is not what it should be."""


def check_ours(case: Case) -> float:
    """Compare output and gradients on a small map with the reference in float64; returns the largest error.

    Raises:
        Wrong: it is too large.
    """
    small = case.small()
    operator = ours.OPERATORS[len(case.spatial)]
    mine = tensors(small)
    truth = [None if t is None else t.detach().double().requires_grad_() for t in mine]
    results = []
    for (query, key, value, bias), backend in ((mine, "auto"), (truth, "reference")):
        assert query is not None and key is not None and value is not None
        out = operator(
            query, key, value, small.kernel_size, small.stride, small.dilation, small.is_causal,
            rel_pos_bias=bias, backend=backend,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(small.torch_dtype).to(out.dtype)
        leaves = [t for t in (query, key, value, bias) if t is not None]
        results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    worst = 0.0
    for got, expected in zip(*([t.detach() for t in result] for result in results), strict=True):
        scale = max(1.0, float(expected.abs().max()))
        worst = max(worst, float((got.double() - expected).abs().max()) / scale)
    if not worst <= TOLERANCE[case.torch_dtype]:
        raise Wrong(f"nbhd is wrong on a small map of this case: error {worst:.2g}")
    return worst


def check_peer(subject: Subject, expected: torch.Tensor) -> float | None:
    """The largest difference between a peer's output and ours; None for another function.

    Raises:
        NotHere: it is too large to call it the same function.
    """
    if subject.output is None:
        return None
    got = subject.output()
    if got.shape != expected.shape:
        raise NotHere(f"it computes something else: {tuple(got.shape)} instead of {tuple(expected.shape)}")
    error = float((got.float() - expected.float()).abs().max())
    if not error <= TOLERANCE[expected.dtype]:
        raise NotHere(f"it computes something else: it differs by {error:.2g}")
    return error
