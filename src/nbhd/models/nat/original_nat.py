"""Checkpoints of the original NAT repository (github.com/SHI-Labs/Neighborhood-Attention-Transformer).

    patch_embed.proj.N                  embeddings.patch_embeddings.projection.N
    patch_embed.norm                    embeddings.norm
    levels.I.blocks.J.norm1, norm2      encoder.levels.I.layers.J.layernorm_before, layernorm_after
    levels.I.blocks.J.attn.rpb          encoder.levels.I.layers.J.attention.self.rpb
    levels.I.blocks.J.attn.qkv          encoder.levels.I.layers.J.attention.self.query, key, value (thirds of the rows)
    levels.I.blocks.J.attn.proj         encoder.levels.I.layers.J.attention.output.dense
    levels.I.blocks.J.mlp.fc1, fc2      encoder.levels.I.layers.J.intermediate.dense, output.dense
    levels.I.blocks.J.gamma1, gamma2    encoder.levels.I.layers.J.layer_scale_parameters (rows 0 and 1)
    levels.I.downsample                 encoder.levels.I.downsample
    norm, head                          layernorm, classifier           (classification)
    norm0, norm1, ...                   hidden_states_norms.stage1, ... (detection and segmentation)

Detection and segmentation put ``backbone.`` before these names and add heads of their own. A DiNAT has the names and
the shapes of a NAT: its dilations are in no weight. They are taken from what else the checkpoint says (mmdetection and
mmsegmentation keep the text of their configuration), or are the published ones if the file's name is a published
model's.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbhd.errors import ArgumentError, CheckpointError
from nbhd.models.nat.configuration_nat import PATCH_SIZES, NatConfig
from nbhd.models.nat.variants import VARIANTS

_BLOCK = r"levels\.(\d+)\.blocks\.(\d+)\."
_LAYER = r"encoder.levels.\1.layers.\2."
_RENAMES = [
    (re.compile(rf"^{pattern}"), target)
    for pattern, target in [
        (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"patch_embed\.norm\.", "embeddings.norm."),
        (_BLOCK + r"norm1\.", _LAYER + "layernorm_before."),
        (_BLOCK + r"norm2\.", _LAYER + "layernorm_after."),
        (_BLOCK + r"attn\.rpb$", _LAYER + "attention.self.rpb"),
        (_BLOCK + r"attn\.proj\.", _LAYER + "attention.output.dense."),
        (_BLOCK + r"mlp\.fc1\.", _LAYER + "intermediate.dense."),
        (_BLOCK + r"mlp\.fc2\.", _LAYER + "output.dense."),
        (r"levels\.(\d+)\.downsample\.", r"encoder.levels.\1.downsample."),
        (r"norm\.", "layernorm."),
        (r"head\.", "classifier."),
    ]
]
_QKV = re.compile(rf"^{_BLOCK}attn\.qkv\.(weight|bias)$")
_GAMMA = re.compile(rf"^{_BLOCK}gamma([12])$")
_STAGE_NORM = re.compile(r"^norm(\d+)\.(weight|bias)$")


#: What DistributedDataParallel and torch.compile put before every name.
WRAPPERS = r"(?:module\.|_orig_mod\.)*"


@dataclass(frozen=True)
class Original:
    """A checkpoint taken apart.

    Args:
        backbone: weights of the NAT under the original's names, without a prefix; ``head`` of a classifier is one.
        heads: the weights of heads for detection or segmentation, under their own names.
        kind: ``"nat"``, ``"dinat"``, or None where nothing says which.
        name: where it comes from, for messages and as a source of the published model's name.
        settings: arguments of `NatConfig` that are written down beside the weights.
        classes: names of the classes, if they are.
    """

    backbone: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    kind: str | None = None
    name: str = "the checkpoint"
    settings: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None

    @property
    def is_of_transformers(self) -> bool:
        """Whether the weights have transformers' names, not the original's."""
        return not is_original(list(self.backbone)) and any("embeddings.patch_embeddings." in n for n in self.backbone)


def is_original(names: Sequence[str]) -> bool:
    """Whether these are names of the original repository (or its prefixed ones, or the Swin-like DiNAT_s's)."""
    return any(re.match(rf"{WRAPPERS}(backbone\.)?patch_embed\.proj\.", name) for name in names)


def take_apart(state_dict: Mapping[str, Tensor], path: Path, content: object = None) -> Original:
    """Tell the NAT's weights from the heads', and read what the file says about itself.

    Args:
        state_dict: the weights under the original's names.
        path: the file; its name may say which model it is.
        content: all that the file holds, if it holds more.
    """
    prefix = "backbone." if any(name.startswith("backbone.") for name in state_dict) else ""
    backbone = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    heads = {name: value for name, value in state_dict.items() if not name.startswith(prefix)}

    meta = content.get("meta") if isinstance(content, Mapping) else None
    written = _written_settings(meta) if isinstance(meta, Mapping) else {}
    said = [str(written.pop("type", ""))]
    if isinstance(content, Mapping):
        arguments = content.get("args")
        said += [str(content.get("arch", "")), str(getattr(arguments, "model", ""))]
    # The file's own name last: files get renamed.
    found = (re.search(r"(?<![a-z])(di)?nat(?![a-z])", text, re.IGNORECASE) for text in [*said, path.stem])
    match = next((match for match in found if match), None)
    kind = None if match is None else "dinat" if match[1] else "nat"
    return Original(backbone, heads, kind, str(path), written, _classes(meta) if isinstance(meta, Mapping) else None)


def infer_config(original: Original | Mapping[str, Tensor], **settings: Any) -> tuple[NatConfig, str | None]:
    """The configuration that fits the weights' shapes, and the name of the published model with these, or None.

    Args:
        original: the checkpoint, or weights under the original's names.
        **settings: arguments of `NatConfig` that the weights do not tell; they win over what the checkpoint says,
            unless they are None.

    Raises:
        CheckpointError: the weights are not of a NAT, or of a DiNAT whose dilations nothing tells.
    """
    original = original if isinstance(original, Original) else Original(dict(original))
    settings = {key: value for key, value in settings.items() if value is not None}
    found = _sizes(original.backbone)
    variants = [
        name
        for name, published in VARIANTS.items()
        if all(getattr(NatConfig(**published), key) == value for key, value in found.items())
    ]
    dilated = "dilations" in settings or (variants and all(name[:5] == "dinat" for name in variants))
    kind = original.kind or ("dinat" if dilated else "nat")
    variants = [name for name in variants if name.startswith(kind)]
    found["num_labels"] = original.backbone["head.weight"].shape[0] if "head.weight" in original.backbone else 0
    stages = sorted(int(match[1]) + 1 for name in original.backbone if (match := re.match(r"norm(\d+)\.weight$", name)))
    if stages:
        found["out_features"] = [f"stage{stage}" for stage in stages]
    given = found | original.settings | settings
    # Other dilations than the published classifiers' are used for other tasks, so those say nothing about these.
    if kind == "dinat" and given.get("dilations") is None:
        variants = [] if stages or original.heads else _by_resolution(variants, original.name)
        if len(variants) != 1:
            raise CheckpointError(
                f"{original.name} is a DiNAT, whose dilations are not in its weights. Give them as dilations, one list "
                f"for each of the stages {found['depths']} with one entry for each layer."
            )
        given["dilations"] = VARIANTS[variants[0]]["dilations"]
    variant = next((name for name in variants if VARIANTS[name].get("dilations") == given.get("dilations")), None)
    if variant is not None:
        given.setdefault("drop_path_rate", VARIANTS[variant]["drop_path_rate"])
    try:
        return NatConfig(**given), variant
    except ArgumentError as error:
        raise CheckpointError(f"{original.name} does not make a NAT: {error}") from error


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of `NatModel`, ``classifier`` and `NatBackbone`; unknown names stay as they are."""
    renamed: dict[str, Tensor] = {}
    gammas: dict[str, dict[str, Tensor]] = {}
    for name, value in state_dict.items():
        if match := _QKV.match(name):
            prefix = match.expand(_LAYER) + "attention.self."
            thirds = value.tensor_split(3) if value.ndim else [value] * 3
            for part, third in zip(("query", "key", "value"), thirds, strict=True):
                renamed[f"{prefix}{part}.{match[3]}"] = third.clone()  # safetensors takes no views of shared memory
        elif match := _GAMMA.match(name):
            gammas.setdefault(match.expand(_LAYER), {})[match[3]] = value
        elif match := _STAGE_NORM.match(name):
            renamed[f"hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}"] = value
        else:
            for pattern, target in _RENAMES:
                new, count = pattern.subn(target, name)
                if count:
                    break
            renamed[new if count else name] = value
    for prefix, pair in gammas.items():
        if set(pair) != {"1", "2"} or pair["1"].shape != pair["2"].shape:
            raise CheckpointError(f"the checkpoint is incomplete: {prefix} needs gamma1 and gamma2 of one size.")
        renamed[prefix + "layer_scale_parameters"] = torch.stack([pair["1"], pair["2"]])
    return renamed


def _sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `NatConfig` that shapes tell."""
    if any(re.match(r"layers\.\d+\.blocks\.", name) for name in state_dict) or "patch_embed.proj.weight" in state_dict:
        raise CheckpointError(
            "this is a DiNAT_s, an isotropic NAT or a Swin: their patch embedding and downsampling are others, and "
            "there is no model for them here. Name a checkpoint of a NAT or a DiNAT."
        )
    convolutions = [name for name in state_dict if re.fullmatch(r"patch_embed\.proj\.\d+\.weight", name)]
    if not convolutions:
        near = (
            "it is in the names of transformers already: name the folder that holds it and its config.json"
            if any("encoder.levels." in name for name in state_dict)
            else f"its first entries are {', '.join(list(state_dict)[:3])}"
        )
        raise CheckpointError(f"this is not a checkpoint of the original NAT: patch_embed.proj is missing ({near}).")
    first, last = (_shape(state_dict, f"patch_embed.proj.{i}.weight", 4) for i in (0, len(convolutions) - 1))
    patch_size = 2 ** len(convolutions)
    if patch_size not in PATCH_SIZES:
        raise CheckpointError(f"patch_embed.proj has {len(convolutions)} convolutions; a NAT has 1, 2 or 3.")

    blocks: dict[int, set[int]] = {}
    for name in state_dict:
        if match := re.match(_BLOCK, name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    if (
        sorted(blocks) != list(range(len(blocks)))
        or any(sorted(b) != list(range(len(b))) for b in blocks.values())
        or not blocks
    ):
        raise CheckpointError(f"the checkpoint is incomplete: of its stages it has the blocks {blocks}.")
    depths = [len(blocks[i]) for i in range(len(blocks))]
    biases = [_shape(state_dict, f"levels.{i}.blocks.0.attn.rpb", 3) for i in range(len(depths))]
    if "head.weight" in state_dict:
        _shape(state_dict, "head.weight", 2)
    return {
        "patch_size": patch_size,
        "num_channels": first[1],
        "embed_dim": last[0],
        "depths": depths,
        "num_heads": [bias[0] for bias in biases],
        "kernel_size": (biases[0][1] + 1) // 2,
        "mlp_ratio": _ratio(_shape(state_dict, "levels.0.blocks.0.mlp.fc1.weight", 2)[0], last[0]),
        "qkv_bias": "levels.0.blocks.0.attn.qkv.bias" in state_dict,
        # Any value above 0 makes room for the weights; published models with layer scale started from this one.
        "layer_scale_init_value": 1e-5 if "levels.0.blocks.0.gamma1" in state_dict else 0.0,
    }


def _ratio(hidden: int, dim: int) -> float:
    """The ratio for which ``int(ratio * dim)`` is ``hidden``; the quotient itself may be rounded down to one less."""
    ratio = hidden / dim
    return ratio if int(ratio * dim) == hidden else math.nextafter(ratio, math.inf)


def _by_resolution(variants: list[str], name: str) -> list[str]:
    """Of models of one shape but other dilations for pictures of 384, those that the file's name says."""
    if len({str(VARIANTS[variant]["dilations"]) for variant in variants}) == 1:
        return variants[:1]
    large = "384" in Path(name).stem
    if not large and "224" not in Path(name).stem:
        return []
    return [variant for variant in variants if ("384" in variant) == large]


def _written_settings(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the text of an mmcv or mmengine configuration says of the backbone; it is parsed, never run."""
    text = next((meta[key] for key in ("config", "cfg") if isinstance(meta.get(key), str)), "")
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    written: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and [getattr(t, "id", "") for t in statement.targets] == ["model"]:
            entry = _entries(statement.value).get("backbone")
            for key, node in ({} if entry is None else _entries(entry)).items():
                if key in ("type", "dilations", "drop_path_rate"):
                    try:
                        written[key] = ast.literal_eval(node)
                    except (ValueError, TypeError, SyntaxError, RecursionError):
                        continue
    return {key: value for key, value in written.items() if value is not None}


def _entries(node: ast.expr) -> dict[str, ast.expr]:
    """Keys and values of ``dict(a=...)`` or ``{"a": ...}``."""
    if isinstance(node, ast.Call):
        return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        return {
            str(key.value): value
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant)
        }
    return {}


def _classes(meta: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes, where mmsegmentation 0.x or 1.x keeps them."""
    inner = meta.get("dataset_meta")
    classes = inner.get("classes") if isinstance(inner, Mapping) else meta.get("CLASSES")
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        return None
    return list(classes)


def _shape(state_dict: Mapping[str, Tensor], name: str, axes: int) -> Sequence[int]:
    if name not in state_dict:
        raise CheckpointError(f"the checkpoint is incomplete: {name} is missing.")
    shape = tuple(state_dict[name].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{name} must have {axes} axes, none of them empty, got {shape}.")
    return shape
