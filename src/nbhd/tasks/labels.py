"""Class numbers and class names: from columns of either, and compared with a model's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbhd.errors import ArgumentError, FileError

if TYPE_CHECKING:
    from nbhd.tasks.datasets import ImageTable


def number_labels(
    raw: Sequence[Any], declared: Sequence[str] | None, wanted: Sequence[str] | None, where: str, column: str
) -> tuple[np.ndarray, list[str]]:
    """Class numbers ``[N]`` int64 and class names from a column of numbers or names.

    Args:
        raw: the column's values.
        declared: names that the file itself gives to numbers.
        wanted: names that fix the numbering (a model's, or those of the training split).
        where, column: for messages.

    Raises:
        FileError: a label is missing, of another kind, or not among the classes.
    """
    missing = next((row for row, label in enumerate(raw) if label is None), None)
    if missing is not None:
        raise FileError(f"{where}: row {missing} has no label in column {column!r}")
    if all(isinstance(label, str) for label in raw):
        names = list(wanted) if wanted is not None else list(declared or sorted(set(raw)))
        number = {name: i for i, name in enumerate(names)}
        unknown = sorted(set(raw) - set(names))
        if unknown:
            raise FileError(f"{where}: labels {some(unknown)} are not among the {len(names)} classes: {some(names)}")
        return np.array([number[label] for label in raw], dtype=np.int64), names
    if not all(isinstance(label, int) for label in raw):
        kinds = sorted({type(label).__name__ for label in raw})
        raise FileError(f"{where}: column {column!r} must hold class numbers or names, got {', '.join(kinds)}")
    labels = np.array(raw, dtype=np.int64)
    names = list(declared or wanted or [str(i) for i in range(int(labels.max()) + 1)])
    bad = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(bad):
        raise FileError(
            f"{where}: row {bad[0]} has label {labels[bad[0]]}, outside the {len(names)} classes 0..{len(names) - 1}"
        )
    if wanted is not None and declared is not None and list(wanted) != list(declared):
        if sorted(wanted) != sorted(declared):
            raise FileError(f"{where} has the classes {some(declared)}, expected {some(wanted)}")
        order = np.array([list(wanted).index(name) for name in declared])
        return order[labels], list(wanted)
    return labels, names


def check_labels_fit(table: ImageTable, model_classes: Sequence[str], model: str) -> None:
    """Raise `ArgumentError` unless the table numbers its labels as the model does.

    Classes without names (``0``, ``1``, ... or ``LABEL_0``, ...) on either side are compared by their number alone.
    """
    classes = table.class_names
    if int(table.labels.max(initial=0)) >= len(model_classes) or len(classes) > len(model_classes):
        raise ArgumentError(
            f"{table.where} has {len(classes)} classes ({some(classes)}), but the model {model} has "
            f"{len(model_classes)} ({some(model_classes)}). Evaluate on data with the model's classes, or train a "
            "model on these."
        )
    named = not (only_numbers(classes) or only_numbers(model_classes))
    if named and list(classes) != list(model_classes)[: len(classes)]:
        wrong = next(i for i, name in enumerate(classes) if name != model_classes[i])
        raise ArgumentError(
            f"{table.where} calls class {wrong} {classes[wrong]!r}, but the model {model} calls it "
            f"{model_classes[wrong]!r}. Evaluate on data whose classes have the model's names in the model's order."
        )


def only_numbers(names: Sequence[str]) -> bool:
    """Whether classes have no names but numbers: ``0``, ``1``, ... or ``LABEL_0``, ...."""
    return all(re.fullmatch(r"(LABEL_)?\d+", name) for name in names)


def some(names: Sequence[str], most: int = 6) -> str:
    """The first few names and how many there are, for messages."""
    shown = ", ".join(map(str, names[:most]))
    return shown + (f", ... ({len(names)})" if len(names) > most else "")
