"""``merge_attentions`` of NATTEN: `nbhd.merge_attentions`, with the errors of a stand-in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nbhd.compat.natten.core.signature import Signature
from nbhd.errors import ArgumentError
from nbhd.merging import merge_attentions

_SIGNATURE = Signature(
    "0.20 and later",
    "merge_attentions",
    "(outputs, lse_tensors): two or more outputs [batch, tokens, heads, dim] and their log-sum-exps "
    "[batch, tokens, heads]",
)


def merge(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the union of any number of disjoint sets of keys.

    Raises:
        ArgumentError: fewer than two parts, or shapes that do not match.
    """
    try:
        return merge_attentions(outputs, lse_tensors)
    except ArgumentError as error:
        raise _SIGNATURE.error(str(error)) from None
