"""Measure an image classifier on labelled images: ``nbhd evaluate``."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nbhd.errors import ArgumentError, CheckpointError, FileError, WrongFile
from nbhd.tasks.checkpoints import Loaded, check_has_labels
from nbhd.tasks.classification.predict import NO_ANSWER, answer, of_one_shape, to_pixels
from nbhd.tasks.datasets import ImageTable, open_images
from nbhd.tasks.images import ImageError
from nbhd.tasks.labels import OtherClasses, check_labels_fit, numbers, only_numbers, some

Batch: TypeAlias = list[torch.Tensor | str]  # of each row [3, X, Y], or why it cannot be read


@dataclass
class Evaluation:
    """What a classifier does on a data set."""

    class_names: list[str]
    confusion: np.ndarray  # [classes, classes] images, rows are the true class, columns the predicted one
    top5_hits: int
    loss_sum: float  # nats
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)  # a message for each image without an answer

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
        """Everything as plain values for JSON; the loss is None where the model rules out what is true."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss if math.isfinite(self.loss) else None,
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
    """Open data (`open_images`) with its classes numbered by name as the model's.

    A model whose classes have no names but numbers takes the data's numbering, if the data has as many classes.

    Raises:
        WrongFile, FileError: as of `open_images`; or a class of the data is none of the model's.
    """
    names = class_names(loaded)
    try:
        return open_images(source, split, class_names=names, **columns)
    except OtherClasses as error:
        if not only_numbers(names):
            raise
        other = error
    table = open_images(source, split, **columns)
    if other.numbered:
        return table
    found, plain = table.class_names, numbers(len(names))
    if names != plain and set(found) <= set(plain):  # the numbers of LABEL_0, LABEL_1, ...
        return open_images(source, split, class_names=plain, **columns)
    if names == plain and all(name.isdecimal() for name in found):
        raise other
    if len(found) != len(names):
        raise WrongFile(
            f"{table.where} has the classes {some(found)}, but the model {loaded.source} names its {len(names)} classes"
            f" {some(names, 2)}: which of them is {found[0]!r} cannot be told. Name them in the model's config.json"
            " (id2label and label2id)."
        )
    return table


def check_measurable(loaded: Loaded) -> None:
    """Raise `ArgumentError` unless the model chooses one of several labels, which is what accuracy is measured of."""
    check_has_labels(loaded)
    config = loaded.model.config
    if loaded.is_multi_label:
        kind = "has one label" if config.num_labels == 1 else "gives a picture any number of labels"
        raise ArgumentError(
            f"the model {loaded.source} {kind} (num_labels {config.num_labels}, problem_type {config.problem_type!r}):"
            " top-1 accuracy and cross-entropy are of models that choose one label of several. Measure it in Python,"
            " from the probabilities of nbhd.tasks.classification.Classifier."
        )


def evaluate_images(
    loaded: Loaded,
    table: ImageTable,
    *,
    batch_size: int = 64,
    track: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, count: batches,
) -> Evaluation:
    """Run a model over all images of a table with its own image processor.

    An image that cannot be decoded, or for which the model's answer is not a number, is left out and named.

    Args:
        loaded: of `load_classifier`.
        table: images and labels, numbered as the model's classes (`open_for_model`).
        batch_size: images at once.
        track: given the batches and their number, gives them on; for a progress bar.

    Raises:
        ArgumentError: the data's classes are not the model's, or the model is not one that chooses a label.
        FileError: no image can be decoded.
        CheckpointError: the model answers with numbers for none of them.
    """
    check_measurable(loaded)
    names = class_names(loaded)
    check_labels_fit(table, names, str(loaded.source))
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    result = Evaluation(names, confusion, 0, 0.0)
    start = time.perf_counter()
    first = unanswered = 0
    for batch in track(_batches(table, loaded.processor, batch_size), -(-len(table) // batch_size)):
        result.failures += [item for item in batch if isinstance(item, str)]
        for members in of_one_shape(batch):
            logits = answer(loaded.model, [batch[i] for i in members])
            rows = np.array(members) + first
            finite = logits.softmax(-1).isfinite().all(-1)
            unanswered += int((~finite).sum())
            result.failures += [f"{table.name(int(row))}: {NO_ANSWER}" for row in rows[~finite.numpy()]]
            logits, labels = logits[finite], torch.from_numpy(table.labels[rows[finite.numpy()]])
            result.loss_sum += float(cross_entropy(logits, labels, reduction="sum"))
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices
            result.top5_hits += int((top == labels[:, None]).any(1).sum())
            np.add.at(confusion, (labels.numpy(), top[:, 0].numpy()), 1)
        first += len(batch)
    if not result.images and unanswered:
        raise CheckpointError(
            f"the model {loaded.source} answers none of {unanswered} pictures of {table.where} with numbers: it has bad"
            " weights, or they overflow in its dtype. Train it again, or name another."
        )
    if not result.images:
        raise FileError(f"{table.where}: none of the images can be decoded. The first: {result.failures[0]}")
    result.seconds = time.perf_counter() - start
    return result


def _batches(table: ImageTable, processor: Any, batch_size: int) -> Iterator[Batch]:
    """Preprocessed batches, the next ones being decoded while the model works."""

    def load(row: int) -> torch.Tensor | str:
        try:
            image = table.decode(row)
        except FileError as error:
            return str(error)
        try:
            return to_pixels(processor, image)
        except ImageError as error:
            return f"{table.name(row)}: {error.reason}"

    with ThreadPoolExecutor(max_workers=2) as pool:
        starts = list(range(0, len(table), batch_size))
        ahead = [
            [pool.submit(load, row) for row in range(start, min(start + batch_size, len(table)))]
            for start in starts[:2]
        ]
        for number in range(len(starts)):
            batch = [future.result() for future in ahead.pop(0)]
            if number + 2 < len(starts):
                nxt = starts[number + 2]
                ahead.append([pool.submit(load, row) for row in range(nxt, min(nxt + batch_size, len(table)))])
            yield batch
