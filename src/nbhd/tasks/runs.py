"""The folder of a training run: whether it can be used, what is in it to resume from, what is drawn into it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbhd import _processor
from nbhd._files import write_whole
from nbhd._text import valid_unicode
from nbhd.errors import ArgumentError, CheckpointError, FileError, MissingExtra
from nbhd.tasks.recipes import Recipe, load_recipe

MARKER = "nbhd_state.json"  # written last into a checkpoint: without it the checkpoint is not complete

#: What a run leaves, recipe.yaml last: a folder with one still passes for a run if its removal was cut short.
RUN_FILES = (
    "model.safetensors", "config.json", "preprocessor_config.json", "README.md", "metrics.json", "curves.png",
    "checkpoints", "recipe.yaml",
)  # fmt: skip


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder."""
    complete = [folder for folder in _by_step(output / "checkpoints") if (folder / MARKER).is_file()]
    return complete[-1] if complete else None


def remove_old_checkpoints(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and incomplete ones that are older than these."""
    folders = _by_step(checkpoints)
    complete = [folder for folder in folders if (folder / MARKER).is_file()]
    oldest = complete[-keep:][0] if complete else None
    for folder in folders[: folders.index(oldest)] if oldest is not None else []:
        # The marker first: what is left of a removal that was cut short must not pass for a checkpoint.
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _by_step(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    numbered = [(folder.name.rpartition("-")[2], folder) for folder in checkpoints.glob("checkpoint-*")]
    return [folder for _, folder in sorted((int(step), folder) for step, folder in numbered if step.isdigit())]


def prepare_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the run's folder, or say why it cannot be used. Nothing in it is changed.

    Raises:
        ArgumentError: it is a file, or holds something and neither ``resume`` nor ``overwrite`` was given, or holds no
            run to ``resume``.
    """
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output {output} is a file. Name a folder.")
    if output.is_dir() and any(output.iterdir()):
        if not resume and not overwrite:
            raise ArgumentError(
                f"--output {output} is not empty. Use --resume to go on with the run in it, --overwrite to "
                "start it anew, or another folder."
            )
        if resume and not _holds_run(output):
            raise ArgumentError(
                f"--output {output} is not empty, and holds no run to resume: there is neither recipe.yaml nor "
                "checkpoints in it. Name the folder of a run, or a new one."
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--output {output} cannot be made: {error.strerror}") from error


def _holds_run(output: Path) -> bool:
    return any(os.path.lexists(output / name) for name in ("recipe.yaml", "checkpoints"))


def remove_run(output: Path) -> None:
    """Remove what a former run has left in ``output`` and nothing else; of a link the link alone.

    Raises:
        FileError: something cannot be removed.
    """
    if not _holds_run(output):
        return
    _remove([*_cut_short(output), *(output / name for name in RUN_FILES)])


def remove_cut_short(output: Path) -> None:
    """Remove what a run that was killed while it wrote has left beside its files.

    Raises:
        FileError: something cannot be removed.
    """
    if _holds_run(output):
        _remove(_cut_short(output))


def _cut_short(output: Path) -> list[Path]:
    return [*output.glob(".export-*"), *(path for name in RUN_FILES for path in output.glob(f".{name}.*.part"))]


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink() and path.name.startswith(("checkpoints", ".export-")):
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"cannot remove {path} of the former run: {error.strerror or error}") from error


def data_facts(class_names: Sequence[str], labels: np.ndarray) -> dict[str, Any]:
    """What a checkpoint remembers of the training images, for `check_same_data`."""
    digest = hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
    return {"classes": [valid_unicode(name) for name in class_names], "images": len(labels), "labels": digest}


def check_same_data(checkpoint: Path, data: Mapping[str, Any]) -> None:
    """Raise unless a resumed run has its first training images, as far as classes, number and labels tell."""
    before = json.loads((checkpoint / MARKER).read_text(encoding="utf-8")).get("data")
    if before is None:  # written before checkpoints remembered it
        return
    old, new = before["classes"], data["classes"]
    if len(old) != len(new):
        changed = f"there were {len(old)} classes and are {len(new)}"
    elif old != new:
        wrong = next(i for i, name in enumerate(old) if name != new[i])
        changed = f"class {wrong} was {old[wrong]!r}, is {new[wrong]!r}"
    elif before["images"] != data["images"]:
        changed = f"there were {before['images']} training images and are {data['images']}"
    elif before["labels"] != data["labels"]:
        changed = "the training images have other labels, or another order"
    else:
        return
    raise ArgumentError(
        f"--resume goes on with the data that {checkpoint} was trained on, but {changed}. Give the --data the run "
        "began with, or train into another folder (model.pretrained starts from finished weights)."
    )


def check_same_recipe(recipe: Recipe, output: Path) -> None:
    """Raise unless a resumed run has its first recipe; where it runs and how often it saves may change."""
    saved = output / "recipe.yaml"
    if not saved.is_file():
        raise CheckpointError(f"{output} has checkpoints but no recipe.yaml: it is not known what run they are of.")
    before, now = load_recipe(saved).to_dict(), recipe.to_dict()
    free = {
        "run": {"device", "save_every_steps", "keep_checkpoints", "save_dtype", "plot"},
        "data": {"num_workers", "cache"},
        "eval": {"batch_size"},
    }
    changed = [
        f"{section}.{key} was {before[section][key]!r}, is {value!r}"
        for section, values in now.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
        if value != before[section][key] and key not in free.get(section, set())
    ]
    if changed:
        raise ArgumentError(
            f"--resume goes on with the recipe in {saved}, but {'; '.join(changed)}. Leave the recipe as it was, "
            "or train into another folder (model.pretrained starts from finished weights)."
        )


def machine_facts() -> dict[str, Any]:
    """What a measured number needs beside it: processor, accelerators, versions."""
    import platform

    import transformers

    import nbhd

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _processor.name(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "nbhd": nbhd.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def draw_curves(path: Path, history: list[dict[str, Any]], metric: str, title: str) -> None:
    """Loss on the left, ``eval_<metric>`` on the right, against the epoch; a PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("drawing the curves", "train", "matplotlib") from error
    from matplotlib.figure import Figure

    del matplotlib
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], label="training (augmented, smoothed targets)")
    evaluated = [row for row in history if "eval_loss" in row]
    left.plot([row["epoch"] for row in evaluated], [row["eval_loss"] for row in evaluated], label="validation")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", title=title)
    left.legend()
    right.plot(
        [row["epoch"] for row in evaluated], [100 * row[f"eval_{metric}"] for row in evaluated], color="tab:green"
    )
    right.set(xlabel="epoch", ylabel=f"{metric} (%)", title="validation")
    right.grid(alpha=0.3)
    with write_whole(path) as stream:
        figure.savefig(stream, format="png", dpi=110)
