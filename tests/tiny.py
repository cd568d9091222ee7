"""A classifier small enough to make for a test: random weights, but a real checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = (
    "tench", "English springer", "cassette player", "chain saw", "church",
    "French horn", "garbage truck", "gas pump", "golf ball", "parachute",
)  # fmt: skip


def write_classifier(
    folder: Path, processor: bool = True, dtype: str = "float32", seed: int = 0, **config: Any
) -> Path:
    """Write config.json, model.safetensors and, with ``processor``, preprocessor_config.json; returns ``folder``."""
    import torch

    from nbhd.models.nat import NatConfig, NatForImageClassification, NatImageProcessor

    settings: dict[str, Any] = {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "kernel_size": 3,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: i for i, label in enumerate(LABELS)},
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NatForImageClassification(NatConfig(**settings))
        torch.nn.init.normal_(model.classifier.weight, std=2.0)  # answers that differ from picture to picture
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if processor:
        NatImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder
