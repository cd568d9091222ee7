"""NATTEN, where it is installed: the unfused functions of 0.15 to 0.17, ``na1d/na2d/na3d`` from 0.20 on."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.inputs import Inputs, tensors
from benchmarks.subject import NotHere, Subject, attention_subject

Prepared = tuple[Callable[[], Tensor], list[Tensor]]


def prepare(case: Case) -> Subject:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns when it was built without CUDA
            version = importlib.import_module("natten").__version__
            functional = importlib.import_module("natten.functional")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "natten"
        raise NotHere("NATTEN is not installed" if missing else f"NATTEN does not import: {error}") from None
    inputs = tensors(case)
    is_unfused = hasattr(functional, f"na{len(case.spatial)}d_qk")
    call, leaves = (_unfused if is_unfused else _fused)(functional, version, case, inputs)
    try:
        with torch.no_grad():
            call()
    except Exception as error:
        raise NotHere(f"NATTEN {version} refuses it: {_first_line(error)}") from None
    backward = None
    try:
        torch.autograd.grad(call().float().sum(), leaves)
    except Exception as error:
        backward = f"no backward here: {_first_line(error)}"

    def in_our_layout(out: Tensor) -> Tensor:
        return out.movedim(1, -2) if is_unfused else out

    return attention_subject("natten", call, leaves, case.queries, in_our_layout, backward=backward)


def _unfused(functional: ModuleType, version: str, case: Case, inputs: Inputs) -> Prepared:
    """Scores and weighted sum, heads first, the query scaled by the caller."""
    axes = len(case.spatial)
    if any(s != 1 for s in case.stride):
        raise NotHere(f"NATTEN {version} has no stride")
    qk, av = getattr(functional, f"na{axes}d_qk"), getattr(functional, f"na{axes}d_av")
    scale, options = case.head_dim**-0.5, {"kernel_size": case.kernel_size, "dilation": case.dilation}
    if any(case.is_causal):
        options["is_causal"] = case.is_causal  # since 0.17
    # Models of that era bring projections to heads first before the call; that is not timed.
    query, key, value = (t.detach().movedim(-2, 1).contiguous().requires_grad_() for t in inputs[:3])

    def call() -> Tensor:
        weights: Tensor = qk(query * scale, key, rpb=inputs.bias, **options).softmax(-1)
        out: Tensor = av(weights, value, **options)
        return out

    return call, [t for t in (query, key, value, inputs.bias) if t is not None]


def _fused(functional: ModuleType, version: str, case: Case, inputs: Inputs) -> Prepared:
    """Heads last, no bias."""
    if inputs.bias is not None:
        raise NotHere(f"NATTEN {version} has no relative position bias")
    operator = getattr(functional, f"na{len(case.spatial)}d")

    def call() -> Tensor:
        # On the CPU it refuses tensors that require gradients even where none are recorded.
        query, key, value = (t if torch.is_grad_enabled() else t.detach() for t in inputs[:3] if t is not None)
        out: Tensor = operator(
            query, key, value,
            kernel_size=case.kernel_size, stride=case.stride, dilation=case.dilation, is_causal=case.is_causal,
        )  # fmt: skip
        return out

    return call, inputs.leaves


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
