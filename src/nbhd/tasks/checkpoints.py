"""A model named by folder or hub id, to a loaded model and its image processor."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from nbhd._files import WEIGHTS
from nbhd._sizes import check_image_processor
from nbhd.checkpoints import default_checkpoint
from nbhd.errors import ArgumentError, CheckpointError
from nbhd.tasks.devices import resolve_device

#: Files of a hub repository that are needed; the second list is for repositories without safetensors.
_WANTED = (
    "config.json", "preprocessor_config.json", "processor_config.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
)  # fmt: skip
_WANTED_OLD = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference.

    Attributes:
        model: a transformers model in evaluation mode, on its device.
        processor: the image processor that belongs to it.
        source: the folder the files came from, or the exported file.
        runtime: ``"torch"``; of an exported file ``"onnx"``, ``"torch-export"`` or ``"aoti"``.
    """

    model: Any
    processor: Any
    source: Path
    runtime: str = "torch"

    @property
    def is_multi_label(self) -> bool:
        """Whether one label does not exclude another, so that each gets a sigmoid instead of all a softmax."""
        from nbhd.export.subject import is_multi_label

        return is_multi_label(self.model.config)


def is_exported(model: str | os.PathLike[str] | None) -> bool:
    """Whether this names a file that ``nbhd export`` wrote, by its ending."""
    return model is not None and Path(model).suffix in (".onnx", ".pt2") and Path(model).expanduser().is_file()


def device_for(model: str | os.PathLike[str] | None, device: str | torch.device | None) -> torch.device:
    """The device named, or for None the best one here for this model: exported files run on the CPU.

    Raises:
        ArgumentError: there is no such device, or the model does not run on it.
    """
    found = resolve_device("cpu" if device is None and is_exported(model) else device)
    if found.type != "cpu" and is_exported(model):
        raise ArgumentError(f"device {str(device)!r}: exported files run on the CPU. Leave it out, or name the folder.")
    return found


def prepare_for_many(loaded: Loaded) -> None:
    """Make a NAT on a CPU faster to run, in its own dtype, as is worth it for more than a few images.

    It is `nbhd.optimize_for_inference`, in place; other models and devices stay as they are.
    """
    from nbhd.models import NatPreTrainedModel
    from nbhd.optimize import optimize_for_inference

    if loaded.runtime != "torch" or loaded.model.device.type != "cpu":
        return
    if any(isinstance(module, NatPreTrainedModel) for module in loaded.model.modules()):
        optimize_for_inference(loaded.model, dtype=None)


def load_classifier(model: str | os.PathLike[str] | None, device: torch.device) -> Loaded:
    """Load an image classification model of any architecture transformers knows, NAT included.

    Args:
        model: a folder written by ``save_pretrained``, a file written by ``nbhd export``, a hub id, or None for the
            checkpoint that comes with the package. A folder wins over a hub id of the same name. Code that a repository
            brings along is never run.
        device: where to put it. On a CPU the weights become float32 whatever they were stored in; elsewhere they keep
            their dtype.

    Raises:
        CheckpointError: there is no such model, it cannot be read, is not an image classifier, or lacks weights.
    """
    if model is not None and is_exported(model):
        return _exported(Path(model).expanduser())
    folder = model_folder(model)
    named = str(model) if model is not None else "the default checkpoint"
    check_config(folder, named)

    import transformers

    from nbhd.models import NatForImageClassification  # the import registers NAT with the Auto classes, too

    # A DiNAT is a NAT with dilations, and transformers' own class needs NATTEN.
    is_dinat = _model_type(folder) == "dinat"
    kind: Any = NatForImageClassification if is_dinat else transformers.AutoModelForImageClassification
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    try:
        network, info = kind.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers, safetensors and torch raise each their own kinds for a bad checkpoint
        raise CheckpointError(f"cannot load an image classifier from {named}: {reason(error, folder)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{named} lacks {len(missing)} of the weights of a {type(network).__name__} ({', '.join(missing[:3])}): it"
            " would answer at random. Name a checkpoint trained for image classification."
        )
    channels = getattr(network.config, "num_channels", 3)
    if channels != 3:
        raise CheckpointError(
            f"{named} wants pictures of {channels} channels (num_channels), but pictures are read as RGB."
        )
    processor = load_processor(folder, named)
    _try(processor, f"the image processor of {named}, {_processor_file(folder) or 'the default one'},")
    return Loaded(network.to(device).eval(), processor, folder)


