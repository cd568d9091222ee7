"""Class numbers and class names: from columns of either, and compared with a model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbhd.errors import ArgumentError, FileError, WrongFile

if TYPE_CHECKING:
    from nbhd.tasks.datasets import ImageTable


#: Numbers without names may go up to this, or to so many times as many as there are different ones; others are ids.
MOST_UNNAMED = 100_000
MOST_GAPS = 100


class OtherClasses(WrongFile):
    """The data's classes are not those it was to be numbered by.

    Attributes:
        numbered: whether the data has numbers of its own, and not names alone.
    """

    def __init__(self, message: str, numbered: bool = False) -> None:
        super().__init__(message)
        self.numbered = numbered


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
        FileError: a label is missing, of another kind, or not among the classes (`OtherClasses`: by its name).
    """
    missing = next((row for row, label in enumerate(raw) if label is None), None)
    if missing is not None:
        raise FileError(f"{where}: row {missing} has no label in column {column!r}")
    if all(isinstance(label, str) for label in raw):
        names = list(wanted) if wanted is not None else list(declared or sorted(set(raw)))
        return number_names(raw, names, f"{where}: labels"), names
    if not all(isinstance(label, int) for label in raw):
        kinds = sorted({type(label).__name__ for label in raw})
        raise FileError(f"{where}: column {column!r} must hold class numbers or names, got {', '.join(kinds)}")
    names = list(declared or wanted or _unnamed(raw, where, column))
    bad = next((row for row, label in enumerate(raw) if not 0 <= label < len(names)), None)
    if bad is not None:
        raise FileError(
            f"{where}: row {bad} has label {raw[bad]}, outside the {len(names)} classes 0..{len(names) - 1}"
        )
    labels = np.array(raw, dtype=np.int64)
    if wanted is not None and declared is not None and list(wanted) != list(declared):
        if sorted(wanted) != sorted(declared):
            raise OtherClasses(f"{where} has the classes {some(declared)}, expected {some(wanted)}", numbered=True)
        order = np.array([list(wanted).index(name) for name in declared])
        return order[labels], list(wanted)
    return labels, names


def number_names(found: Sequence[str], names: Sequence[str], what: str) -> np.ndarray:
    """The place ``[N]`` of each of ``found`` in ``names``; raises `OtherClasses` if one is not there."""
    number = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(found) - set(names))
    if unknown:
        message = f"{what} {some(unknown)} are not among the {len(names)} classes: {some(names)}"
        raise OtherClasses(message)
    return np.array([number[name] for name in found], dtype=np.int64)


def _unnamed(raw: Sequence[int], where: str, column: str) -> list[str]:
    """Names of classes that have only numbers, up to the highest."""
    highest, different = max(raw), len(set(raw))
    if highest > max(MOST_UNNAMED, MOST_GAPS * different):
        raise FileError(
            f"{where}: column {column!r} has {different} different numbers, up to {highest}: they are ids, not class"
            " numbers. Number the classes 0, 1, ..., or store the ids as text, which makes them class names."
        )
    return numbers(max(highest, 0) + 1)


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
    """Whether classes have no names but their numbers: ``0``, ``1``, ... or ``LABEL_0``, ``LABEL_1``, ... in order."""
    plain = numbers(len(names))
    return list(names) == plain or list(names) == [f"LABEL_{number}" for number in plain]


def numbers(count: int) -> list[str]:
    """``0``, ``1``, ..., the names of ``count`` classes without names."""
    return [str(i) for i in range(count)]


def some(names: Sequence[str], most: int = 6) -> str:
    """The first few names and how many there are, for messages."""
    shown = ", ".join(map(str, names[:most]))
    return shown + (f", ... ({len(names)})" if len(names) > most else "")
