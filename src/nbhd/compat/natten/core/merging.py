"""Attention over a union of keys from attention over its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nbhd.compat.natten.core.signature import Signature

_SIGNATURE = Signature(
    "0.20 and later",
    "merge_attentions",
    "(outputs, lse_tensors): two or more outputs [batch, tokens, heads, dim] and their log-sum-exps "
    "[batch, tokens, heads]",
)


def merge(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the union of any number of disjoint sets of keys.

        lse = logsumexp_b(lse_b)        out = sum_b exp(lse_b - lse) * out_b

    in float32 (float64 for float64), the output in the dtype of ``outputs[0]``. Ordinary differentiable arithmetic: the
    gradient reaches each part through its output and through its log-sum-exp, and no input is written to.

    Raises:
        ArgumentError: fewer than two parts, or shapes that do not match.
    """
    if not isinstance(outputs, Sequence) or not isinstance(lse_tensors, Sequence):
        raise _SIGNATURE.error("Got something else than two lists.")
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise _SIGNATURE.error(f"Got {len(outputs)} outputs and {len(lse_tensors)} log-sum-exps.")
    for out, lse in zip(outputs, lse_tensors, strict=True):
        if not isinstance(out, Tensor) or not isinstance(lse, Tensor):
            raise _SIGNATURE.error("Got something else than tensors in the lists.")
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1] or out.ndim < 3:
            shapes = [(tuple(o.shape), tuple(s.shape)) for o, s in zip(outputs, lse_tensors, strict=True)]
            raise _SIGNATURE.error(f"All parts must have one shape, got {shapes}.")
    exact = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(exact) for lse in lse_tensors])
    # A query none of whose parts has a key: output 0, log-sum-exp minus infinity, and no NaN in the gradients.
    empty = (parts == -math.inf).all(0)
    parts = parts.masked_fill(empty, 0.0)
    merged = torch.logsumexp(parts, 0)
    weights = torch.exp(parts - merged)[..., None]
    total = weights[0] * outputs[0].to(exact)
    for weight, out in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * out.to(exact)
    total = total.masked_fill(empty[..., None], 0.0)
    return total.to(outputs[0].dtype), merged.masked_fill(empty, -math.inf)
