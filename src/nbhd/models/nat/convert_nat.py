"""Checkpoints of the original NAT repository (github.com/SHI-Labs/Neighborhood-Attention-Transformer) to ours.

    patch_embed.proj.N                  embeddings.patch_embeddings.projection.N
    patch_embed.norm                    embeddings.norm
    levels.I.blocks.J.norm1, norm2      encoder.levels.I.layers.J.layernorm_before, layernorm_after
    levels.I.blocks.J.attn.rpb          encoder.levels.I.layers.J.attention.self.rpb
    levels.I.blocks.J.attn.qkv          encoder.levels.I.layers.J.attention.self.query, key, value (thirds of the rows)
    levels.I.blocks.J.attn.proj         encoder.levels.I.layers.J.attention.output.dense
    levels.I.blocks.J.mlp.fc1, fc2      encoder.levels.I.layers.J.intermediate.dense, output.dense
    levels.I.blocks.J.gamma1, gamma2    encoder.levels.I.layers.J.layer_scale_parameters (rows 0 and 1)
    levels.I.downsample                 encoder.levels.I.downsample
    norm, head                          layernorm, classifier

A DiNAT of the same repository has the same keys and shapes and converts too, but its dilations are not in the file:
they must be given.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbhd.errors import ArgumentError, CheckpointError, FileError
from nbhd.models.nat.configuration_nat import PATCH_SIZES, NatConfig
from nbhd.models.nat.image_processing_nat import NatImageProcessor
from nbhd.models.nat.modeling_nat import NatForImageClassification, NatModel, NatPreTrainedModel
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


@dataclass(frozen=True)
class Conversion:
    """What `convert_nat` wrote: the folder, the published variant it is (or None), and the number of parameters."""

    folder: Path
    variant: str | None
    parameters: int
    config: NatConfig


def convert_nat(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    image_size: int = 224,
    **settings: Any,
) -> Conversion:
    """Turn an original ``.pth`` into a folder that ``from_pretrained`` reads.

    The folder holds the configuration, the weights as safetensors and the image processor.

    Args:
        checkpoint: the file; see `load_original` for what may be in it.
        output: the folder to write. It must not exist or be empty, and appears only when all of it is written.
        labels: a file with the name of each class, see `read_labels`; without it they are called ``LABEL_0``, ...
        image_size: side of the images in pixels the image processor makes; the published models use 224.
        **settings: arguments of `NatConfig` that the weights do not tell, e.g. ``dilations`` or ``drop_path_rate``.

    Raises:
        FileError: the checkpoint or the labels cannot be read, or the folder cannot be written.
        CheckpointError: the checkpoint is not of a NAT, is damaged, or holds more than weights.
        ArgumentError: the output exists, or the labels do not match the classifier.
    """
    folder = _check_output(output)
    processor = NatImageProcessor.for_image_size(image_size)
    state_dict = load_original(checkpoint)
    names = None if labels is None else read_labels(labels)
    config, variant = infer_config(state_dict, **settings)
    if names is not None:
        if len(names) != config.num_labels:
            raise ArgumentError(
                f"labels must name each of the {config.num_labels} classes, but {labels} has {len(names)}. "
                "Give a file with one name for each class, in their order."
            )
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    model = build(state_dict, config)
    _write_folder(folder, model, processor)
    return Conversion(folder, variant, sum(p.numel() for p in model.parameters()), config)


def load_original(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a file, in the original's names.

    The file is one that ``torch.save`` wrote, with a state dict, or a dict that holds one under ``"state_dict"`` or
    ``"model"``, or it is a ``.safetensors``. Only weights are loaded: a pickle that would run code
    is refused, not executed.

    Raises:
        FileError: there is no such file, or it cannot be read.
        CheckpointError: it holds something else, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileError(f"cannot read {path}: it {what}. Name a checkpoint file of the original repository (.pth).")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            # timm, which trained the originals, stores its command line beside the weights; a Namespace holds plain
            # values only.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on pickles of other protocols, which are refused below
                content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise FileError(f"cannot read {path}: {error.strerror}. Check the file's permissions.") from error
    except Exception as error:
        # torch.load raises what its many readers raise: UnpicklingError, RuntimeError, EOFError, KeyError, ...
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds more than weights ({refused[1]}) and was not loaded, because that could run code. "
                "Save the model's state_dict() alone and convert that."
            ) from error
        reason = "" if isinstance(error, (pickle.UnpicklingError, KeyError)) else str(error).split(". ")[0].strip()
        raise CheckpointError(
            f"{path} is not a file that torch.save wrote, or it is damaged{reason and f' ({reason})'}. "
            "Name a checkpoint of the original repository (.pth)."
        ) from error

    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds {_kind(content)}, not a state dict: names and tensors are expected.")
    strange = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{path} is not a state dict: {strange[0]!r} is {_kind(content[strange[0]])}, not a tensor."
        )
    # DistributedDataParallel puts a prefix before every name.
    return {name.removeprefix("module."): value.detach() for name, value in content.items()}


def infer_config(state_dict: Mapping[str, Tensor], **settings: Any) -> tuple[NatConfig, str | None]:
    """The configuration that fits the weights' shapes, and the name of the published variant with these, or None.

    Args:
        state_dict: weights under the original's names.
        **settings: arguments of `NatConfig` that the weights do not tell; they win over the variant's.

    Raises:
        CheckpointError: the weights are not of a NAT.
    """
    convolutions = [name for name in state_dict if re.fullmatch(r"patch_embed\.proj\.\d+\.weight", name)]
    if not convolutions:
        near = (
            "it is in the names of transformers already: use it as it is"
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
    found: dict[str, Any] = {
        "patch_size": patch_size,
        "num_channels": first[1],
        "embed_dim": last[0],
        "depths": depths,
        "num_heads": [bias[0] for bias in biases],
        "kernel_size": (biases[0][1] + 1) // 2,
        "mlp_ratio": _shape(state_dict, "levels.0.blocks.0.mlp.fc1.weight", 2)[0] / last[0],
        "qkv_bias": "levels.0.blocks.0.attn.qkv.bias" in state_dict,
        # Any value above 0 makes room for the weights; published models with layer scale started from this one.
        "layer_scale_init_value": 1e-5 if "levels.0.blocks.0.gamma1" in state_dict else 0.0,
        "num_labels": _shape(state_dict, "head.weight", 2)[0] if "head.weight" in state_dict else 0,
    }
    variant = None
    for name, published in VARIANTS.items():
        whole = NatConfig(**published)
        if all(getattr(whole, key) == value for key, value in found.items() if key != "num_labels"):
            variant = name
            found["drop_path_rate"] = published["drop_path_rate"]
    try:
        return NatConfig(**(found | settings)), variant
    except ArgumentError as error:
        raise CheckpointError(f"the weights do not make a NAT: {error}") from error


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of `NatModel` (and ``classifier``); unknown names stay as they are."""
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


