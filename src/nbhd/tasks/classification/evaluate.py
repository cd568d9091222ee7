"""Measure an image classifier on labelled images: ``nbhd evaluate``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nbhd.errors import FileError
from nbhd.tasks.checkpoints import Loaded
from nbhd.tasks.datasets import ImageTable, open_images
from nbhd.tasks.labels import check_labels_fit, only_numbers

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor, list[str]]  # [B, 3, X, Y], [B] class numbers, failures


@dataclass
class Evaluation:
    """What a classifier does on a data set."""

    class_names: list[str]
    confusion: np.ndarray  # [classes, classes] images, rows are the true class, columns the predicted one
    top5_hits: int
    loss_sum: float  # nats
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)  # a message for each image that could not be decoded

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        return float(np.trace(self.confusion)) / self.images

    @property
    def top5(self) -> float:
        """Share of images whose class is among the five most probable."""
        return self.top5_hits / self.images

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats."""
        return self.loss_sum / self.images

    @property
    def per_class(self) -> list[dict[str, Any]]:
        """One row for each class that occurs, in the model's order.

        Images, accuracy (recall), precision (None if never predicted), and the class it is most often mistaken for with
        the number of times.
        """
        rows = []
        for i, name in enumerate(self.class_names):
            count, predicted, right = (
                int(self.confusion[i].sum()),
                int(self.confusion[:, i].sum()),
                int(self.confusion[i, i]),
            )
            if count:
                precision = right / predicted if predicted else None
                wrong = self.confusion[i].copy()
                wrong[i] = 0
                worst = int(wrong.argmax())
                rows.append(
                    {
                        "class": name,
                        "images": count,
                        "accuracy": right / count,
                        "precision": precision,
                        "mistaken_for": self.class_names[worst] if wrong[worst] else None,
                        "mistaken": int(wrong[worst]),
                    }
                )
        return rows

    def summary(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "images": self.images,
            "skipped": len(self.failures),
            "seconds": round(self.seconds, 2),
            "per_class": self.per_class,
            "classes": self.class_names,
            "confusion": self.confusion.tolist(),
        }


def class_names(loaded: Loaded) -> list[str]:
    """The model's classes in the order of its outputs."""
    config = loaded.model.config
    return [str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels)]


def open_for_model(loaded: Loaded, source: str | os.PathLike[str], split: str, **columns: str) -> ImageTable:
    """Open data (`open_images`) with its classes numbered by name as the model's, if the model's have names."""
    names = class_names(loaded)
    return open_images(source, split, class_names=None if only_numbers(names) else names, **columns)


def evaluate_images(
    loaded: Loaded,
    table: ImageTable,
    *,
    batch_size: int = 64,
    track: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, count: batches,
) -> Evaluation:
    """Run a model over all images of a table with its own image processor.

    Args:
        loaded: of `load_classifier`.
        table: images and labels, numbered as the model's classes (`open_for_model`).
        batch_size: images at once.
        track: given the batches and their number, gives them on; for a progress bar.

    Raises:
        ArgumentError: the data's classes are not the model's.
        FileError: no image can be decoded.
    """
    network, names = loaded.model, class_names(loaded)
    check_labels_fit(table, names, str(loaded.source))
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    result = Evaluation(names, confusion, 0, 0.0)
    start = time.perf_counter()
    for pixels, labels, failures in track(_batches(table, loaded.processor, batch_size), -(-len(table) // batch_size)):
        result.failures += failures
        if not len(labels):
            continue
        with torch.inference_mode():
            logits = network(pixel_values=pixels.to(network.device, network.dtype)).logits.float().cpu()
        result.loss_sum += float(cross_entropy(logits, labels, reduction="sum"))
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        result.top5_hits += int((top == labels[:, None]).any(1).sum())
        np.add.at(confusion, (labels.numpy(), top[:, 0].numpy()), 1)
    if not result.images:
        raise FileError(f"{table.where}: none of the images can be decoded. The first: {result.failures[0]}")
    result.seconds = time.perf_counter() - start
    return result


def _batches(table: ImageTable, processor: Any, batch_size: int) -> Iterator[Batch]:
    """Preprocessed batches, the next ones being decoded while the model works."""

    def load(row: int) -> torch.Tensor | str:
        try:
            return processor(table.decode(row), return_tensors="pt")["pixel_values"][0]  # type: ignore[no-any-return]
        except FileError as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=2) as pool:
        starts = list(range(0, len(table), batch_size))
        ahead = [
            [pool.submit(load, row) for row in range(start, min(start + batch_size, len(table)))]
            for start in starts[:2]
        ]
        for number, start in enumerate(starts):
            loaded = [future.result() for future in ahead.pop(0)]
            if number + 2 < len(starts):
                nxt = starts[number + 2]
                ahead.append([pool.submit(load, row) for row in range(nxt, min(nxt + batch_size, len(table)))])
            good = [i for i, item in enumerate(loaded) if not isinstance(item, str)]
            pixels = (
                torch.stack([item for item in loaded if isinstance(item, torch.Tensor)]) if good else torch.empty(0)
            )
            labels = torch.from_numpy(table.labels[[start + i for i in good]])
            yield pixels, labels, [item for item in loaded if isinstance(item, str)]
