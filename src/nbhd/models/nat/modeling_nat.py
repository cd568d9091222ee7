"""The Neighborhood Attention Transformer (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023).

Same modules, parameter names, outputs and numbers as in transformers 4.40.2, on `nbhd.functional.na2d`. Maps are
channels-last, ``(batch, height, width, channels)``, from the stem to the pooling, and heads-last within the attention:
nothing is ever transposed.

    NatForImageClassification
      nat: NatModel
        embeddings: NatEmbeddings                 pixels -> map, each side divided by patch_size
        encoder: NatEncoder
          levels.0 .. : NatStage
            layers.0 .. : NatLayer                x + attention(norm(x)), then x + mlp(norm(x))
            downsample: NatDownsampler            halves the sides, doubles the channels; not after the last stage
        layernorm, mean over the map
      classifier

With ``config.dilations`` it is the Dilated Neighborhood Attention Transformer (Hassani and Shi, arXiv:2209.15001).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, initialization as init
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import ModelOutput

from nbhd.errors import ArgumentError, CheckpointError
from nbhd.models._transformers import BackboneMixin
from nbhd.models.nat.configuration_nat import NatConfig
from nbhd.models.nat.layers import NatEmbeddings, NatEncoder, NatLayer, NeighborhoodAttention
from nbhd.models.nat.loading_nat import find_file, folder_of, read_original, weights_for
from nbhd.models.nat.original_nat import infer_config


@dataclass
class NatModelOutput(ModelOutput):
    """Outputs of `NatModel`.

    Args:
        last_hidden_state: ``(batch, height, width, channels)``, the last map after the last layer norm.
        pooler_output: ``(batch, channels)``, its mean over height and width; None without pooling.
        hidden_states: ``len(depths) + 1`` maps ``(batch, height, width, channels)``: the stem's, then each stage's
            after its downsampling; none has seen the last layer norm. On request.
        attentions: for each stage the attention probabilities of its last layer,
            ``(batch, heads, height, width, kernel_size**2)``, height and width at least the window's. On request.
        reshaped_hidden_states: ``hidden_states`` as ``(batch, channels, height, width)`` views.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class NatImageClassifierOutput(ModelOutput):
    """Outputs of `NatForImageClassification`.

    Args:
        loss: scalar, only when labels were given.
        logits: ``(batch, num_labels)``, before the softmax.
        hidden_states, attentions, reshaped_hidden_states: as in `NatModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


class NatPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what `transformers.PreTrainedModel` needs to know."""

    config: NatConfig
    config_class = NatConfig
    base_model_prefix = "nat"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["NatEmbeddings", "NatLayer"]  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"
    #: What stands before the names of `NatModel`'s weights.
    _nat_prefix = ""
    #: Names in folders of other makes, as patterns: a DiNAT's are a NAT's but for the first word.
    _renames = {r"^dinat\.": "nat."}  # noqa: RUF012

    def __init__(self, config: NatConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not isinstance(config, NatConfig):
            raise ArgumentError(
                f"config must be a NatConfig, got a {type(config).__name__}. Make one of a DinatConfig with "
                "NatConfig.from_dict(config.to_dict())."
            )
        # Attributes may have changed since the configuration was made.
        config.check()
        config.check_heads()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """A model with the weights in a folder, a file or a hub repository.

        Beyond what `transformers.PreTrainedModel.from_pretrained` takes (NAT folders of any age among it):

        - folders and hub ids of transformers' DiNAT, which become a NAT with ``config.dilations``;
        - state dicts of the original repository (``.pth``, with layer scale or not), or a folder that holds one:
          of classifiers, and for `NatBackbone` of detectors and segmenters too. The configuration is told by the
          weights. They are read with ``weights_only=True``. A DiNAT's dilations are not in its weights: give
          ``dilations=`` where nothing else in the file or its name tells them;
        - a file of weights under transformers' names without its config.json, if ``config=`` is given.

        Args:
            pretrained_model_name_or_path: what to load.
            *model_args: for the model's ``__init__``.
            **kwargs: as in transformers: ``config``, ``dtype``, ``num_labels``, ``ignore_mismatched_sizes``, ... and
                any argument of `NatConfig`, which wins over the checkpoint's.

        Raises:
            CheckpointError: an original checkpoint lacks weights of the NAT, has unknown ones, or is none.
            FileError: the file cannot be read.
            OSError: as transformers raises it, for a folder or hub id that it cannot read.
        """
        name = pretrained_model_name_or_path
        if getattr(kwargs.get("config"), "model_type", None) == "dinat":
            kwargs["config"] = NatConfig.from_dict(kwargs["config"].to_dict())
        file = None if name is None else find_file(name, kwargs.get("subfolder", ""))
        original = None if file is None else read_original(file)
        folder = None if file is None else folder_of(file)
        if original is None or (folder is not None and original.is_of_transformers):
            kwargs["key_mapping"] = cls._renames | (kwargs.get("key_mapping") or {})
            return super().from_pretrained(folder or name, *model_args, **kwargs)

        config = kwargs.pop("config", None)
        kwargs.pop("subfolder", None)
        # "auto" is the weights' dtype, as without it; a configuration would take it for the name of one
        kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "torch_dtype") or v != "auto"}
        if config is None and original.is_of_transformers:
            raise CheckpointError(
                f"{original.name} is in the names of transformers already, which do not tell the configuration: name a "
                "folder that holds it and its config.json, or give config=."
            )
        if config is None and folder is None:
            config, _ = infer_config(original, dilations=kwargs.get("dilations"))
            config, kwargs = NatConfig.from_dict(config.to_dict(), return_unused_kwargs=True, **kwargs)
        elif not isinstance(config, NatConfig):
            source: Any = config or folder
            config, kwargs = NatConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
        if original.is_of_transformers:  # weights alone; what is of another kind of model is transformers' to sort out
            weights = original.backbone | original.heads
            kwargs["key_mapping"] = cls._renames | (kwargs.get("key_mapping") or {})
        else:
            weights = weights_for(original, cls, config, cls._nat_prefix)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=weights, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(name)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what was loaded from a DiNAT is a NAT now, and is saved under a NAT's names."""
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' own rule: normal(initializer_range) weights, zero biases, ones and zeros for the norms.
        # Parameters that belong to no layer must be set here too: models are made without memory when a checkpoint is
        # loaded, and what the checkpoint lacks is filled by this function alone. `init` leaves alone what has been
        # loaded.
        super()._init_weights(module)
        if self.config.initializer_range == 0 and isinstance(module, (nn.Linear, nn.Conv2d)):
            init.zeros_(module.weight)  # transformers takes 0 for not given
        if isinstance(module, NeighborhoodAttention):
            init.zeros_(module.rpb)
        elif isinstance(module, NatLayer) and module.layer_scale_parameters is not None:
            init.constant_(module.layer_scale_parameters, module.layer_scale_init_value)

    def _flag(self, value: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name) if value is None else value)


