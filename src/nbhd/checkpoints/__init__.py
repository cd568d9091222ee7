"""The weights that come with the package: one folder a checkpoint, with its model card."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from nbhd.errors import CheckpointError


def default_checkpoint() -> Path:
    """Folder of the image classifier that ``nbhd classify`` uses when no model is named.

    Raises:
        CheckpointError: this installation came without it.
    """
    root = Path(str(resources.files(__name__)))
    for config in sorted(root.glob("*/config.json")):
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
        if any(name.endswith("ForImageClassification") for name in architectures):
            return config.parent
    raise CheckpointError(
        f"the default checkpoint is not in this installation ({root}). Name a model: a folder or a Hugging Face hub id."
    )
