"""Ways to compute local attention, ours among them. A peer is a function from a case to a ``Subject``.

It raises ``NotHere`` with the reason where it cannot run a case. Add one by writing ``prepare(case) -> Subject`` in a
module of its own, a line in ``PEERS``, and its name in the ``peers`` of the cases it belongs to. All peers get the
same query, key, value and bias (``inputs.tensors``), in the layout that their users have them in, and are tuned as
their users would.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import Case
from benchmarks.peers import flex, natten, ours, sdpa, swin, unfold
from benchmarks.subject import Subject

PEERS: dict[str, Callable[[Case], Subject]] = {
    "nbhd": ours.prepare,
    # ours under another condition: what costs what
    "nbhd-float32": ours.prepare_float32,
    "nbhd-undilated": ours.prepare_undilated,
    "nbhd-56x56": ours.prepare_nat_map,
    "nbhd-reference": ours.prepare_reference,
    # others
    "swin-shifted-sdpa": swin.prepare_shifted_sdpa,
    "swin-shifted-eager": swin.prepare_shifted_eager,
    "swin-unshifted-sdpa": swin.prepare_unshifted_sdpa,
    "dense-sdpa": sdpa.prepare,
    "flex-compiled": flex.prepare,
    "unfold": unfold.prepare,
    "natten": natten.prepare,
}

#: What each is, for the tables.
TITLES = {
    "nbhd": "nbhd",
    "nbhd-float32": "nbhd, float32",
    "nbhd-undilated": "nbhd, dilation 1",
    "nbhd-56x56": "nbhd, 56x56 and batch 8 (per query)",
    "nbhd-reference": "nbhd, the plain PyTorch reference",
    "swin-shifted-sdpa": "Swin's shifted window attention, SDPA",
    "swin-shifted-eager": "Swin's shifted window attention, eager",
    "swin-unshifted-sdpa": "Swin's window attention unshifted, SDPA",
    "dense-sdpa": "dense SDPA with mask and bias",
    "flex-compiled": "FlexAttention compiled, mask and bias",
    "unfold": "unfold in plain PyTorch",
    "natten": "NATTEN",
}
