"""Class numbers and names: which numbers are classes, which names are names."""

from __future__ import annotations

from typing import Any

import pytest

from nbhd.errors import FileError
from nbhd.tasks.labels import OtherClasses, number_labels, only_numbers


@pytest.mark.parametrize("names", [[], ["0"], ["0", "1", "2"], ["LABEL_0", "LABEL_1"]])
def test_classes_that_have_no_names(names: list[str]) -> None:
    assert only_numbers(names)


@pytest.mark.parametrize("names", [["1"], ["1", "10", "2"], ["0", "LABEL_1"], ["00", "01"], ["LABEL_1"], ["cat"]])
def test_digits_may_be_names(names: list[str]) -> None:
    assert not only_numbers(names)


@pytest.mark.parametrize("labels", [[10**11, 10**11 + 1], [0, 1, 30_000_000], [2**63 + 5, 2**63 + 6]])
def test_ids_are_not_class_numbers(labels: list[int]) -> None:
    with pytest.raises(
        FileError, match=rf"x: column 'label' has \d different numbers, up to {max(labels)}: they are ids"
    ):
        number_labels(labels, None, None, "x", "label")


@pytest.mark.parametrize("number", [-(2**70), -1, 2, 2**63 + 5])
def test_numbers_of_no_class_are_named_however_large(number: int) -> None:
    with pytest.raises(FileError, match=rf"x: row 1 has label {number}, outside the 2 classes 0\.\.1"):
        number_labels([0, number], None, ["a", "b"], "x", "label")


def test_a_few_classes_of_many_are_no_ids() -> None:
    labels, names = number_labels([3, 21_840], None, None, "x", "label")
    assert (labels.tolist(), len(names)) == ([3, 21_840], 21_841)


@pytest.mark.parametrize(
    ("raw", "declared", "numbered"), [(["cat", "cow"], None, False), ([0, 1], ["cat", "cow"], True)]
)
def test_other_classes_say_whether_the_data_has_numbers(raw: list[Any], declared: Any, numbered: bool) -> None:
    with pytest.raises(OtherClasses, match="cow") as error:
        number_labels(raw, declared, ["cat", "dog"], "x", "label")
    assert error.value.numbered is numbered
