"""NAT's attention with one projection, which `nbhd.optimize_for_inference` puts in the place of three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbhd.functional import apply_attention_weights, attention_weights, na2d
from nbhd.nn.linear import Linear

PARTS = ("query", "key", "value")


class FusedNeighborhoodAttention(nn.Module):
    """`nbhd.models.nat.layers.NeighborhoodAttention` with one product for query, key and value; for inference.

    State dicts have ``query``, ``key`` and ``value`` apart, as before.

    Args:
        attention: the layer to take the weights of.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_attention_heads = attention.num_attention_heads
        self.attention_head_size = attention.attention_head_size
        self.kernel_size, self.dilation = attention.kernel_size, attention.dilation
        self.rpb = attention.rpb
        dim, has_bias = attention.all_head_size, attention.query.bias is not None
        weight = attention.query.weight
        self.qkv = Linear(dim, 3 * dim, bias=has_bias, device="meta")
        for name in ("weight", "bias") if has_bias else ("weight",):
            with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode do not tell that they change
                joined = torch.cat([getattr(getattr(attention, part), name).detach() for part in PARTS])
            setattr(self.qkv, name, nn.Parameter(joined, requires_grad=False))
        assert self.qkv.weight.dtype == weight.dtype
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_join)
        self.train(attention.training)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        """``(B, H, W, dim)`` to the same, and the attention probabilities if asked for."""
        qkv = self.qkv(hidden_states)
        if not output_attentions:
            return (self.attend(qkv),)
        query, key, value = self._parts(qkv)
        options: Any = {"dilation": self.dilation}
        weights = attention_weights(query, key, self.kernel_size, rel_pos_bias=self.rpb, **options)
        context = apply_attention_weights(weights, value, self.kernel_size, **options)
        return context.flatten(-2), weights.permute(0, 3, 1, 2, 4)

    def attend(self, qkv: Tensor) -> Tensor:
        """What the layer makes of ``qkv(hidden_states)``."""
        query, key, value = self._parts(qkv)
        out = na2d(query, key, value, self.kernel_size, dilation=self.dilation, rel_pos_bias=self.rpb)
        return out.flatten(-2)

    def _parts(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = qkv.unflatten(-1, (3, self.num_attention_heads, self.attention_head_size))
        query, key, value = parts.unbind(-3)  # views: the operator takes them as they lie
        return query, key, value


def _split(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in ("weight", "bias"):
        joined = state.pop(f"{prefix}qkv.{name}", None)
        if joined is not None:
            for part, tensor in zip(PARTS, joined.chunk(3), strict=True):
                state[f"{prefix}{part}.{name}"] = tensor.clone()  # files take no tensors that share memory


def _join(
    module: Any, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
    unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Put query, key and value together; what is not given, or of another shape, stays, and is reported by its name."""
    for name in ("weight", "bias"):
        own = getattr(module.qkv, name)
        if own is None or f"{prefix}qkv.{name}" in state:
            continue
        kept = own.detach().chunk(3)
        given = [state.pop(f"{prefix}{part}.{name}", None) for part in PARTS]
        for i, part in enumerate(PARTS):
            key, tensor = f"{prefix}{part}.{name}", given[i]
            if tensor is None:
                missing.append(key)
            elif tensor.shape != kept[i].shape:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {tensor.shape} from checkpoint, the shape in "
                    f"current model is {kept[i].shape}."
                )
                given[i] = None
        device = next((tensor.device for tensor in given if tensor is not None), own.device)
        thirds = [here if tensor is None else tensor for here, tensor in zip(kept, given, strict=True)]
        state[f"{prefix}qkv.{name}"] = torch.cat([third.to(device) for third in thirds])
