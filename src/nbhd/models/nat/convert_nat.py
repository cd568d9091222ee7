"""Checkpoints of other makes to folders that ``from_pretrained`` and the Auto classes read.

The original repository's (see `original_nat`): a classifier becomes a `NatForImageClassification`, a segmenter with the
heads of UPerNet a `UperNetForSemanticSegmentation` of transformers, any other detector or segmenter a `NatBackbone`.
Folders of transformers: a NAT's of 4.x, and a DiNAT's of any version, which becomes a NAT with dilations.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nbhd._files import write_json
from nbhd._sizes import check_image_processor, check_pixels
from nbhd.errors import ArgumentError, CheckpointError, FileError, WrongFile
from nbhd.models.nat.configuration_nat import NatConfig
from nbhd.models.nat.convert_upernet import build_upernet, is_upernet, mean_and_std, upernet_image_processor
from nbhd.models.nat.image_processing_nat import NatImageProcessor
from nbhd.models.nat.loading_nat import check_weights, find_file, folder_of, read_original, weights_for
from nbhd.models.nat.modeling_nat import NatBackbone, NatForImageClassification, NatModel, NatPreTrainedModel
from nbhd.models.nat.original_nat import Original, infer_config

_PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Conversion:
    """What `convert_nat` wrote.

    Args:
        folder: where.
        variant: the published model it is, or None.
        parameters: how many.
        classes: how many.
        config: the configuration of the NAT, inside another model or not.
        model: the name of the model's class.
        left_out: the heads of the checkpoint that are not in the folder, such as ``"roi_head"``.
    """

    folder: Path
    variant: str | None
    parameters: int
    classes: int
    config: NatConfig
    model: str
    left_out: tuple[str, ...] = ()


def convert_nat(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    **settings: Any,
) -> Conversion:
    """Turn a checkpoint into a folder that ``from_pretrained`` reads.

    The folder holds the configuration, the weights as safetensors and the image processor.

    Args:
        checkpoint: a file of the original repository, see `loading_nat.read_original` for what may be in it; or a
            folder with a NAT or a DiNAT of transformers.
        output: the folder to write. It must not exist or be empty, and appears only when all of it is written.
        labels: a file with the name of each class, see `read_labels`; default: the names in the checkpoint, or
            ``LABEL_0``, ...
        image_size: side of the images in pixels the image processor makes; default: as in the checkpoint's folder, or
            512 for a segmenter, or 224. All else is as in the folder; without one, as the published models were
            evaluated. Of images that are not RGB it takes the channels as they are, with ImageNet's mean and standard
            deviation, averaged over the colours, for each.
        **settings: arguments of `NatConfig` that the weights do not tell, e.g. ``dilations`` or ``drop_path_rate``.

    Raises:
        WrongFile: the checkpoint, the labels or the folder to write in is not there, or the labels are none.
        FileError: the checkpoint or the labels cannot be read, or the folder cannot be written.
        CheckpointError: the checkpoint is not of a NAT, is damaged, or holds more than weights.
        ArgumentError: the output exists, the labels do not match the classifier, or the folder's image processor has no
            size to change, or not one as large as that.
    """
    folder = _check_output(output)
    if not Path(checkpoint).expanduser().exists():
        raise WrongFile(
            f"cannot read {checkpoint}: it does not exist. Name a checkpoint file, or a folder with a model."
        )
    if image_size is not None:
        check_pixels("image_size", image_size, image_size, image_size)
    names = None if labels is None else read_labels(labels)
    processor: Any = None
    own = Path(checkpoint) / _PROCESSOR
    if own.is_file():
        processor = own if image_size is None else _with_size(own, image_size)
    variant: str | None = None
    left_out: set[str] = set()
    file = find_file(checkpoint)
    if Path(checkpoint).is_dir() and (file is None or folder_of(file) is not None):
        model: Any = _read_folder(Path(checkpoint), settings)
        config = model.config
    else:
        original = read_original(file or checkpoint)
        names = original.classes if names is None else names
        try:
            config, variant = infer_config(original, **settings)
            model = build(original, config)
        except CheckpointError as error:  # of weights, which have no name
            named = str(file or checkpoint)
            if named in str(error):
                raise
            raise CheckpointError(f"{named}: {error}") from error
        left_out = {name.split(".")[0] for name in original.heads}
        if is_upernet(original):
            left_out -= {"decode_head", "auxiliary_head"}
            processor = upernet_image_processor(image_size or 512, model.config.num_labels, config.num_channels)
    if names is not None and not isinstance(model, NatBackbone):
        if len(names) != model.config.num_labels:
            raise ArgumentError(
                f"labels must name each of the {model.config.num_labels} classes, but {labels or checkpoint} has "
                f"{len(names)}. Give a file with one name for each class, in their order."
            )
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
    if processor is None:
        mean, std = mean_and_std(config.num_channels)
        processor = NatImageProcessor.for_image_size(
            image_size or 224, do_convert_rgb=config.num_channels == 3, image_mean=mean, image_std=std
        )
    if image_size is not None:
        _check_loadable(processor, image_size)
    _write_folder(folder, model, processor)
    return Conversion(
        folder=folder,
        variant=variant,
        parameters=sum(p.numel() for p in model.parameters()),
        classes=model.config.num_labels or 0,
        config=config,
        model=type(model).__name__,
        left_out=tuple(sorted(left_out)),
    )


def build(original: Original | Mapping[str, Tensor], config: NatConfig) -> PreTrainedModel:
    """The model with the weights of an original checkpoint: the kind that has a place for its heads.

    Raises:
        CheckpointError: a weight is missing, unexpected, or of another shape; the first of them are named.
    """
    original = original if isinstance(original, Original) else Original(dict(original))
    if is_upernet(original):
        return build_upernet(original, config)
    kind: type[NatPreTrainedModel] = NatModel
    if original.heads or any(name.startswith("norm0.") for name in original.backbone):
        kind = NatBackbone
    elif any(name.startswith("head.") for name in original.backbone):
        kind = NatForImageClassification
    weights = weights_for(original, kind, config, kind._nat_prefix)
    with torch.device("meta"):
        model = kind(config)
    check_weights(
        {name: value.shape for name, value in weights.items()},
        {name: value.shape for name, value in model.state_dict().items()},
        original.name,
    )
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _read_folder(folder: Path, settings: dict[str, Any]) -> NatPreTrainedModel:
    """The model in a folder of transformers, which must have all its weights and no others."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = content["model_type"]
        architecture = (content.get("architectures") or ["NatForImageClassification"])[0].replace("Dinat", "Nat")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{folder} is not a model: its config.json is missing or says no model_type. Name a checkpoint file, or a "
            "folder with a NAT or a DiNAT."
        ) from error
    classes = {c.__name__: c for c in (NatForImageClassification, NatModel, NatBackbone)}
    if kind not in ("nat", "dinat") or architecture not in classes:
        raise CheckpointError(
            f"{folder} holds a {architecture} of type {kind!r}, not a NAT or a DiNAT. There is nothing to convert."
        )
    try:
        model, info = classes[architecture].from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            **{k: v for k, v in settings.items() if v is not None},
        )
    except (CheckpointError, ArgumentError):
        raise
    except Exception as error:  # transformers, safetensors and torch raise each their own kinds for a bad checkpoint
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"cannot load a {architecture} from {folder}: {reason}") from error
    check_weights(
        {name: torch.Size() for name in info["unexpected_keys"]},
        {name: torch.Size() for name in info["missing_keys"]},
        str(folder),
    )
    return model


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Class names from a file: JSON (a list, or an object from index to name) or text with one name a line.

    Raises:
        WrongFile: it is not there, or holds no names.
        FileError: it cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WrongFile(f"the labels in {path} are not text in UTF-8. Give a file with one name a line.") from error
    except OSError as error:
        wrong = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        raise (WrongFile if wrong else FileError)(
            f"cannot read the labels in {path}: {error.strerror or error}. Give a file with one name a line."
        ) from error
    if text.lstrip()[:1] not in ("{", "["):
        lines = [line.strip() for line in text.splitlines()]
        return _some([line for line in lines if line], path)
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            by_index = {int(index): name for index, name in content.items()}
            content = [by_index[i] for i in range(len(by_index))]
    except (ValueError, KeyError) as error:
        raise WrongFile(
            f"the labels in {path} are not a JSON list of names, nor an object from 0, 1, ... to names: {error}"
        ) from error
    if not all(isinstance(name, str) for name in content):
        raise WrongFile(f"the labels in {path} must all be text. Give a JSON list of names.")
    return _some(content, path)


