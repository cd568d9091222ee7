"""Triton kernels for GPUs: NVIDIA (CUDA), AMD (ROCm) and Intel (XPU). Compiled at first use, no build step.

Triton is imported only when a kernel is to run. How the kernels work and what was measured: ``docs/gpu.md``.
Environment: under ``TRITON_INTERPRET=1`` Triton's interpreter runs them on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from nbhd.backends import Call
from nbhd.geometry import Neighborhood
from nbhd.qkv import Three

NAME = "triton"

#: The oldest Triton the kernels are checked with.
OLDEST = (3, 6)
#: Names under which distributions carry the package `triton`.
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")
_DEVICES = ("cuda", "xpu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_CHANNELS = 256
_REMEDY = "Install PyTorch 2.11 or newer for this GPU, which brings Triton 3.6."


@functools.cache
def why_unusable() -> str | None:
    """Why the kernels cannot run on this machine, or None. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed. {_REMEDY}"
    installed = version()
    if installed is not None and installed[:2] < OLDEST:
        found, oldest = ".".join(map(str, installed)), ".".join(map(str, OLDEST))
        return f"Triton {found} is too old, {oldest} is needed. {_REMEDY}"
    return None


@functools.cache
def version() -> tuple[int, ...] | None:
    """The installed Triton's version, None where it cannot be told. Does not import Triton."""
    for name in _DISTRIBUTIONS:
        try:
            found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
        if found is not None:
            return tuple(int(part or 0) for part in found.groups())
    return None


def asks_for_interpreter() -> bool:
    """Whether the environment has Triton run its kernels in its interpreter. Does not import Triton."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


def why_not(call: Call) -> str | None:
    """Why the kernels cannot run this call, or None."""
    query, value = call.query, call.value
    if query.device.type not in _DEVICES and not asks_for_interpreter():
        return "the triton backend runs on CUDA, ROCm and XPU tensors."
    if query.dtype not in _DTYPES:
        return f"the triton backend takes float32, bfloat16 and float16, not {query.dtype}."
    if query.shape[-1] > _MOST_CHANNELS or value.shape[-1] > _MOST_CHANNELS:
        return f"the triton backend takes heads of up to {_MOST_CHANNELS} channels."
    if query.device.type == "cuda" and torch.version.hip is None and _capability(query.device.index or 0) < (8, 0):
        return "the triton backend needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer."
    return None


@functools.lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def forward(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as :mod:`nbhd.backends` describes."""
    from nbhd.backends.triton import attention

    with _on(query):
        return attention.run_forward(query, key, value, rel_pos_bias, neighborhood, scale)


def backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None,
    out: Tensor, lse: Tensor, neighborhood: Neighborhood, scale: float, into: Three | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value and bias, as :mod:`nbhd.backends` describes. The same bits at every call."""
    from nbhd.backends.triton import attention

    with _on(query):
        return attention.run_backward(
            d_out, d_lse, query, key, value, rel_pos_bias, out, lse, neighborhood, scale, into
        )  # fmt: skip


def scores(query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float) -> Tensor:
    """``[batch, *spatial, heads, slots]`` scores before the softmax, minus infinity in unused slots."""
    from nbhd.backends.triton import unfused

    with _on(query):
        return unfused.run_scores(query, key, rel_pos_bias, neighborhood, scale)


def scores_backward(
    d_scores: Tensor, query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and bias."""
    from nbhd.backends.triton import unfused

    with _on(query):
        return unfused.run_scores_backward(d_scores, query, key, rel_pos_bias, neighborhood, scale)


def weighted_sum(weights: Tensor, value: Tensor, neighborhood: Neighborhood) -> Tensor:
    """``[batch, *spatial, heads, dim_v]``: each query's weights times the values of its window."""
    from nbhd.backends.triton import unfused

    with _on(value):
        return unfused.run_weighted_sum(weights, value, neighborhood)


def weighted_sum_backward(
    d_out: Tensor, weights: Tensor, value: Tensor, neighborhood: Neighborhood
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and value."""
    from nbhd.backends.triton import unfused

    with _on(value):
        return unfused.run_weighted_sum_backward(d_out, weights, value, neighborhood)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """The tensor's device as the current one: Triton launches there."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu":
        return torch.xpu.device(tensor.device)
    return nullcontext()
