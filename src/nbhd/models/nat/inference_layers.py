"""What `nbhd.optimize_for_inference` puts in the place of NAT's layers, and which attentions it may fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from nbhd.models.nat.fused_attention import PARTS, FusedNeighborhoodAttention
from nbhd.models.nat.layers import (
    NatIntermediate,
    NatLayer,
    NatOutput,
    NeighborhoodAttention,
    NeighborhoodAttentionModule,
    NeighborhoodAttentionOutput,
    has_exact_gelu,
)
from nbhd.nn.linear import Linear, is_plain
from nbhd.nn.own_parts import Kinds
from nbhd.nn.packed import Layers, PackedLinear


def may_be_fused(attention: Any) -> bool:
    """Whether the weights are all that the attention computes with: no hooks, adapters or classes of their own."""
    parts = [getattr(attention, name) for name in PARTS]
    return (
        type(attention) is NeighborhoodAttention
        and all(type(part) is Linear for part in parts)
        and all(is_plain(layer) for layer in (attention, *parts))
        and len({part.bias is None for part in parts}) == 1
        and all(type(part.weight) is nn.Parameter for part in parts)
        and len({(part.weight.dtype, part.weight.device) for part in parts}) == 1
    )


class PackedNatLayer(NatLayer):
    """`nbhd.models.nat.layers.NatLayer` in four calls of the native core; for inference.

    They are norm and projection to query, key and value; attention; projection and residual; norm, MLP and residual.
    Hooks, adapters and other parts that are put into the layer later are noticed: it runs part by part then, as it does
    for what `nbhd.nn.packed.Layers` leaves to PyTorch.

    Args:
        layer: the layer to take the parts of, the same objects; one that it `suits`.
    """

    def __init__(self, layer: NatLayer) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__getstate__())

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether ``layer`` is a `NatLayer` made of nothing but its own parts, its linear layers packed."""
        return type(layer) is NatLayer and _PARTS.are_all_of(layer) and has_exact_gelu(layer.intermediate)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        """``(B, H, W, dim)`` to the same, and the attention probabilities if asked for."""
        whole = None
        if (
            not output_attentions
            and not torch.compiler.is_compiling()
            and hidden_states.ndim == 4
            and min(hidden_states.shape[1:3]) >= self.window_size  # smaller maps are padded between norm and attention
        ):
            whole = self._found()
        output = whole(self, hidden_states) if whole is not None else None
        return super().forward(hidden_states, output_attentions) if output is None else (output,)

    #: With what it was made for.
    _whole: tuple[object, _Whole] | None = None  # threads replace it as a whole

    def _found(self) -> _Whole | None:
        """What to compute the layer with, if it has its own parts and nobody's hooks."""
        seen = self._has_own_parts()
        if seen is None or not has_exact_gelu(self.intermediate):
            return None
        found = self._whole
        if found is None or found[0] is not seen:
            found = self._whole = seen, _Whole(self)
        return found[1]

    def _runs_joined(self, hidden_states: Tensor) -> bool:
        """In no other way than its own."""
        return False

    def _kinds_of_parts(self) -> Kinds:
        return _PARTS

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_whole"}


class _Whole:
    """What `PackedNatLayer` computes with, found once."""

    def __init__(self, layer: NatLayer) -> None:
        attention: Any = layer.attention.self
        projection: Any = layer.attention.output.dense
        hidden, last = layer.intermediate.dense, layer.output.dense
        self._attend = attention.attend
        self._qkv = Layers(attention.qkv, norm=layer.layernorm_before)
        self._projection = Layers(projection)
        self._mlp = Layers(last, hidden=hidden, norm=layer.layernorm_after)  # type: ignore[arg-type]

    def __call__(self, layer: NatLayer, hidden_states: Tensor) -> Tensor | None:
        """The layer's output, or None where it has to run part by part."""
        of_attention = of_mlp = None
        scales = layer.layer_scale_parameters
        if scales is not None:
            if type(scales) not in (Tensor, nn.Parameter) or scales.shape != (2, hidden_states.shape[-1]):
                return None
            if scales.dtype != hidden_states.dtype:
                return None
            of_attention, of_mlp = scales.float().unbind()
        qkv = self._qkv(hidden_states)
        if qkv is None:
            self._projection.forget_other_kinds()
            self._mlp.forget_other_kinds()
            return None
        context = self._attend(qkv)
        del qkv  # what follows can have its memory
        attended = self._projection.run(context, hidden_states, of_attention)
        del context
        return None if attended is None else self._mlp.run(attended, attended, of_mlp)


#: The parts that a layer may have to run as a whole.
_PARTS = Kinds({
    "layernorm_before": (nn.LayerNorm,), "layernorm_after": (nn.LayerNorm,), "drop_path": (nn.Identity,),
    "attention": (NeighborhoodAttentionModule,), "attention.self": (FusedNeighborhoodAttention,),
    "attention.self.qkv": (PackedLinear,), "attention.output": (NeighborhoodAttentionOutput,),
    "attention.output.dense": (PackedLinear,), "attention.output.dropout": (nn.Identity,),
    "intermediate": (NatIntermediate,), "intermediate.dense": (PackedLinear,),
    "intermediate.intermediate_act_fn": (GELUActivation,), "output": (NatOutput,), "output.dense": (PackedLinear,),
    "output.dropout": (nn.Identity,),
})  # fmt: skip