class NatModel(NatPreTrainedModel):
    """NAT without a head.

    Args:
        config: the model's settings.
        add_pooling_layer: whether ``pooler_output`` is computed.
    """

    def __init__(self, config: NatConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.num_levels = len(config.depths)
        self.num_features = int(config.embed_dim * 2 ** (self.num_levels - 1))
        self.add_pooling_layer = add_pooling_layer

        self.embeddings = NatEmbeddings(config)
        self.encoder = NatEncoder(config)
        self.layernorm = nn.LayerNorm(self.num_features, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NatModelOutput | tuple:
        """Features of a batch of images.

        Args:
            pixel_values: ``(batch, num_channels, height, width)``, any height and width.
            output_attentions, output_hidden_states: whether to return them; default: the configuration's.
            return_dict: False for a plain tuple ``(last_hidden_state, pooler_output[, hidden_states][, attentions])``.

        Returns:
            `NatModelOutput`
        """
        if pixel_values is None:
            raise ArgumentError(
                "You have to specify pixel_values, a tensor (batch, channels, height, width); got None."
            )
        outputs = self.encoder(
            self.embeddings(pixel_values),
            output_attentions=self._flag(output_attentions, "output_attentions"),
            output_hidden_states=self._flag(output_hidden_states, "output_hidden_states"),
        )
        last_hidden_state = self.layernorm(outputs.last_hidden_state)
        pooler_output = last_hidden_state.mean(dim=(1, 2)) if self.add_pooling_layer else None
        if not self._flag(return_dict, "return_dict"):
            return (last_hidden_state, pooler_output, *_present(outputs.hidden_states, outputs.attentions))
        return NatModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooler_output,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class NatForImageClassification(NatPreTrainedModel):
    """NAT with a linear classifier on the mean of the last map."""

    # The loss is the mean over the batch for every problem type, so a Trainer that accumulates gradients has to divide
    # by the number of steps; it leaves that to models whose forward takes any keyword unless they say otherwise.
    accepts_loss_kwargs = False
    _nat_prefix = "nat."

    def __init__(self, config: NatConfig) -> None:
        super().__init__(config)
        if self.loss_type is None:  # transformers tells it by the class's name, which a subclass may not have
            self.loss_type = "ForImageClassification"
        self.num_labels: int = config.num_labels or 0
        self.nat = NatModel(config)
        self.classifier = nn.Linear(self.nat.num_features, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NatImageClassifierOutput | tuple:
        """Logits, and the loss when there are labels.

        Args:
            pixel_values: ``(batch, num_channels, height, width)``, any height and width.
            labels: ``(batch,)`` integers for cross-entropy, ``(batch, num_labels)`` floats for several labels at once,
                or any floats with ``num_labels`` 1 for regression; ``config.problem_type`` is set by the first batch
                unless it is given.
            output_attentions, output_hidden_states: whether to return them; default: the configuration's.
            return_dict: False for a plain tuple ``([loss, ]logits[, hidden_states][, attentions])``.

        Returns:
            `NatImageClassifierOutput`
        """
        outputs = self.nat(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        if not self._flag(return_dict, "return_dict"):
            return (*_present(loss), logits, *_present(outputs.hidden_states, outputs.attentions))
        return NatImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class NatBackbone(BackboneMixin, NatPreTrainedModel):
    """NAT as a feature pyramid for detection and segmentation heads.

    Maps of the stages in ``config.out_features``, each with a layer norm of its own; the strides are ``patch_size`` for
    ``stem`` and ``stage1``, then twice as much with each stage. Stages after the last one asked for do not run.

    ``from_pretrained`` also takes the folder of a head of transformers with a NAT inside, and leaves the head.
    """

    # A head's folder: where UPerNet and VitMatte, the DETR family, and MaskFormer and Mask2Former keep their backbone.
    _renames = NatPreTrainedModel._renames | {
        r"^(?:model\.)?backbone\.(?:conv_encoder\.)?(?:model\.)?": "",
        r"^model\.pixel_level_module\.encoder\.": "",
    }

    def __init__(self, config: NatConfig) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # TODO: drop when the oldest supported transformers does this in __init__
            self._init_backbone(config)  # type: ignore[operator]
        self.num_features = [config.embed_dim, *(int(config.embed_dim * 2**i) for i in range(len(config.depths)))]
        self.embeddings = NatEmbeddings(config)
        self.encoder = NatEncoder(config)
        self.hidden_states_norms = nn.ModuleDict(
            {stage: nn.LayerNorm(channels) for stage, channels in zip(self.out_features, self.channels, strict=True)}
        )
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """Feature maps of a batch of images.

        Args:
            pixel_values: ``(batch, num_channels, height, width)``, any height and width.
            output_hidden_states: whether to return all maps ``(batch, height, width, channels)``, before their norms
                and before downsampling, the stem's first; default: the configuration's.
            output_attentions: as in `NatModel`.
            return_dict: False for a plain tuple ``(feature_maps[, hidden_states])``.

        Returns:
            `transformers.modeling_outputs.BackboneOutput`, with ``feature_maps`` a tuple of contiguous
            ``(batch, channels, height, width)`` in the order of the stages.
        """
        output_hidden_states = self._flag(output_hidden_states, "output_hidden_states")
        output_attentions = self._flag(output_attentions, "output_attentions")
        everything = output_hidden_states or output_attentions
        outputs = self.encoder(
            self.embeddings(pixel_values),
            output_attentions=output_attentions,
            output_hidden_states=True,
            output_hidden_states_before_downsampling=True,
            num_levels=None if everything else max(self.stage_names.index(stage) for stage in self.out_features),
        )
        feature_maps = tuple(
            self._norm(stage)(state).permute(0, 3, 1, 2).contiguous()
            for stage, state in zip(self.stage_names, outputs.hidden_states, strict=False)
            if stage in self.out_features
        )
        hidden_states = outputs.hidden_states if output_hidden_states else None
        if not self._flag(return_dict, "return_dict"):
            return (feature_maps, *_present(hidden_states))
        return BackboneOutput(feature_maps=feature_maps, hidden_states=hidden_states, attentions=outputs.attentions)

    def _norm(self, stage: str) -> nn.Module:
        if stage not in self.hidden_states_norms:
            raise ArgumentError(
                f"out_features asks for {stage!r}, but this backbone was built for {list(self.hidden_states_norms)}: "
                "each stage needs a norm of its own. Set out_features before the backbone is built."
            )
        return self.hidden_states_norms[stage]


def _present(*values: object) -> tuple:
    return tuple(value for value in values if value is not None)


__all__ = ["NatBackbone", "NatForImageClassification", "NatModel", "NatPreTrainedModel"]
