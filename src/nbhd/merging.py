"""`merge_attentions`: attention over a union of keys from attention over its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nbhd.backends.reference import accumulation_dtype
from nbhd.errors import ArgumentError


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention of several over different keys, as if all keys had been in one softmax.

        lse = logsumexp_b(lse_b)        out = sum_b exp(lse_b - lse) * out_b

    Ordinary differentiable arithmetic: gradients reach each part through its output and its log-sum-exp, and no input
    is written to. A part in which a query has no keys has output 0 and log-sum-exp minus infinity there.

    Args:
        outputs: two or more ``[batch, *spatial, heads, dim]``, from the same queries over disjoint sets of keys.
        lses: as many ``[batch, *spatial, heads]``, natural logarithm, as `na2d` returns with ``return_lse``.

    Returns:
        Output, in the dtype of ``outputs[0]``, and log-sum-exp, in float32 (float64 for float64), in which sums run.

    Raises:
        ArgumentError: fewer than two parts, or shapes that do not match (a ``ValueError``).
    """
    if not isinstance(outputs, Sequence) or not isinstance(lses, Sequence):
        raise ArgumentError("outputs and lses must be two lists of tensors. Got something else than two lists.")
    if len(outputs) < 2 or len(outputs) != len(lses):
        raise ArgumentError(
            "outputs and lses must be of two parts or more, and of as many. "
            f"Got {len(outputs)} outputs and {len(lses)} log-sum-exps."
        )
    for out, lse in zip(outputs, lses, strict=True):
        if not isinstance(out, Tensor) or not isinstance(lse, Tensor):
            raise ArgumentError("outputs and lses must hold tensors. Got something else than tensors in the lists.")
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1] or out.ndim < 3:
            shapes = [(tuple(o.shape), tuple(s.shape)) for o, s in zip(outputs, lses, strict=True)]
            raise ArgumentError(
                "outputs must be [batch, *spatial, heads, dim] and lses [batch, *spatial, heads]. "
                f"All parts must have one shape, got {shapes}."
            )
    exact = accumulation_dtype(outputs[0].dtype)
    parts = torch.stack([lse.to(exact) for lse in lses])
    # A query none of whose parts has a key: output 0, log-sum-exp minus infinity, and no NaN in the gradients.
    is_empty = (parts == -math.inf).all(0)
    parts = parts.masked_fill(is_empty, 0.0)
    merged = torch.logsumexp(parts, 0)
    weights = torch.exp(parts - merged).masked_fill(is_empty, 0.0)[..., None]
    total = weights[0] * outputs[0].to(exact)
    for weight, out in zip(weights[1:], outputs[1:], strict=True):
        total = torch.addcmul(total, weight, out.to(exact))
    return total.to(outputs[0].dtype), merged.masked_fill(is_empty, -math.inf)