def _some(names: list[str], path: Path) -> list[str]:
    if not names:
        raise WrongFile(f"the labels in {path} are none. Give a file with one name for each class, or leave it out.")
    return names


def _with_size(path: Path, image_size: int) -> dict[str, Any]:
    """The settings of an image processor for images of another size: ``size`` and ``crop_size`` keep their ratio."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("image_processor_type") == NatImageProcessor.__name__:
            settings = NatImageProcessor(**settings).to_dict()  # with the defaults for what it leaves out
        crops = settings.get("do_center_crop", "crop_size" in settings) and settings.get("crop_size") is not None
        side = min(_sides(settings["crop_size" if crops else "size"]))
        for name in ("size", "crop_size"):
            if settings.get(name) is not None:
                _sides(settings[name])
                is_result = (name == "crop_size") == crops
                settings[name] = _scaled(settings[name], image_size, side, is_result)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArgumentError(
            f"image_size cannot be put into {path}: it has no size or crop_size in pixels that could be changed. Leave "
            "image_size out to copy it as it is."
        ) from error
    return settings


def _check_loadable(processor: Any, image_size: int) -> None:
    """Refuse sizes that no program takes: what is cut out is ``image_size``, of an image that may be larger."""
    try:
        check_image_processor(processor)
    except ArgumentError as error:
        raise ArgumentError(f"image_size is too large, got {image_size}: of the image processor, {error}") from error


def _sides(size: Any) -> list[int]:
    """The numbers of an image processor's ``size``: an integer, a pair, or an object."""
    sides = list(size.values()) if isinstance(size, dict) else size if isinstance(size, list) else [size]
    sides = [side for side in sides if side is not None]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError("not in pixels")
    return sides


