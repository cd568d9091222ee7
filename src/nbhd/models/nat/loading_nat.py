"""What ``from_pretrained`` takes beyond the folders of transformers: files and folders of the original's weights.

Weights alone are read, by ``safetensors`` or by ``torch.load`` with ``weights_only``: a pickle that would run code is
refused, not executed.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbhd._files import WEIGHTS
from nbhd.errors import CheckpointError, FileError
from nbhd.models.nat.original_nat import WRAPPERS, Original, is_original, rename, take_apart

#: Files of a training run that hold no model.
_NO_MODEL = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state.*)\.(pt|pth|bin)")
#: What transformers itself would read in a folder, first found first.
_WEIGHTS_OF_TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")


def _scalar_of(core: str) -> Any:
    def scalar(*arguments: Any) -> Any:
        make: Any = np.float64(0).__reduce__()[0]
        return make(*arguments)

    scalar.__module__, scalar.__qualname__ = f"numpy.{core}.multiarray", "scalar"
    return scalar


#: What pickled numbers of NumPy are made of, under the names of its versions 1 and 2. The types of objects and of
#: records are not among them: nothing but numbers comes of it.
_NUMBERS: list[Any] = [
    _scalar_of("core"),
    _scalar_of("_core"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
]


def find_file(name: str | os.PathLike[str], subfolder: str = "") -> Path | None:
    """The weights that transformers could not read by itself, or None: a folder of its own making, or a hub id.

    A file other than a configuration; the one state dict in a folder without config.json; or weights under the
    original's names where transformers looks for its own.

    Raises:
        CheckpointError: a folder without config.json holds several state dicts.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return None if path.suffix == ".json" else path
    path /= subfolder
    if not path.is_dir():
        return None
    if (path / "config.json").is_file():
        own = next((path / file for file in _WEIGHTS_OF_TRANSFORMERS if (path / file).is_file()), None)
        return own if own is not None and is_original(_names(own)) else None
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix in WEIGHTS and file.is_file() and not _NO_MODEL.fullmatch(file.name)
    )
    if len(files) > 1:
        raise CheckpointError(
            f"{path} has no config.json and several checkpoints: {', '.join(file.name for file in files)}. Name one."
        )
    return files[0] if files else None


def folder_of(file: Path) -> Path | None:
    """The folder of transformers' making that ``file`` is the weights of, or None."""
    return file.parent if file.name in _WEIGHTS_OF_TRANSFORMERS and (file.parent / "config.json").is_file() else None


def read_original(path: str | os.PathLike[str]) -> Original:
    """The checkpoint in a file.

    The file is one that ``torch.save`` wrote, with a state dict, or a dict that holds one under ``"state_dict"`` or
    ``"model"``; or it is a ``.safetensors``.

    Raises:
        FileError: there is no such file, or it cannot be read.
        CheckpointError: it holds something else, or is damaged.
    """
    weights, content = load_weights(path)
    return take_apart(weights, Path(path), content)


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    """The state dict in a file, and all that the file holds; see `read_original`."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileError(f"cannot read {path}: it {what}. Name a checkpoint file of the original repository (.pth).")
    content = _load(path)
    return _state_dict(content, path), content


def weights_for(original: Original, model: type[nn.Module], config: Any, prefix: str = "") -> dict[str, Tensor]:
    """The checkpoint's weights under the names of ``model``, none of the NAT's own missing, unknown or misshapen.

    What belongs to another kind of model is left out: the classifier, the norms of a backbone's maps, the heads. Those
    the model has and the checkpoint lacks are for the caller to initialise or to refuse.

    Args:
        original: the checkpoint.
        model: `NatModel`, `NatForImageClassification` or `NatBackbone`.
        config: its configuration.
        prefix: what stands before the NAT's names in ``model``.

    Raises:
        CheckpointError: a weight of the NAT itself does not fit; the first of them are named.
    """
    renamed = rename(original.backbone)
    dtypes = {value.dtype for value in renamed.values()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise CheckpointError(f"the weights must be floating point, got {sorted(map(str, dtypes))}.")
    with torch.device("meta"):
        shapes = {name.removeprefix(prefix): value.shape for name, value in model(config).state_dict().items()}
    check_weights(
        {name: value.shape for name, value in renamed.items() if not _is_head(name, shapes)},
        {name: shape for name, shape in shapes.items() if not _is_head(name)},
        original.name,
    )
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {
        name if name.startswith("classifier.") else prefix + name: value.to(dtype).contiguous()
        for name, value in renamed.items()
        if name in shapes
    }


def check_weights(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], name: str) -> None:
    """Raise a `CheckpointError` that names the first weights that are missing, unexpected or of another shape."""
    problems = [
        *(f"{weight} is missing" for weight in expected if weight not in found),
        *(f"{weight} is unexpected" for weight in found if weight not in expected),
        *(
            f"{weight} is {tuple(found[weight])} and should be {tuple(shape)}"
            for weight, shape in expected.items()
            if weight in found and found[weight] != shape
        ),
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"the weights of {name} do not fit this model: {'; '.join(problems[:5])}{more}.")


def _is_head(name: str, known: Iterable[str] = ()) -> bool:
    """Whether a weight is one of those by which NAT's kinds of models differ."""
    return name.startswith(("classifier.", "hidden_states_norms.")) or (
        name.startswith("layernorm.") and bool(known) and name not in known
    )


def _names(path: Path) -> list[str]:
    """Names of the weights in a file, without reading the weights where that can be had."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError):
            return []  # for transformers to complain of
    try:
        return list(_state_dict(_load(path, mapped=True), path))
    except (CheckpointError, FileError):
        return []


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    weights = content
    for key in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping):
            weights = weights[key]
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(f"{path} holds {_kind(weights)}, not a state dict: names and tensors are expected.")
    strange = [name for name, value in weights.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{path} is not a state dict: {strange[0]!r} is {_kind(weights[strange[0]])}, not a tensor."
        )
    return {re.sub(rf"^{WRAPPERS}", "", name): value.detach() for name, value in weights.items()}


def _load(path: Path, mapped: bool = False) -> Any:
    """What the file holds; ``mapped`` to the disk where only names are asked for, since a file may change under it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # timm, which trained the originals, stores its command line and its metric beside the weights: a Namespace,
        # which holds plain values only, and a number of NumPy's.
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMBERS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles of other protocols, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except PermissionError as error:
        raise FileError(f"cannot read {path}: {error.strerror}. Check the file's permissions.") from error
    except Exception as error:
        # torch.load raises what its many readers raise: UnpicklingError, RuntimeError, EOFError, KeyError, ...
        if refused := re.search(r"(?:GLOBAL |but got <class ')([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds more than weights ({refused[1]}) and was not loaded, because that could run code. "
                "Save the model's state_dict() alone and use that."
            ) from error
        reason = "" if isinstance(error, (pickle.UnpicklingError, KeyError)) else str(error).split(". ")[0].strip()
        raise CheckpointError(
            f"{path} is not a file that torch.save wrote, or it is damaged{reason and f' ({reason})'}. "
            "Name a checkpoint of the original repository (.pth)."
        ) from error


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
