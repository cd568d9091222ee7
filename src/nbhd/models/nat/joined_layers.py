"""A NAT layer in four calls of the native core, in training and in inference."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nbhd.backends.cpu_linear import Layer, Norm
from nbhd.functional import na2d
from nbhd.joined import join


class JoinedLayer:
    """What a `NatLayer` with its own parts computes, in four calls.

    They are norm and projections to query, key and value; attention; projection and residual; norm, MLP and residual.

    Args:
        layer: a `nbhd.models.nat.layers.NatLayer`.
    """

    def __init__(self, layer: Any) -> None:
        self._norms = layer.layernorm_before, layer.layernorm_after
        attention = layer.attention.self
        self._attention, self._projections = attention, (attention.query, attention.key, attention.value)
        self._output = layer.attention.output.dense
        self._mlp = layer.intermediate.dense, layer.output.dense
        self._drop_path = layer.drop_path
        self._dropouts = attention.dropout, layer.attention.output.dropout, layer.output.dropout

    def suits(self, hidden_states: Tensor, window_size: int) -> bool:
        """Whether ``hidden_states`` is a map that nothing is padded of, nothing drops out, and a branch may be kept."""
        return (
            hidden_states.ndim == 4
            and min(hidden_states.shape[1:3]) >= window_size
            and not (self._drop_path.training and getattr(self._drop_path, "drop_prob", 0) >= 1)
            and not any(dropout.training and dropout.p > 0 for dropout in self._dropouts)
        )

    def attention_branch(self, hidden_states: Tensor, factor: float | None) -> Tensor | None:
        """``(B, H, W, dim)`` to the attention branch; times ``factor`` and added to ``hidden_states`` if that is given.

        None where PyTorch's layers are to be taken, for their parameters' sake.
        """
        attention = self._attention
        norm = _norm(self._norms[0], hidden_states)
        if norm is None:
            return None
        parts = join(hidden_states, [_layer(layer) for layer in self._projections], norm=norm)
        if parts is None:
            return None
        heads = attention.num_attention_heads, attention.attention_head_size
        query, key, value = (part.unflatten(-1, heads) for part in parts)
        del parts  # what follows can have their memory
        options: Any = {"dilation": attention.dilation, "rel_pos_bias": attention.rpb}
        context = na2d(query, key, value, attention.kernel_size, **options).flatten(-2)
        del query, key, value
        return _only(join(context, [_layer(self._output)], **_added(hidden_states, factor)))

    def mlp_branch(self, hidden_states: Tensor, factor: float | None) -> Tensor | None:
        """The same for the MLP."""
        norm = _norm(self._norms[1], hidden_states)
        if norm is None:
            return None
        hidden, last = self._mlp
        added = _added(hidden_states, factor)
        return _only(join(hidden_states, [_layer(last)], hidden=_layer(hidden), norm=norm, **added))


def _only(outputs: tuple[Tensor, ...] | None) -> Tensor | None:
    return None if outputs is None else outputs[0]


def _added(residual: Tensor, factor: float | None) -> dict[str, Any]:
    return {} if factor is None else {"residual": residual, "factor": factor}


def _layer(layer: nn.Linear) -> Layer:
    return Layer(None, layer.weight, layer.bias)


def _norm(norm: nn.LayerNorm, input: Tensor) -> Norm | None:
    if norm.normalized_shape != input.shape[-1:] or norm.eps < 0:
        return None
    return Norm(norm.weight, norm.bias, norm.eps)