def _scaled(size: Any, image_size: int, side: int, is_result: bool) -> Any:
    """``size`` times ``image_size / side``; what the images end up as is a square, unless only one edge is named."""
    square = is_result and "shortest_edge" not in size if isinstance(size, dict) else is_result

    def scale(number: Any) -> Any:
        return None if number is None else image_size if square else max(1, number * image_size // side)

    if isinstance(size, dict):
        return {name: scale(number) for name, number in size.items()}
    return [scale(number) for number in size] if isinstance(size, list) else scale(size)


def _check_output(output: str | os.PathLike[str]) -> Path:
    folder = Path(output).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"output must be a folder that is new or empty, but {output} exists. Choose another one.")
    if not folder.parent.is_dir():
        raise WrongFile(f"cannot write {output}: the folder {folder.parent} does not exist. Create it first.")
    return folder


def _write_folder(folder: Path, model: PreTrainedModel, processor: Any) -> None:
    """Fill a folder beside ``folder`` and let it take its place; ``processor`` may be a file to copy, or settings."""
    # Named first and made inside the block that removes it: an interrupt may come right behind.
    temporary = folder.parent / f".{folder.name[:64]}.{secrets.token_hex(8)}.part"
    try:
        temporary.mkdir(0o700)
        model.save_pretrained(temporary)
        if isinstance(processor, Path):
            shutil.copyfile(processor, temporary / _PROCESSOR)
        elif isinstance(processor, dict):
            write_json(temporary / _PROCESSOR, processor)
        else:
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