def check_has_labels(loaded: Loaded) -> None:
    """Raise `ArgumentError` for a model whose outputs are quantities, which nothing can be chosen from."""
    network = loaded.model
    if network.config.problem_type == "regression":
        raise ArgumentError(
            f"the model {loaded.source} is a regressor (problem_type 'regression' in its configuration): it has no"
            " labels to choose from. Call it in Python:"
            f" {type(network).__name__}.from_pretrained({str(loaded.source)!r})(pixel_values=...).logits"
        )


def _exported(path: Path) -> Loaded:
    from nbhd.export.runtime import open_exported

    model = open_exported(path)
    if model.facts.task != "image-classification":
        raise CheckpointError(f"{path} is no classifier: it was exported for {model.facts.task}.")
    if model.facts.channels != 3:
        raise CheckpointError(
            f"{path} wants pictures of {model.facts.channels} channels, but pictures are read as RGB."
        )
    try:
        processor = model.processor()
        check_image_processor(processor)
    except Exception as error:
        raise CheckpointError(f"cannot load the image processor in {path}: {reason(error)}") from error
    _try(processor, f"the image processor in {path}")
    return Loaded(model, processor, path, model.kind)


def model_folder(model: str | os.PathLike[str] | None) -> Path:
    """The local folder of a model, downloaded (or found in the hub's cache) if a hub id was given.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be reached.
    """
    if model is None:
        return default_checkpoint()
    name = os.fspath(model)
    if not name:
        raise ArgumentError(
            "model must be named, got ''. Leave it out for the one that comes with nbhd; the current folder is '.'."
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() in WEIGHTS and path.exists():
        raise CheckpointError(f"model {name!r} is a file of weights. {_convert(path)}")
    if path.exists():
        raise CheckpointError(
            f"model {name!r} is a file. Name the folder that holds config.json and the weights,"
            " or a file that `nbhd export` wrote (.onnx, .pt2)."
        )
    if path.suffix.lower() in (".onnx", ".pt2", *WEIGHTS):
        raise CheckpointError(f"model {name!r}: there is no such file.")
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise CheckpointError(f"model {name!r}: there is no such folder.")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_WANTED)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_WANTED, *_WANTED_OLD]))
    except Exception as error:  # the hub client raises its own, requests', httpx's and OSError kinds
        raise CheckpointError(
            f"model {name!r} is not a folder here, and cannot be had from the Hugging Face hub: {reason(error)}"
        ) from error
    return folder


def check_config(folder: Path, named: str) -> None:
    """Raise `CheckpointError` for a folder without config.json, with what to name instead."""
    if (folder / "config.json").is_file():
        return
    weights = sorted(file for file in folder.iterdir() if file.suffix.lower() in WEIGHTS and file.is_file())
    if weights:
        raise CheckpointError(f"{named} is not a model: {folder} holds no config.json. {_convert(weights[0])}")
    inner = sorted(config.parent.name for config in folder.glob("*/config.json"))
    hint = (
        f" Did you mean {folder / inner[-1]}?" if inner else " Name the folder that holds config.json and the weights."
    )
    raise CheckpointError(f"{named} is not a model: {folder} holds no config.json.{hint}")


def _convert(file: Path) -> str:
    return (
        f"If it is a checkpoint of the original NAT, `nbhd convert {shlex.quote(str(file))} FOLDER` makes a model of "
        "it (--labels FILE names its classes). Name that folder."
    )


def _model_type(folder: Path) -> object:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None  # for transformers to complain of


def load_processor(folder: Path, named: str) -> Any:
    """The folder's image processor, or NAT's default if it has none."""
    file = _processor_file(folder)
    if file is None:
        from nbhd.models.nat import NatImageProcessor

        return NatImageProcessor()

    from nbhd.models._transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_image_processor(processor)
    except Exception as error:
        raise CheckpointError(f"cannot load the image processor of {named}, {file}: {reason(error)}") from error
    return processor


def _processor_file(folder: Path) -> Path | None:
    files = (folder / name for name in ("preprocessor_config.json", "processor_config.json"))
    return next((file for file in files if file.is_file()), None)


def _try(processor: Any, what: str) -> None:
    """Raise `CheckpointError` for an image processor that makes no pixels: its settings may be of any kind."""
    try:
        pixels = processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            raise ValueError("it makes no pixel_values")
    except Exception as error:  # processors raise whatever their settings lead to
        raise CheckpointError(f"{what} does not work: {reason(error)}") from error


def reason(error: BaseException, folder: Path | None = None) -> str:
    """The first sentence or two of an error made for developers; of damaged weights in ``folder`` which file it is."""
    if folder is not None and isinstance(error, SafetensorError):
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError):
                return f"{file} is damaged or cut short. Get it again."
    text = " ".join(str(error).split())
    return f"{text[:300]}..." if len(text) > 300 else text or type(error).__name__