def build(state_dict: Mapping[str, Tensor], config: NatConfig) -> NatPreTrainedModel:
    """The model with these weights, which are under the original's names; without ``head`` it is a `NatModel`.

    Raises:
        CheckpointError: a weight is missing, unexpected, or of another shape; the first of them are named.
    """
    renamed = rename(state_dict)
    with_head = any(name.startswith("classifier.") for name in renamed)
    if with_head:
        renamed = {name if name.startswith("classifier.") else f"nat.{name}": value for name, value in renamed.items()}
    dtypes = {value.dtype for value in renamed.values()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise CheckpointError(f"the weights must be floating point, got {sorted(map(str, dtypes))}.")
    with torch.device("meta"):
        model = (NatForImageClassification if with_head else NatModel)(config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    problems = [
        *(f"{name} is missing" for name in expected if name not in renamed),
        *(f"{name} is unexpected" for name in renamed if name not in expected),
        *(
            f"{name} is {tuple(renamed[name].shape)} and should be {tuple(shape)}"
            for name, shape in expected.items()
            if name in renamed and renamed[name].shape != shape
        ),
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"the weights do not fit a NAT of this size: {'; '.join(problems[:5])}{more}.")
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    model.load_state_dict({name: value.to(dtype).contiguous() for name, value in renamed.items()}, assign=True)
    return model.eval()


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Class names from a file: JSON (a list, or an object from index to name) or text with one name a line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read the labels in {path}: {getattr(error, 'strerror', None) or error}") from error
    if text.lstrip()[:1] not in ("{", "["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            by_index = {int(index): name for index, name in content.items()}
            content = [by_index[i] for i in range(len(by_index))]
    except (ValueError, KeyError) as error:
        raise FileError(
            f"the labels in {path} are not a JSON list of names, nor an object from 0, 1, ... to names: {error}"
        ) from error
    if not all(isinstance(name, str) for name in content):
        raise FileError(f"the labels in {path} must all be text. Give a JSON list of names.")
    return content


def _check_output(output: str | os.PathLike[str]) -> Path:
    folder = Path(output).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"output must be a folder that is new or empty, but {output} exists. Choose another one.")
    if not folder.parent.is_dir():
        raise FileError(f"cannot write {output}: the folder {folder.parent} does not exist. Create it first.")
    return folder


def _write_folder(folder: Path, model: NatPreTrainedModel, processor: NatImageProcessor) -> None:
    """Fill a folder beside ``folder`` and let it take its place."""
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:64]}.", suffix=".part"))
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        # Temporary folders, and files of some versions of safetensors, are private; a result is as readable as any
        # other.
        mask = os.umask(0)
        os.umask(mask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)
        temporary.chmod(0o777 & ~mask)
        temporary.replace(folder)
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _shape(state_dict: Mapping[str, Tensor], name: str, axes: int) -> Sequence[int]:
    if name not in state_dict:
        raise CheckpointError(f"the checkpoint is incomplete: {name} is missing.")
    shape = tuple(state_dict[name].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{name} must have {axes} axes, none of them empty, got {shape}.")
    return shape


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
