"""The parts of a NAT: stem, attention, layer, stage, encoder. All maps are ``(batch, height, width, channels)``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers.activations import ACT2FN, GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from nbhd._modes import is_transformed, makes_a_graph
from nbhd.errors import ArgumentError
from nbhd.functional import apply_attention_weights, attention_weights, na2d
from nbhd.models.nat import joined_layers
from nbhd.models.nat.configuration_nat import NatConfig
from nbhd.models.nat.fused_attention import FusedNeighborhoodAttention
from nbhd.nn.convolution import Conv2d
from nbhd.nn.joined import may_join
from nbhd.nn.joined_operator import may_join_in_graph
from nbhd.nn.linear import Linear, is_plain, joins
from nbhd.nn.own_parts import Kinds, OwnParts


@dataclass
class NatEncoderOutput(ModelOutput):
    """Outputs of the encoder; the fields are those of `NatModelOutput`, before the last norm."""

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


class NatPatchEmbeddings(nn.Module):
    """Pixels ``(B, num_channels, H, W)`` to a map ``(B, ceil(H / patch_size), ceil(W / patch_size), embed_dim)``."""

    def __init__(self, config: NatConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        # One 3x3 convolution of stride 2 for each factor 2, doubling up to embed_dim, without activations in between.
        halvings = config.patch_size.bit_length() - 1
        widths = [config.num_channels, *(config.embed_dim // 2**i for i in reversed(range(halvings)))]
        self.projection = nn.Sequential(
            *(Conv2d(a, b, kernel_size=3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4:
            raise ArgumentError(
                f"pixel_values must be (batch, channels, height, width), got {pixel_values.ndim} axes: "
                f"{tuple(pixel_values.shape)}. Add the batch axis to a single image with pixel_values[None]."
            )
        if pixel_values.shape[1] != self.num_channels:
            raise ArgumentError(
                f"pixel_values must have the {self.num_channels} channels of config.num_channels along axis 1, got "
                f"{pixel_values.shape[1]} in {tuple(pixel_values.shape)}. Make sure that the channel dimension of the "
                "pixel values match with the one set in the configuration."
            )
        if not pixel_values.is_floating_point():
            raise ArgumentError(
                f"pixel_values must be floating point and normalised, got {pixel_values.dtype}. Pass images "
                "through the model's image processor first."
            )
        # Reordering the few channels of the pixels once makes every later permute free.
        dtype: Any = self.projection[0].weight.dtype
        pixel_values = pixel_values.to(dtype)
        if torch.compiler.is_compiling() or not is_transformed():  # vmap adds an axis, and knows no such order then
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.projection(pixel_values).permute(0, 2, 3, 1)


class NatEmbeddings(nn.Module):
    """The stem: patch embeddings, layer norm, dropout."""

    def __init__(self, config: NatConfig) -> None:
        super().__init__()
        self.patch_embeddings = NatPatchEmbeddings(config)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.norm(self.patch_embeddings(pixel_values)))


class NatDownsampler(nn.Module):
    """``(B, H, W, dim)`` to ``(B, ceil(H / 2), ceil(W / 2), 2 * dim)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.reduction = Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NatDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drop a sample's branch with probability ``drop_prob``."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.draw(hidden_states) if self.may_drop() else hidden_states

    def may_drop(self) -> bool:
        """Whether branches are dropped: not in inference."""
        return self.training and self.drop_prob > 0

    def draw(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(B, 1, ...)``, what to multiply each sample with: 0 if its branch is dropped, else 1 / (1 - drop_prob)."""
        keep = 1 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        # Drawn in at least float32: in half precision keep + u rounds up to 1 too often.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        factor = torch.rand(shape, dtype=dtype, device=hidden_states.device).add_(keep).floor_()
        if keep > 0:
            factor = factor.div_(keep)
        return factor.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention with relative position biases, ``(B, H, W, dim)`` to the same.

    The map must be at least ``kernel_size * dilation`` along both sides; `NatLayer` sees to that.
    """

    def __init__(self, config: NatConfig, dim: int, num_heads: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        self.num_attention_heads = num_heads
        self.attention_head_size = dim // num_heads
        self.all_head_size = dim
        self.kernel_size = kernel_size
        self.dilation = dilation

        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.query = Linear(dim, dim, bias=config.qkv_bias)
        self.key = Linear(dim, dim, bias=config.qkv_bias)
        self.value = Linear(dim, dim, bias=config.qkv_bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor, ...]:
        """``(context,)``, and the attention probabilities if asked for."""
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        if not output_attentions and not (self.training and self.dropout.p > 0):
            return (self.attend(query, key, value),)

        query, key, value = (self._by_heads(part) for part in (query, key, value))
        # The fused operator never holds the probabilities; to return them or to drop some takes the two halves.
        probabilities = attention_weights(
            query, key, self.kernel_size, dilation=self.dilation, rel_pos_bias=self.rpb
        )  # (B, H, W, heads, kernel_size**2)
        # Heads first is what is returned; the values are weighted through that view, so that it gets a gradient.
        returned = self.dropout(probabilities).permute(0, 3, 1, 2, 4)
        weights = returned.permute(0, 2, 3, 1, 4)
        context = apply_attention_weights(weights, value, self.kernel_size, dilation=self.dilation)
        return (context.flatten(-2), returned) if output_attentions else (context.flatten(-2),)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """What the layer makes of the three projections, without dropout."""
        query, key, value = (self._by_heads(part) for part in (query, key, value))
        context = na2d(query, key, value, self.kernel_size, dilation=self.dilation, rel_pos_bias=self.rpb)
        return context.flatten(-2)

    def _by_heads(self, part: torch.Tensor) -> torch.Tensor:
        return part.unflatten(-1, (self.num_attention_heads, self.attention_head_size))


class NeighborhoodAttentionOutput(nn.Module):
    """Projection of the attention's output."""

    def __init__(self, config: NatConfig, dim: int) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(hidden_states))


class NeighborhoodAttentionModule(nn.Module):
    """Attention and its output projection."""

    def __init__(self, config: NatConfig, dim: int, num_heads: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        self.self = NeighborhoodAttention(config, dim, num_heads, kernel_size, dilation)
        self.output = NeighborhoodAttentionOutput(config, dim)

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor, ...]:
        context, *probabilities = self.self(hidden_states, output_attentions)
        return (self.output(context), *probabilities)


class NatIntermediate(nn.Module):
    """First half of the MLP."""

    def __init__(self, config: NatConfig, dim: int) -> None:
        super().__init__()
        self.dense = Linear(dim, int(config.mlp_ratio * dim))
        self.intermediate_act_fn = (
            ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dense: Any = self.dense
        activation: Any = self.intermediate_act_fn
        if has_exact_gelu(self) and joins(dense, activation):
            return dense.with_gelu(hidden_states)
        return activation(dense(hidden_states))


def has_exact_gelu(intermediate: NatIntermediate) -> bool:
    """Whether the activation is PyTorch's exact GELU, and not the one written out in Python."""
    activation: Any = intermediate.intermediate_act_fn
    return type(activation) is GELUActivation and activation.act is nn.functional.gelu


class NatOutput(nn.Module):
    """Second half of the MLP."""

    def __init__(self, config: NatConfig, dim: int) -> None:
        super().__init__()
        self.dense = Linear(int(config.mlp_ratio * dim), dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(hidden_states))


def _is_open(side: int, window_size: int) -> bool:
    """Whether a graph is being exported in which ``side`` may turn out smaller than the window or not."""
    if not getattr(torch.compiler, "is_exporting", bool)():  # TODO: drop getattr when torch 2.6 is no longer supported
        return False
    return not statically_known_true(side >= window_size) and not statically_known_true(side < window_size)


class NatLayer(GradientCheckpointingLayer):
    """Attention and MLP, each a residual branch with layer norm, optional layer scale and stochastic depth."""

    #: Made when it is first wanted, and no part of copies and pickles.
    _own_parts: OwnParts | None = None

    def __init__(
        self, config: NatConfig, dim: int, num_heads: int, drop_path_rate: float = 0.0, dilation: int = 1
    ) -> None:
        super().__init__()
        self.window_size = config.kernel_size * dilation
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = NeighborhoodAttentionModule(config, dim, num_heads, config.kernel_size, dilation)
        self.drop_path = NatDropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.intermediate = NatIntermediate(config, dim)
        self.output = NatOutput(config, dim)
        # Row 0 scales the attention branch, row 1 the MLP's.
        self.layer_scale_init_value = config.layer_scale_init_value
        self.layer_scale_parameters = (
            nn.Parameter(torch.full((2, dim), float(config.layer_scale_init_value)))
            if config.layer_scale_init_value > 0
            else None
        )

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor, ...]:
        """``(hidden_states,)``, and the attention probabilities if asked for."""
        if not output_attentions:
            if self._runs_joined(hidden_states):
                hidden_states = self._add(
                    hidden_states, joined_layers.attention_branch, self._plain_attention_branch, 0
                )
                return (self._add(hidden_states, joined_layers.mlp_branch, self._mlp_branch, 1),)
            if self._may_leave_out(hidden_states):
                hidden_states = self._add_for_some(hidden_states, self._plain_attention_branch)
                return (self._add_for_some(hidden_states, self._mlp_branch),)
        branch, *probabilities = self._attention_branch(hidden_states, output_attentions)
        hidden_states = hidden_states + self.drop_path(branch)
        return (hidden_states + self.drop_path(self._mlp_branch(hidden_states)), *probabilities)

    def _runs_joined(self, hidden_states: torch.Tensor) -> bool:
        """Whether the layer is computed in a few calls: where that is faster, and nobody can tell."""
        if makes_a_graph():
            return (
                may_join_in_graph(hidden_states)
                and type(self) is NatLayer
                and _classes_are_as_they_were()
                and not any(name in self.__dict__ for name in _METHODS)
                and (_PARTS.are_in(self) or _FUSED_PARTS.are_in(self))
                and has_exact_gelu(self.intermediate)
                and joined_layers.suits(self, hidden_states)
            )
        return (
            may_join(hidden_states)  # the first of all: in graphs nothing of this is to be looked at
            and self._has_own_parts() is not None
            and has_exact_gelu(self.intermediate)
            and joined_layers.suits(self, hidden_states)
        )

    def _has_own_parts(self) -> object | None:
        """None if the layer has not its own parts and methods (`nbhd.nn.own_parts`); the same object while it has."""
        if not _has_methods(type(self)) or not _METHODS.keys().isdisjoint(self.__dict__):
            return None
        if self._own_parts is None:
            self._own_parts = OwnParts(self._kinds_of_parts())
        return self._own_parts.seen(self)

    def _kinds_of_parts(self) -> Kinds:
        return _PARTS

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_own_parts"}

    def _add(
        self, hidden_states: torch.Tensor,
        joined_branch: Callable[[NatLayer, torch.Tensor, float | None], torch.Tensor | None],
        plain_branch: Callable[[torch.Tensor], torch.Tensor], row: int,
    ) -> torch.Tensor:  # fmt: skip
        """``hidden_states + drop_path(branch(hidden_states))``, the branch joined, or plain where it cannot be."""

        def branch(some: torch.Tensor) -> torch.Tensor:
            joined = joined_branch(self, some, None) if makes_a_graph() or len(some) else None
            return plain_branch(some) if joined is None else self._scale(joined, row)

        def added(factor: float) -> torch.Tensor:
            if self.layer_scale_parameters is not None:
                return torch.add(hidden_states, branch(hidden_states), alpha=factor)
            joined = joined_branch(self, hidden_states, factor)
            return torch.add(hidden_states, plain_branch(hidden_states), alpha=factor) if joined is None else joined

        if type(self.drop_path) is NatDropPath and self.drop_path.may_drop():
            if makes_a_graph():  # whose shapes do not depend on what is drawn
                return hidden_states + self.drop_path(branch(hidden_states))
            return self._add_for_some(hidden_states, branch, added)
        return added(1.0)

    def _plain_attention_branch(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._attention_branch(hidden_states, False)[0]

    def _attention_branch(self, hidden_states: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, ...]:
        branch, *probabilities = self._attend(self.layernorm_before(hidden_states), output_attentions)
        return (self._scale(branch, 0), *probabilities)

    def _mlp_branch(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._scale(self.output(self.intermediate(self.layernorm_after(hidden_states))), 1)

    def _may_leave_out(self, hidden_states: torch.Tensor) -> bool:
        """Whether images whose branch is dropped may be left out of it, and nobody can tell.

        On CPUs alone: a GPU would have to be waited for. Not where a graph is made, where dropout draws random numbers
        too, whose order would change, and not where somebody sees what goes through a module.
        """
        return (
            type(self.drop_path) is NatDropPath
            and self.drop_path.may_drop()
            and self.drop_path.drop_prob < 1
            and not makes_a_graph()
            and type(hidden_states) is torch.Tensor
            and hidden_states.device.type == "cpu"
            and not is_transformed()
            and not any(isinstance(module, nn.Dropout) and module.p for module in self.modules())
            and all(is_plain(module) for module in self.modules())
            and not nn.modules.module._has_any_global_hook()
        )

    def _add_for_some(
        self, hidden_states: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor],
        added: Callable[[float], torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """``hidden_states + drop_path(branch(hidden_states))``, the branch computed for the images that keep it.

        If none does it is computed for none, and gives all parameters gradients of zero. If all do, ``added`` makes the
        sum with the branch times a factor.
        """
        drop_path = cast(NatDropPath, self.drop_path)
        factors = drop_path.draw(hidden_states)
        kept = factors.flatten().nonzero().flatten()
        factor = 1 / (1 - drop_path.drop_prob)
        if len(kept) == len(factors):
            if added is not None:
                return added(factor)
            return torch.add(hidden_states, branch(hidden_states), alpha=factor)
        some = branch(hidden_states.index_select(0, kept))
        dtype = torch.promote_types(hidden_states.dtype, some.dtype)  # autocast makes them two
        return hidden_states.to(dtype).index_add(0, kept, some.to(dtype), alpha=factor)

    def _attend(self, branch: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, ...]:
        """Attention on a map padded to the window's size where it is smaller.

        The padding is plain zeros after the norm, at the lower and right border. It is not masked and so takes part
        with the biases of query, key and value: trained weights rely on it.
        """
        height, width = branch.shape[1:3]
        if _is_open(height, self.window_size) or _is_open(width, self.window_size):
            return self._attend_any_size(branch, output_attentions)
        pad_bottom, pad_right = max(0, self.window_size - height), max(0, self.window_size - width)
        if not pad_bottom and not pad_right:
            return self.attention(branch, output_attentions)
        padded = nn.functional.pad(branch, (0, 0, 0, pad_right, 0, pad_bottom))
        attended, *probabilities = self.attention(padded, output_attentions)
        return (attended[:, :height, :width], *probabilities)

    def _attend_any_size(self, branch: torch.Tensor, output_attentions: bool) -> tuple[torch.Tensor, ...]:
        """The same without a branch, for an exported graph that takes maps smaller and larger than the window.

        Cropping is by index because a slice would make the graph demand that nothing is cropped.
        """
        height, width = branch.shape[1:3]
        pad_bottom = torch.sym_max(self.window_size, height) - height
        pad_right = torch.sym_max(self.window_size, width) - width
        padded = nn.functional.pad(branch, (0, 0, 0, pad_right, 0, pad_bottom))
        attended, *probabilities = self.attention(padded, output_attentions)
        rows = torch.arange(height, device=branch.device)
        columns = torch.arange(width, device=branch.device)
        return (attended.index_select(1, rows).index_select(2, columns), *probabilities)

    def _scale(self, branch: torch.Tensor, row: int) -> torch.Tensor:
        return branch if self.layer_scale_parameters is None else self.layer_scale_parameters[row] * branch


_AROUND: dict[str, tuple[type[nn.Module], ...]] = {
    "layernorm_before": (nn.LayerNorm,), "layernorm_after": (nn.LayerNorm,), "drop_path": (nn.Identity, NatDropPath),
    "attention": (NeighborhoodAttentionModule,), "attention.output": (NeighborhoodAttentionOutput,),
    "attention.output.dense": (Linear,), "attention.output.dropout": (nn.Dropout, nn.Identity),
    "intermediate": (NatIntermediate,), "intermediate.dense": (Linear,),
    "intermediate.intermediate_act_fn": (GELUActivation,), "output": (NatOutput,), "output.dense": (Linear,),
    "output.dropout": (nn.Dropout, nn.Identity),
}  # fmt: skip
#: The parts that a layer may have to be computed in a few calls.
_PARTS = Kinds({
    **_AROUND, "attention.self": (NeighborhoodAttention,), "attention.self.query": (Linear,),
    "attention.self.key": (Linear,), "attention.self.value": (Linear,), "attention.self.dropout": (nn.Dropout,),
})  # fmt: skip
#: Those that it may have in graphs as well, made ready for inference.
_FUSED_PARTS = Kinds({**_AROUND, "attention.self": (FusedNeighborhoodAttention,), "attention.self.qkv": (Linear,)})


#: What it computes its branches with otherwise, as it is here.
_METHODS = {
    name: getattr(NatLayer, name)
    for name in ("_add", "_add_for_some", "_attend", "_attention_branch", "_mlp_branch", "_scale")
}


def _has_methods(kind: type[nn.Module]) -> bool:
    return all(getattr(kind, name) is method for name, method in _METHODS.items())


def _classes_are_as_they_were() -> bool:
    """Whether nobody has put other functions into the classes of a layer and its parts."""
    return _has_methods(NatLayer) and _PARTS.are_as_they_were() and _FUSED_PARTS.are_as_they_were()


# torch.compiler.assume_constant_result, which would import the compiler: it is called and not looked into.
_classes_are_as_they_were._dynamo_marked_constant = True  # type: ignore[attr-defined]


class NatStage(nn.Module):
    """The layers of one resolution, and the downsampling to the next."""

    def __init__(
        self,
        config: NatConfig,
        dim: int,
        num_heads: int,
        drop_path_rates: list[float],
        dilations: list[int],
        downsample: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            NatLayer(config, dim, num_heads, drop_path_rate, dilation)
            for drop_path_rate, dilation in zip(drop_path_rates, dilations, strict=True)
        )
        self.downsample = NatDownsampler(dim) if downsample else None

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False, downsample: bool = True
    ) -> tuple[torch.Tensor, ...]:
        """The map after and before downsampling, and the last layer's attention probabilities if asked for."""
        probabilities: list[torch.Tensor] = []
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states, *probabilities = layer(hidden_states, output_attentions and i == last)
        before = hidden_states
        if self.downsample is not None and downsample:
            hidden_states = self.downsample(hidden_states)
        return (hidden_states, before, *probabilities)


class NatEncoder(nn.Module):
    """The stages."""

    def __init__(self, config: NatConfig) -> None:
        super().__init__()
        self.num_levels = len(config.depths)
        # On the CPU even when the model is built on the meta device: these are numbers, not weights.
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        starts = [sum(config.depths[:i]) for i in range(self.num_levels + 1)]
        self.levels = nn.ModuleList(
            NatStage(
                config,
                dim=int(config.embed_dim * 2**i),
                num_heads=config.num_heads[i],
                drop_path_rates=rates[starts[i] : starts[i + 1]],
                dilations=config.layer_dilations(i),
                downsample=i < self.num_levels - 1,
            )
            for i in range(self.num_levels)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        output_hidden_states_before_downsampling: bool = False,
        num_levels: int | None = None,
    ) -> NatEncoderOutput:
        """Run the first ``num_levels`` stages (default: all).

        With ``output_hidden_states_before_downsampling`` the hidden states are each stage's before its downsampling
        instead of after, and the downsampling after the last stage that runs is left out.
        """
        states = [hidden_states]
        attentions = []
        levels = self.levels if num_levels is None else self.levels[:num_levels]
        for i, level in enumerate(levels):
            downsample = i < len(levels) - 1 or not output_hidden_states_before_downsampling
            hidden_states, before, *probabilities = level(hidden_states, output_attentions, downsample)
            if output_hidden_states:
                states.append(before if output_hidden_states_before_downsampling else hidden_states)
            attentions += probabilities
        return NatEncoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            reshaped_hidden_states=tuple(s.permute(0, 3, 1, 2) for s in states) if output_hidden_states else None,
        )
