"""A NAT layer in four calls of the native core, in training and in inference.

They are norm and projections to query, key and value; attention; projection and residual; norm, MLP and residual. All
of it is for a `nbhd.models.nat.layers.NatLayer` that is made of its own parts.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nbhd._modes import makes_a_graph
from nbhd.backends.cpu_linear import Layer, Norm
from nbhd.nn.joined import join as join_now
from nbhd.nn.joined_operator import join_in_graph


def suits(layer: Any, hidden_states: Tensor) -> bool:
    """Whether ``hidden_states`` is a map that nothing is padded of, nothing drops out, and a branch may be kept."""
    attention = layer.attention
    dropouts = getattr(attention.self, "dropout", None), attention.output.dropout, layer.output.dropout
    return (
        hidden_states.ndim == 4
        and min(hidden_states.shape[1:3]) >= layer.window_size
        and not (layer.drop_path.training and getattr(layer.drop_path, "drop_prob", 0) >= 1)
        and not any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in dropouts)
    )


def join(*layers: Any, **others: Any) -> tuple[Tensor, ...] | None:
    """`nbhd.nn.joined.join`, or its operator where a graph is made."""
    return join_in_graph(*layers, **others) if makes_a_graph() else join_now(*layers, **others)


def attention_branch(layer: Any, hidden_states: Tensor, factor: float | None) -> Tensor | None:
    """``(B, H, W, dim)`` to the attention branch; times ``factor`` and added to ``hidden_states`` if that is given.

    None where PyTorch's layers are to be taken, for their parameters' sake.
    """
    attention, norm = layer.attention.self, _norm(layer.layernorm_before, hidden_states)
    if norm is None:
        return None
    is_fused = hasattr(attention, "qkv")
    projections = [attention.qkv] if is_fused else [attention.query, attention.key, attention.value]
    parts = join(hidden_states, [_layer(part) for part in projections], norm=norm)
    if parts is None:
        return None
    with _in_own_dtype(parts[0]):
        context = attention.attend(*parts)
    del parts
    outputs = join(context, [_layer(layer.attention.output.dense)], **_added(hidden_states, factor))
    if outputs is not None:
        return outputs[0]
    branch: Tensor = layer.attention.output(context)
    return branch if factor is None else hidden_states.add(branch, alpha=factor)


def mlp_branch(layer: Any, hidden_states: Tensor, factor: float | None) -> Tensor | None:
    """The same for the MLP."""
    norm = _norm(layer.layernorm_after, hidden_states)
    if norm is None:
        return None
    hidden, last = _layer(layer.intermediate.dense), _layer(layer.output.dense)
    outputs = join(hidden_states, [last], hidden=hidden, norm=norm, **_added(hidden_states, factor))
    return None if outputs is None else outputs[0]


def _in_own_dtype(query: Tensor) -> AbstractContextManager[object]:
    """Without autocast where it would round float32, which what comes after reads and nothing gains by."""
    rounds = query.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if rounds else nullcontext()


def _added(residual: Tensor, factor: float | None) -> dict[str, Any]:
    return {} if factor is None else {"residual": residual, "factor": factor}


def _layer(layer: nn.Linear) -> Layer:
    return Layer(None, layer.weight, layer.bias)


def _norm(norm: nn.LayerNorm, input: Tensor) -> Norm | None:
    if norm.normalized_shape != input.shape[-1:] or not 0 <= norm.eps < math.inf:
        return None
    return Norm(norm.weight, norm.bias, norm.eps)
