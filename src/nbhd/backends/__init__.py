"""Backends: which one runs a call.

A backend is a module with

    NAME                    as in ``backend="..."``
    why_unusable()          None, or why it cannot run on this machine at all
    why_not(call)           None, or why it cannot run this call
    forward(query, key, value, rel_pos_bias, neighborhood, scale) -> (out, lse)
    backward(d_out, d_lse, query, key, value, rel_pos_bias, out, lse, neighborhood, scale, into=None)
                            -> (d_query, d_key, d_value, d_rel_pos_bias or None)

and may have

    prepare(query, key, value, neighborhood, scale)     an object with ``forward(query, key, value, rel_pos_bias,
                            with_lse)`` and ``backward(d_out, ..., out, lse, into)`` for tensors laid out like these
    scores, scores_backward, weighted_sum, weighted_sum_backward      the unfused pair, as the reference has it

Arguments are checked before (``functional``). ``out`` and the gradients are contiguous and have their argument's dtype;
``lse`` is float32 (float64 for float64). ``d_lse`` is None where the log-sum-exp has no gradient. ``into`` are three
tensors that a backend may write the gradients of query, key and value to and return (`nbhd.qkv`). The score gradient is
``dS = P * (dP - (rowsum(P * dP) - d_lse))``.
"""

from __future__ import annotations

import importlib
import math
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from nbhd.errors import ArgumentError, BackendError
from nbhd.geometry import Neighborhood

#: Module of each backend, by name.
MODULES = {
    "reference": "nbhd.backends.reference",
    "cpu": "nbhd.backends.cpu",
    "triton": "nbhd.backends.triton",
}

#: What ``backend="auto"`` tries, best first, for each type of device; other devices take the reference.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),  # ROCm too: PyTorch calls its devices cuda
    "xpu": ("triton", "reference"),
}

#: Scores (batch * positions * heads * window) from which running on the reference for want of better is said aloud.
LARGE_CALL = 1 << 26


class Call(NamedTuple):
    """What a backend is asked to judge: the tensors and the neighborhood."""

    query: Tensor
    key: Tensor
    value: Tensor
    rel_pos_bias: Tensor | None
    neighborhood: Neighborhood


def load(name: str) -> ModuleType:
    """The backend's module.

    Raises:
        ArgumentError: there is no backend of this name.
    """
    module = _loaded.get(name)
    if module is not None:
        return module
    if name not in MODULES:
        raise ArgumentError(f"backend must be 'auto' or one of {', '.join(map(repr, MODULES))}, got {name!r}.")
    _loaded[name] = importlib.import_module(MODULES[name])
    return _loaded[name]


_loaded: dict[str, ModuleType] = {}


def order(device_type: str) -> tuple[str, ...]:
    """The names ``backend="auto"`` tries on a device type, best first."""
    return ORDER.get(device_type, ("reference",))


def choose(name: str, call: Call) -> ModuleType:
    """The backend that runs ``call``: the named one, or for ``"auto"`` the first that can.

    Raises:
        ArgumentError: there is no backend of this name.
        BackendError: the named backend cannot run the call; the message says why.
    """
    if name != "auto":
        backend = load(name)
        reason = backend.why_unusable() or backend.why_not(call)
        if reason is not None:
            raise BackendError(
                f"backend {name!r} cannot run this call: {reason} Use backend='auto' to take another one."
            )
        return backend
    reasons: list[str] = []
    for candidate in order(call.query.device.type):
        backend = load(candidate)
        reason = backend.why_unusable() or backend.why_not(call)
        if reason is None:
            if candidate == "reference" and reasons:
                _say_once(call, reasons)
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise BackendError(f"no backend can run this call on {call.query.device}: {' '.join(reasons)}")


_said: set[str] = set()


def _say_once(call: Call, reasons: list[str]) -> None:
    # math.prod of plain ints: this runs only on real tensors
    scores = math.prod(call.query.shape[:-1]) * call.neighborhood.slots
    message = " ".join(reasons)
    if scores < LARGE_CALL or message in _said or torch.compiler.is_compiling():
        return
    _said.add(message)
    warnings.warn(f"nbhd runs a large call on the plain PyTorch reference, which is slow. {message}", stacklevel=2)
