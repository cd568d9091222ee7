"""transformers' DiNAT, which hands the operator a layout that NATTEN does not have.

    transformers      query at natten2dqkrpb                                     what is done here
    4.x               [batch, heads, X, Y, dim], as NATTEN takes it              nothing
    5.0 to 5.4 ...    nothing: its attention fails on every map before that      its forward is replaced
    ... 5.8 to 5.24   [batch, Y, X, heads, dim], heads last and the map turned   its two functions are replaced by ones
                                                                                 that turn it back

Shapes alone cannot tell the layouts apart where Y equals the number of heads. So nothing is guessed from the shapes of
a call: when the module has been imported its attention is run once, on meta tensors whose axes all differ, to see what
it does. What cannot be made out so is refused, call by call.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nbhd.compat.natten.core.unfused_names import plain_av, qkrpb
from nbhd.errors import ArgumentError

#: Batch, X, Y, heads, dim of the trial: no two axes of a layout alike.
_BATCH, _X, _Y, _HEADS, _DIM, _WINDOW = 1, 5, 7, 2, 4, 3

_qkrpb = qkrpb("0.17", __name__, 2)
_av = plain_av("0.17", __name__, 2, "natten2dav")


def settle(module: ModuleType) -> str:
    """Give transformers' DiNAT functions that understand it.

    Args:
        module: ``transformers.models.dinat.modeling_dinat``, already imported.

    Returns:
        What was found: ``"heads first"``, ``"swapped"``, ``"broken"``, ``"unknown"`` or ``"absent"``.
    """
    if not hasattr(module, "natten2dqkrpb") or not hasattr(module, "natten2dav"):
        return "absent"
    found = _observe(module)
    names: Any = module
    if found == "swapped":
        names.natten2dqkrpb, names.natten2dav = swapped_qkrpb, swapped_av
    elif found == "unknown":
        names.natten2dqkrpb, names.natten2dav = _refuse, _refuse
    else:
        names.natten2dqkrpb, names.natten2dav = _qkrpb, _av
    if found == "broken":
        names.NeighborhoodAttention.forward = forward
        warnings.warn(
            "The DiNAT of this transformers release cannot run with any NATTEN (its NeighborhoodAttention expects "
            "tokens in a row and is given a map): nbhd has replaced that class's forward.",
            stacklevel=2,
        )
    return found


def _observe(module: ModuleType) -> str:
    """Run the module's attention on meta tensors and see the shapes its two functions are called with."""
    seen: dict[str, tuple[int, ...]] = {}
    heads_first = (_BATCH, _HEADS, _X, _Y)

    def recorded_qkrpb(query: Tensor, key: Tensor, rpb: Tensor, kernel_size: int, dilation: int) -> Tensor:
        seen["query"], seen["key"] = tuple(query.shape), tuple(key.shape)
        return query.new_empty(*heads_first, _WINDOW**2)

    def recorded_av(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
        seen["value"] = tuple(value.shape)
        return value.new_empty(*heads_first, _DIM)

    names: Any = module
    before = names.natten2dqkrpb, names.natten2dav
    names.natten2dqkrpb, names.natten2dav = recorded_qkrpb, recorded_av
    try:
        config = SimpleNamespace(qkv_bias=True, attention_probs_dropout_prob=0.0)
        with torch.device("meta"), torch.no_grad():
            attention = names.NeighborhoodAttention(config, _HEADS * _DIM, _HEADS, _WINDOW, 1)
            out = attention(torch.empty(_BATCH, _X, _Y, _HEADS * _DIM))
    except (ValueError, RuntimeError):  # what the releases that cannot run raise: too many axes to unpack
        return "broken" if not seen and _is_known(names.NeighborhoodAttention) else "unknown"
    except (TypeError, AttributeError):
        return "unknown"
    finally:
        names.natten2dqkrpb, names.natten2dav = before
    if tuple(out[0].shape) == (_BATCH, _X, _Y, _HEADS * _DIM) and len(seen) == 3 and len(set(seen.values())) == 1:
        layouts: dict[tuple[int, ...], str] = {
            (*heads_first, _DIM): "heads first",
            (_BATCH, _Y, _X, _HEADS, _DIM): "swapped",
        }
        return layouts.get(seen["query"], "unknown")
    return "unknown"


def _is_known(attention_class: Any) -> bool:
    """Whether :func:`forward` fits the class: it has the parts that the known releases have."""
    try:
        config = SimpleNamespace(qkv_bias=True, attention_probs_dropout_prob=0.0)
        with torch.device("meta"):
            attention = attention_class(config, _HEADS * _DIM, _HEADS, _WINDOW, 1)
    except (ValueError, RuntimeError, TypeError, AttributeError):
        return False
    parts = ("query", "key", "value", "rpb", "dropout", "kernel_size", "dilation", "num_attention_heads")
    return all(hasattr(attention, part) for part in parts)


def swapped_qkrpb(query: Tensor, key: Tensor, rpb: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """``natten2dqkrpb`` for query and key ``[batch, Y, X, heads, dim]``; the scores are heads first."""
    return _qkrpb(query.permute(0, 3, 2, 1, 4), key.permute(0, 3, 2, 1, 4), rpb, kernel_size, dilation)


def swapped_av(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """``natten2dav`` for value ``[batch, Y, X, heads, dim]``; attention and output are heads first."""
    return _av(attn, value.permute(0, 3, 2, 1, 4), kernel_size, dilation)


def forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """The attention of DiNAT on ``[batch, X, Y, channels]``, for releases whose own cannot run."""
    heads = (self.num_attention_heads, -1)
    query, key, value = (
        projection(hidden_states).unflatten(-1, heads).movedim(-2, 1)
        for projection in (self.query, self.key, self.value)
    )
    scores = _qkrpb(query / math.sqrt(query.shape[-1]), key, self.rpb, self.kernel_size, self.dilation)
    probabilities = self.dropout(torch.softmax(scores, dim=-1))
    context = _av(probabilities, value, self.kernel_size, self.dilation).movedim(1, -2).flatten(-2)
    return (context, probabilities) if output_attentions else (context,)


def _refuse(*args: Any, **kwargs: Any) -> Tensor:
    raise ArgumentError(
        "The layout that this transformers release's DiNAT hands to natten2dqkrpb could not be made out, and a wrong "
        "guess would be a wrong result. Load the checkpoint with nbhd's NatModel and NatConfig(dilations=...) instead."
    )
