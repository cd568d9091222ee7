"""The folder of a training run: whether it can be used, what is in it to resume from, what is drawn into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nbhd import _processor
from nbhd._files import write_whole
from nbhd.errors import ArgumentError, CheckpointError, MissingExtra
from nbhd.tasks.recipes import Recipe, load_recipe

MARKER = "nbhd_state.json"  # written last into a checkpoint: without it the checkpoint is not complete


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
    """Make the run's folder, or say why it cannot be used.

    Raises:
        ArgumentError: it is a file, or holds something and neither ``resume`` nor ``overwrite`` was given.
    """
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output {output} is a file. Name a folder.")
    if output.is_dir() and any(output.iterdir()):
        if overwrite:
            for name in ("checkpoints", "recipe.yaml", "metrics.json", "curves.png"):
                path = output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif not resume:
            raise ArgumentError(
                f"--output {output} is not empty. Use --resume to go on with the run in it, --overwrite to "
                "start it anew, or another folder."
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--output {output} cannot be made: {error.strerror}") from error


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
