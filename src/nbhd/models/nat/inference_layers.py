"""What `nbhd.optimize_for_inference` puts in the place of NAT's: attention with one projection, and whole layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from nbhd.functional import apply_attention_weights, attention_weights, na2d
from nbhd.linear import Linear, is_plain
from nbhd.models.nat.layers import (
    NatIntermediate,
    NatLayer,
    NatOutput,
    NeighborhoodAttention,
    NeighborhoodAttentionModule,
    NeighborhoodAttentionOutput,
)
from nbhd.packed import Layers, PackedLinear

PARTS = ("query", "key", "value")


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

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """``(B, H, W, dim)`` to the same, and the attention probabilities if asked for."""
        qkv = self.qkv(hidden_states)
        if not output_attentions:
            return self.attend(qkv), None
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


class PackedNatLayer(NatLayer):
    """`nbhd.models.nat.layers.NatLayer` in four calls of the native core; for inference.

    They are norm and projection to query, key and value; attention; projection and residual; norm, MLP and residual.
    Hooks, adapters and other parts that are put into the layer later are noticed: it runs part by part then, as it does
    for what `nbhd.packed.Layers` leaves to PyTorch.

    Args:
        layer: the layer to take the parts of, the same objects; one that it `suits`.
    """

    def __init__(self, layer: NatLayer) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self._watch = _Watch()

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether ``layer`` is a `NatLayer` made of nothing but its own parts, its linear layers packed."""
        return type(layer) is NatLayer and _has_its_own_parts(layer)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """``(B, H, W, dim)`` to the same, and the attention probabilities if asked for."""
        whole = None
        if (
            not output_attentions
            and not torch.compiler.is_compiling()
            and hidden_states.ndim == 4
            and min(hidden_states.shape[1:3]) >= self.window_size  # smaller maps are padded between norm and attention
        ):
            whole = self._watch.whole(self)
        output = whole(self, hidden_states) if whole is not None else None
        return super().forward(hidden_states, output_attentions) if output is None else (output, None)


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
            of_attention, of_mlp = scales.unbind()
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
_PARTS: dict[str, type[nn.Module]] = {
    "layernorm_before": nn.LayerNorm, "layernorm_after": nn.LayerNorm, "drop_path": nn.Identity,
    "attention": NeighborhoodAttentionModule, "attention.self": FusedNeighborhoodAttention,
    "attention.self.qkv": PackedLinear, "attention.output": NeighborhoodAttentionOutput,
    "attention.output.dense": PackedLinear, "attention.output.dropout": nn.Identity, "intermediate": NatIntermediate,
    "intermediate.dense": PackedLinear, "intermediate.intermediate_act_fn": GELUActivation, "output": NatOutput,
    "output.dense": PackedLinear, "output.dropout": nn.Identity,
}  # fmt: skip


def _has_its_own_parts(layer: nn.Module) -> bool:
    parts = dict(layer.named_modules(remove_duplicate=False))
    del parts[""]
    activation = parts.get("intermediate.intermediate_act_fn")
    return (
        parts.keys() == _PARTS.keys()
        and all(type(part) is _PARTS[name] and is_plain(part) for name, part in parts.items())
        and getattr(activation, "act", None) is nn.functional.gelu  # and not the one written out in Python
    )


class _Watch:
    """Notices when a layer is not made of nothing but its own parts any more. No part of copies and pickles."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None  # threads replace it as a whole

    def whole(self, layer: NatLayer) -> _Whole | None:
        """What to compute the layer with, if it has its own parts and nobody's hooks."""
        if nn.modules.module._has_any_global_hook():
            return None
        seen = self._seen
        if seen is None or not seen.is_of(layer):
            self._seen = None
            if not _has_its_own_parts(layer):
                return None
            seen = self._seen = _Seen(layer)
        return seen.whole

    def __deepcopy__(self, memo: dict[int, object]) -> _Watch:
        return _Watch()

    def __reduce__(self) -> tuple[type[_Watch], tuple[()]]:
        return _Watch, ()


class _Seen:
    """A layer that was found to have its own parts."""

    def __init__(self, layer: NatLayer) -> None:
        self.whole = _Whole(layer)
        self._layer = layer
        self._children = tuple(layer._modules.values())
        # the layer's own hooks are run by whoever calls it
        parts = list(layer.modules())[1:]
        self._parts = [(part, type(part), part.__dict__, tuple(part._modules.values())) for part in parts]
        self._activation: Any = layer.intermediate.intermediate_act_fn

    def is_of(self, layer: NatLayer) -> bool:
        """Whether it is this layer, and has no other parts, hooks or functions now."""
        if layer is not self._layer or tuple(layer._modules.values()) != self._children:
            return False
        for part, kind, attributes, children in self._parts:
            if (
                type(part) is not kind
                or attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or attributes["_backward_hooks"]
                or attributes["_backward_pre_hooks"]
                or "forward" in attributes
                or tuple(attributes["_modules"].values()) != children
            ):
                return False
        return self._activation.act is nn.functional.gelu
