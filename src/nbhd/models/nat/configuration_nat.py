"""Configuration of the Neighborhood Attention Transformer."""

from __future__ import annotations

import copy
import difflib
import inspect
import operator
import os
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from nbhd.errors import ArgumentError, CheckpointError
from nbhd.models._transformers import BackboneConfigMixin
from nbhd.models.nat.variants import VARIANTS

PATCH_SIZES = (2, 4, 8)
#: The default; no other object is it, so that heads that were given can be told from it.
_HEADS = (2, 4, 8, 16)

#: Arguments of ``from_pretrained`` that say where to look, not what to set.
_DOWNLOAD_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code", "gguf_file", "_commit_hash", "_from_auto", "_from_pipeline",
)  # fmt: skip


class NatConfig(BackboneConfigMixin, PreTrainedConfig):
    """Settings of a NAT, with the names, the order and the defaults of transformers 4.40.2, which give ``nat_mini``.

    A NAT has a stem that divides each side of the image by ``patch_size`` and then ``len(depths)`` stages; between two
    stages the sides are halved and the channels doubled. Sides are rounded up, so images of any size are taken.

    Args:
        patch_size: by how much the stem shrinks each side: 2, 4 or 8 (as many convolutions of stride 2 as it takes).
        num_channels: channels of the image.
        embed_dim: channels of the first stage; stage ``i`` (from 0) has ``embed_dim * 2**i``.
        depths: layers of each stage.
        num_heads: attention heads of each stage; they must divide its channels. ``num_attention_heads`` is another name
            of it.
        kernel_size: side of the attention window. A smaller map is first zero-padded at its lower and right border.
        mlp_ratio: hidden channels of the MLP, as a multiple of the stage's channels (rounded down).
        qkv_bias: whether query, key and value have biases.
        hidden_dropout_prob: dropout after the stem and after the MLP.
        attention_probs_dropout_prob: dropout of the attention probabilities and after the output projection.
        drop_path_rate: stochastic depth of the last layer; it grows linearly from 0 at the first. Training on a CPU
            skips what is dropped.
        hidden_act: activation of the MLP, a name transformers knows or a callable.
        initializer_range: standard deviation of the normal distribution that weights start from.
        layer_norm_eps: epsilon of the layer norms in the layers and at the end (those of the stem, between the stages
            and of the backbone's maps always have 1e-5).
        layer_scale_init_value: start of the per-channel factors on both residual branches; 0 or less means none.
        out_features: for `NatBackbone`, stages whose maps it returns, out of ``"stem", "stage1", ...`` in this order.
            Default: the stages of ``out_indices``, or the last one.
        out_indices: the same by index, 0 being the stem.
        dilations: dilation of each layer, one list a stage; default 1 everywhere. With dilations it is a DiNAT.
        **kwargs: what every transformers configuration takes (``num_labels``, ...); others become attributes.

    Raises:
        ArgumentError: a value no model could have. The channels are checked against the heads when a model is built.

    Example:
        >>> NatConfig.from_variant("nat_tiny", num_labels=10).depths
        [3, 4, 18, 5]
    """

    model_type = "nat"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012

    # Where transformers makes dataclasses of configurations, what `dataclasses.replace` and `asdict` take along.
    patch_size: int
    num_channels: int
    embed_dim: int
    depths: list[int]
    num_heads: list[int]
    kernel_size: int
    mlp_ratio: float
    qkv_bias: bool
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    drop_path_rate: float
    hidden_act: str | Callable
    initializer_range: float
    layer_norm_eps: float
    layer_scale_init_value: float
    dilations: list[list[int]] | None
    stage_names: list[str]
    _out_features: list[str] | None
    _out_indices: list[int] | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        has_its_own = "__init__" in cls.__dict__
        super().__init_subclass__(**kwargs)
        # Where transformers makes a dataclass of it that has one made of the annotations alone, which have no defaults.
        if not has_its_own and "__init__" in cls.__dict__:
            del cls.__init__

    # Hand-written rather than the dataclass's: 4.40.2 took positional arguments and did not tell 2 from 2.0.
    def __init__(
        self,
        patch_size: int = 4,
        num_channels: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = _HEADS,
        kernel_size: int = 7,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        hidden_act: str | Callable = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        layer_scale_init_value: float = 0.0,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        dilations: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        if (heads := kwargs.pop("num_attention_heads", None)) is not None:
            num_heads = _one_of_both(num_heads, heads)
        # From `dataclasses.replace`: the stages that were selected out of these.
        selected = kwargs.pop("_out_features", None), kwargs.pop("_out_indices", None)
        selected_from = kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.embed_dim = embed_dim
        self.depths = _as_list("depths", depths)
        self.num_heads = _as_list("num_heads", num_heads)
        self.kernel_size = kernel_size
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale_init_value = layer_scale_init_value
        self.dilations = (
            None if dilations is None else [_as_list("dilations", d) for d in _as_list("dilations", dilations)]
        )
        self.check()

        self.num_layers = len(self.depths)
        # Channels after the last stage; VisionEncoderDecoderModel asks for this name.
        self.hidden_size = int(self.embed_dim * 2 ** (len(self.depths) - 1))
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(self.depths)))]
        if out_features is None and out_indices is None and selected_from == self.stage_names:
            out_features, out_indices = selected
        self._select_stages(out_features, out_indices)

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> NatConfig:
        """A published model's settings: ``nat_mini``, ``nat_tiny``, ``nat_small`` or ``nat_base``, with 1000 labels.

        Args:
            name: one of `nbhd.models.nat.variants.VARIANTS`.
            **overrides: arguments of `NatConfig` that differ from the published ones, e.g. ``num_labels``.
        """
        if name not in VARIANTS:
            near = difflib.get_close_matches(str(name), VARIANTS, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"name must be one of {', '.join(VARIANTS)}, got {name!r}.{hint}")
        settings: dict[str, Any] = copy.deepcopy(VARIANTS[name])
        if "id2label" not in overrides:
            settings["num_labels"] = 1000
        if overrides.get("num_attention_heads") is not None:
            del settings["num_heads"]
        return cls(**(settings | overrides))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings in a folder or a hub repository, NAT's or DiNAT's, or those an original checkpoint tells.

        Of a model with a NAT or a DiNAT inside, such as a head with its backbone, they are those of what is inside.

        Raises:
            CheckpointError: the folder is of another model, without one inside.
        """
        from nbhd.models.nat.loading_nat import find_file, folder_of, read_original
        from nbhd.models.nat.original_nat import infer_config

        file = find_file(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        if file is None or folder_of(file) is not None:
            name = pretrained_model_name_or_path if file is None else file.parent
            config_dict, kwargs = super().get_config_dict(name, **kwargs)
            return _without_dinat(_inside(config_dict, name, cls.model_type)), kwargs
        config, _ = infer_config(read_original(file), dilations=kwargs.get("dilations"))
        return config.to_dict(), {key: value for key, value in kwargs.items() if key not in _DOWNLOAD_ARGUMENTS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration with these settings; those of a `DinatConfig` become a NAT's with dilations.

        Arguments of the class among ``kwargs`` win over them, and are checked and made lists as the class does it.
        """
        settings = _without_dinat(config_dict)
        known = _arguments(NatConfig) | _arguments(cls)  # a subclass may pass on what it does not name
        if (heads := kwargs.pop("num_attention_heads", None)) is not None:
            kwargs["num_heads"] = _one_of_both(kwargs.get("num_heads", _HEADS), heads)
        given = {name: kwargs.pop(name) for name in tuple(kwargs) if name in known}
        if "num_heads" in given:
            settings = {name: value for name, value in settings.items() if name != "num_attention_heads"}
        depths = _as_list("depths", given.get("depths", settings.get("depths", ())))
        has_other_stages = len(depths) != len(settings.get("depths", depths))
        if has_other_stages or given.keys() & {"out_features", "out_indices"}:
            settings = {name: value for name, value in settings.items() if name not in ("out_features", "out_indices")}
        return super().from_dict(settings | given, **kwargs)

    def layer_dilations(self, stage: int) -> list[int]:
        """Dilation of each layer of ``stage`` (from 0)."""
        return [1] * self.depths[stage] if self.dilations is None else list(self.dilations[stage])

    def check(self) -> None:
        """Raise an `ArgumentError` for a value no model could have; called again when a model is built."""
        if self.patch_size not in PATCH_SIZES:
            raise ArgumentError(
                f"patch_size must be one of {PATCH_SIZES}, got {self.patch_size!r}. Published models use 4."
            )
        _check_integer("num_channels", self.num_channels, 1)
        # The stem reaches embed_dim by doubling, one convolution per factor 2.
        _check_integer("embed_dim", self.embed_dim, self.patch_size // 2)
        _check_integer("kernel_size", self.kernel_size, 1)
        if not self.depths:
            raise ArgumentError(
                "depths must have at least one stage, got []. Give the layers of each, e.g. [3, 4, 6, 5]."
            )
        for depth in self.depths:
            _check_integer("depths", depth, 0, self.depths)
        for heads in self.num_heads:
            _check_integer("num_heads", heads, 1, self.num_heads)
        # 4.40.2 ignores heads beyond the last stage.
        if len(self.num_heads) < len(self.depths):
            raise ArgumentError(
                f"num_heads needs one entry for each of the {len(self.depths)} stages in depths {self.depths}, "
                f"got {len(self.num_heads)}: {self.num_heads}. Give as many heads as depths."
            )
        self._check_dilations()
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ArgumentError(f"{name} must be a probability in [0, 1], got {value!r}. Use 0.0 to switch it off.")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value) or not value >= 0:
                raise ArgumentError(f"{name} must be a number of at least 0, got {value!r}.")
        if not _is_number(self.layer_scale_init_value):
            raise ArgumentError(
                f"layer_scale_init_value must be a number, got {self.layer_scale_init_value!r}. Use 0.0 for none."
            )
        if not _is_number(self.mlp_ratio) or int(self.mlp_ratio * self.embed_dim) < 1:
            raise ArgumentError(
                f"mlp_ratio must give the MLP at least one channel of embed_dim {self.embed_dim}, "
                f"got {self.mlp_ratio!r}. Published models use 3.0 or 2.0."
            )
        if isinstance(self.hidden_act, str):
            if self.hidden_act not in ACT2FN:
                near = difflib.get_close_matches(self.hidden_act, ACT2FN, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Published models use 'gelu'."
                raise ArgumentError(
                    f"hidden_act must be an activation of transformers, got {self.hidden_act!r}. {hint}"
                )
        elif not callable(self.hidden_act):
            raise ArgumentError(
                f"hidden_act must be a name or a callable, got {self.hidden_act!r}. Published models use 'gelu'."
            )

    def check_heads(self) -> None:
        """Raise an `ArgumentError` where the heads of a stage do not divide its channels."""
        # Not part of `check`: 4.40.2 lets a configuration exist that no model can be built from, and tools change one
        # piecewise.
        for stage, heads in enumerate(self.num_heads[: len(self.depths)]):
            dim = int(self.embed_dim * 2**stage)
            if dim % heads:
                near = max(n for n in range(1, min(heads, dim) + 1) if dim % n == 0)
                raise ArgumentError(
                    f"num_heads must divide the channels of each stage: stage{stage + 1} has {dim} channels "
                    f"(embed_dim {self.embed_dim} * 2**{stage}), which is not a multiple of {heads}. "
                    f"Use {near} heads there."
                )

    def _check_dilations(self) -> None:
        if self.dilations is None:
            return
        lengths = [len(stage) for stage in self.dilations]
        if lengths != self.depths:
            raise ArgumentError(
                f"dilations needs one list for each stage with one entry for each layer: depths is {self.depths}, "
                f"but the lists have {lengths} entries. Leave dilations out for 1 everywhere."
            )
        for stage in self.dilations:
            for dilation in stage:
                _check_integer("dilations", dilation, 1, self.dilations)

    def _select_stages(self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None) -> None:
        """Align both namings of the stages a backbone returns; the mixin's setters keep them aligned afterwards."""
        names: Any = list(out_features) if isinstance(out_features, tuple) else out_features
        indices: Any = list(out_indices) if isinstance(out_indices, tuple) else out_indices
        if names == [] or indices == []:
            raise ArgumentError(
                f"out_features and out_indices must name at least one stage, got []. The stages are {self.stage_names}."
            )
        try:
            if names is not None:
                self.out_features = names
                derived = list(self.out_indices)
                if indices is not None and [i % len(self.stage_names) for i in indices] != derived:
                    raise ArgumentError(
                        f"out_features and out_indices should correspond to the same stages if both are set, "
                        f"got {names} and {indices}. Give one of them; the indices are {derived}."
                    )
                if indices is not None:
                    self._out_indices = indices
            else:
                self.out_indices = indices
        except ArgumentError:
            raise
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{error}. The stages are {self.stage_names}.") from error

    # A dataclass's own __eq__, which transformers 5 generates, would compare the base class's fields only.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, NatConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]


def _arguments(kind: type) -> set[str]:
    """What can be given to ``kind`` by name."""
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


def _as_list(name: str, value: Any) -> list:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ArgumentError(
            f"{name} must be a list with one entry for each stage, got {value!r}. Write e.g. [{value!r}]."
        )
    # what goes into a JSON must be Python's own numbers
    return [entry.tolist() if isinstance(entry, (np.generic, np.ndarray)) else entry for entry in value]


def _one_of_both(num_heads: Any, num_attention_heads: Any) -> list:
    """The heads under both of their names, one of which may be left at the default."""
    heads = _as_list("num_attention_heads", num_attention_heads)
    if num_heads is not _HEADS and _as_list("num_heads", num_heads) != heads:
        raise ArgumentError(
            f"num_heads and num_attention_heads are two names of the same and must not differ, got {num_heads!r} and "
            f"{num_attention_heads!r}. Give one of them."
        )
    return heads


def _inside(config_dict: dict[str, Any], name: object, own_type: str) -> dict[str, Any]:
    """The settings of the NAT or the DiNAT that these are of, or that is in the model they are of.

    So are those of ``own_type``, which a subclass of the configuration has.
    """
    places = (config_dict, config_dict.get("backbone_config"), *config_dict.values())
    for settings in places:
        if isinstance(settings, dict) and settings.get("model_type", "") in ("nat", "dinat", own_type):
            return settings
    if "model_type" not in config_dict:
        return config_dict
    raise CheckpointError(
        f"{name} is a {config_dict['model_type']}, and its configuration names no NAT or DiNAT inside. Name a folder "
        "of a NAT, or of a head with one."
    )


def _without_dinat(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The settings of a NAT that computes what a DiNAT of transformers with these settings does."""
    if config_dict.get("model_type") != "dinat":
        return config_dict
    # Where a DiNAT has no dilations it has those of its smallest model; entries beyond the depths go unread.
    dilations = config_dict.get("dilations") or VARIANTS["dinat_mini"]["dilations"]
    depths = config_dict.get("depths") or VARIANTS["dinat_mini"]["depths"]
    architectures = config_dict.get("architectures")
    return config_dict | {
        "model_type": NatConfig.model_type,
        "dilations": [stage[:depth] for stage, depth in zip(dilations, depths, strict=False)],
        "architectures": architectures and [name.replace("Dinat", "Nat") for name in architectures],
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, least: int, within: Any = None) -> None:
    where = "" if within is None else f" in {within}"
    try:
        operator.index(value)
    except TypeError:
        number = None
    else:
        number = value
    if number is None or isinstance(value, bool) or number < least:
        raise ArgumentError(
            f"{name} must be an integer of at least {least}, got {value!r}{where}. Use {least} or more."
        )
