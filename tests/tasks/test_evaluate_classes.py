"""Whose numbers the classes of data get when a model is measured on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from nbhd.errors import FileError
from nbhd.tasks.checkpoints import Loaded, load_classifier
from nbhd.tasks.classification.evaluate import evaluate_images, open_for_model
from tests.tasks.test_datasets import write_folder, write_parquet
from tests.tiny import write_classifier

Make = Callable[[Sequence[str]], Loaded]


@pytest.fixture
def model(tmp_path: Path) -> Make:
    """A function from names to a model whose classes have them."""

    def make(names: Sequence[str]) -> Loaded:
        settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        return load_classifier(write_classifier(tmp_path / "model", **settings), torch.device("cpu"))

    return make


def _labels(loaded: Loaded, kind: str, names: Sequence[str], folder: Path) -> list[int]:
    """The numbers that classes of these names get, in the order of the names."""
    if kind == "folders":
        table = open_for_model(loaded, write_folder(folder / "data", *names, images=1), "validation")
        order = sorted(names)
        found = {order[row]: int(label) for row, label in enumerate(table.labels)}
    else:
        table = open_for_model(loaded, write_parquet(folder / "x.parquet", list(names)), "validation")
        found = dict(zip(names, table.labels.tolist(), strict=True))
    evaluate_images(loaded, table)  # does not find them wrong
    return [found[name] for name in names]


LABELS = [f"LABEL_{i}" for i in range(3)]
DIGITS = [str(i) for i in range(11)]


@pytest.mark.parametrize("kind", ["folders", "text"])
@pytest.mark.parametrize(
    ("names", "found", "expected"),
    [
        (["1", "10", "2"], ["10", "2"], [1, 2]),  # names of digits, one of them absent
        (["1", "10", "2"], ["1", "2", "10"], [0, 2, 1]),
        (DIGITS, ["2", "10"], [2, 10]),  # the names are the numbers
        (["0", "1"], ["1"], [1]),
        (["1", "0"], ["0", "1"], [1, 0]),
        (LABELS, ["LABEL_2", "LABEL_1"], [2, 1]),
        (LABELS, ["2", "0"], [2, 0]),
        (LABELS, ["cat", "dog", "ape"], [1, 2, 0]),  # as many as the model has: in alphabetical order
        (LABELS, ["1", "2", "10"], [0, 2, 1]),
        (["0", "1"], ["cat", "dog"], [0, 1]),
    ],
)
def test_classes_get_the_models_numbers(
    kind: str, names: list[str], found: list[str], expected: list[int], model: Make, tmp_path: Path
) -> None:
    assert _labels(model(names), kind, found, tmp_path) == expected


@pytest.mark.parametrize("kind", ["folders", "text"])
@pytest.mark.parametrize(
    ("names", "found", "message"),
    [
        (["1", "10", "2"], ["1", "3"], r"3 are not among the 3 classes: 1, 10, 2"),
        (["0", "1", "2"], ["1", "2", "3"], r"3 are not among the 3 classes: 0, 1, 2"),
        (["cat", "dog"], ["0", "1"], r"0, 1 are not among the 2 classes: cat, dog"),
        (LABELS, ["cat", "dog"], r"names its 3 classes LABEL_0, LABEL_1, \.\.\. \(3\): which of them is 'cat' cannot"),
    ],
)
def test_classes_that_are_none_of_the_models_are_named(
    kind: str, names: list[str], found: list[str], message: str, model: Make, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=message):
        _labels(model(names), kind, found, tmp_path)


def test_numbers_with_names_of_their_own_keep_them_where_the_model_has_none(model: Make, tmp_path: Path) -> None:
    loaded = model(LABELS)
    table = open_for_model(loaded, write_parquet(tmp_path / "x.parquet", [1, 0], names=["cat", "dog"]), "validation")
    assert (table.class_names, table.labels.tolist()) == (["cat", "dog"], [1, 0])
    assert evaluate_images(loaded, table).images == 2


def test_numbers_with_names_of_digits_are_numbered_by_name(model: Make, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", [0, 1, 2], names=["1", "2", "10"])
    assert open_for_model(model(["1", "10", "2"]), file, "validation").labels.tolist() == [0, 2, 1]
