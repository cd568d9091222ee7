"""Where images come from: parquet files, folders, the hub; and what is wrong with a bad source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nbhd.errors import ArgumentError, FileError
from nbhd.tasks import datasets
from nbhd.tasks.datasets import first_rows, open_images
from nbhd.tasks.decoded import decode_all
from nbhd.tasks.labels import check_labels_fit
from tests.pictures import encode, noise

IMAGENETTE48 = Path(__file__).parent.parent / "data" / "imagenette48"
CLASSES = [
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
]


def write_parquet(
    path: Path, labels: list[Any], images: list[bytes] | None = None, names: list[str] | None = None
) -> Path:
    """A parquet file in the image convention of `datasets`."""
    images = images if images is not None else [encode(noise(seed=i), "PNG") for i in range(len(labels))]
    table = pa.table(
        {"image": [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)], "label": labels}
    )
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_folder(root: Path, *classes: str, images: int = 2) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i}.png").write_bytes(encode(noise(seed=10 * number + i), "PNG"))
    return root


# What is read


def test_parquet_split_has_its_labels_and_class_names() -> None:
    table = open_images(IMAGENETTE48, "train")
    assert len(table) == 80
    assert table.class_names[:8] == CLASSES
    assert np.bincount(table.labels).tolist() == [8] * 10
    assert table.decode(0).size == (48, 48)
    assert ".webp" in table.name(0)


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "validation.parquet"],
        [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/validation-00000-of-00001.parquet",
        ],
        ["train/0000.parquet", "train/0001.parquet", "val/0000.parquet"],
        ["training_0.parquet", "valid.parquet"],
    ],
)
def test_split_is_found_by_the_names_in_use(names: list[str], tmp_path: Path) -> None:
    for name in names:
        write_parquet(tmp_path / name, [0, 1])
    assert len(open_images(tmp_path, "train")) == 2 * (len(names) - 1)
    assert len(open_images(tmp_path, "validation")) == 2


def test_lone_parquet_file_is_taken_whole(tmp_path: Path) -> None:
    assert len(open_images(write_parquet(tmp_path / "all.parquet", [0, 1, 1]), "validation")) == 3


def test_text_labels_are_numbered_in_alphabetical_order(tmp_path: Path) -> None:
    table = open_images(write_parquet(tmp_path / "x.parquet", ["dog", "cat", "dog"]), "train")
    assert (table.class_names, table.labels.tolist()) == (["cat", "dog"], [1, 0, 1])


def test_class_names_of_training_fix_the_numbers_of_validation(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", [0, 1], names=["dog", "cat"])
    table = open_images(file, "validation", class_names=["cat", "dog"])
    assert (table.class_names, table.labels.tolist()) == (["cat", "dog"], [1, 0])


def test_plain_bytes_column_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [encode(noise(), "PNG")], "kind": [0]}), tmp_path / "x.parquet")
    table = open_images(tmp_path / "x.parquet", "train", image_column="picture", label_column="kind")
    assert table.decode(0).size == noise().size


@pytest.mark.parametrize("splits", [("train", "validation"), ("train", "val"), ("training", "valid")])
def test_image_folder_with_splits(splits: tuple[str, str], tmp_path: Path) -> None:
    write_folder(tmp_path / splits[0], "cat", "dog", images=3)
    write_folder(tmp_path / splits[1], "dog", images=1)
    train = open_images(tmp_path, "train")
    assert (train.class_names, train.labels.tolist()) == (["cat", "dog"], [0, 0, 0, 1, 1, 1])
    validation = open_images(tmp_path, "validation", class_names=train.class_names)
    assert validation.labels.tolist() == [1]


def test_image_folder_without_splits_is_taken_whole(tmp_path: Path) -> None:
    write_folder(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    assert open_images(tmp_path, "validation").labels.tolist() == [0, 0, 1, 1]


def test_large_parquet_goes_through_the_cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the train extra is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "IN_MEMORY_PARQUET_BYTES", 1)
    small = open_images(IMAGENETTE48, "validation")
    assert isinstance(small, datasets._HubImages)
    monkeypatch.undo()
    same = open_images(IMAGENETTE48, "validation")
    assert small.class_names == same.class_names
    assert small.labels.tolist() == same.labels.tolist()
    assert small.image_bytes(7) == same.image_bytes(7)


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "large"])
@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "images"])
def test_large_and_small_files_take_the_same_columns(
    kind: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        pytest.importorskip("datasets", reason="the train extra is not installed")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets, "IN_MEMORY_PARQUET_BYTES", 0)
    encoded = [encode(noise(), "PNG"), None, b""]
    if kind in ("struct", "images"):
        stored = pa.array([{"bytes": encoded[0], "path": "0.png"}, None, {"bytes": b"", "path": "2.png"}])
    else:
        stored = pa.array(encoded, type=getattr(pa, kind)())
    table = pa.table({"image": stored, "label": [0, 1, 0]})
    if kind == "images":
        features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "x.parquet")
    images = open_images(tmp_path / "x.parquet", "train")
    assert isinstance(images, datasets._HubImages) is large
    assert images.decode(0).size == noise().size
    with pytest.raises(FileError, match=r"x\.parquet row 1: the row holds no image bytes"):
        images.decode(1)
    with pytest.raises(FileError, match=r"x\.parquet row 2( \(2\.png\))?: no bytes"):
        images.decode(2)


@pytest.mark.parametrize("name", ["x.jfif", "x.JFIF", "x.jpe"])
def test_every_ending_of_a_jpeg_is_taken(name: str, tmp_path: Path) -> None:
    (write_folder(tmp_path, "cat", images=1) / "cat" / name).write_bytes(encode(noise(), "JPEG"))
    assert len(open_images(tmp_path, "train")) == 2


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (write_folder(tmp_path, "cat", images=1) / "cat" / "1.png").symlink_to("gone.png")
    table = open_images(tmp_path, "train")
    decoded, rows, failures = decode_all(table, lambda image: image)
    assert (len(decoded), rows.tolist()) == (1, [0])
    assert failures == [f"{tmp_path}/cat/1.png: broken link to gone.png"]


def test_a_picture_without_memory_for_it_is_a_failure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> bytes:
        raise MemoryError

    table = open_images(write_parquet(tmp_path / "x.parquet", [0]), "train")
    monkeypatch.setattr(type(table), "image_bytes", full)
    with pytest.raises(FileError, match=r"row 0 \(0\.png\): not enough memory to read it"):
        table.decode(0)


def test_limit_takes_the_same_rows_of_all_classes() -> None:
    table = first_rows(open_images(IMAGENETTE48, "train"), 40)
    again = first_rows(open_images(IMAGENETTE48, "train"), 40)
    assert len(table) == 40
    assert [table.name(i) for i in range(40)] == [again.name(i) for i in range(40)]
    assert first_rows(table, 1000) is table


def test_decoding_everything_keeps_sizes_and_names_what_fails(tmp_path: Path) -> None:
    images = [encode(noise(20, 30), "PNG"), b"no image", encode(noise(8, 5), "PNG")]
    table = open_images(write_parquet(tmp_path / "x.parquet", [0, 1, 1], images), "train")
    decoded, rows, failures = decode_all(table, lambda image: image)
    assert [decoded[i].shape for i in range(len(decoded))] == [(30, 20, 3), (5, 8, 3)]
    assert (decoded[1] == np.asarray(table.decode(2))).all()
    assert rows.tolist() == [0, 2]
    assert len(failures) == 1
    assert "row 1 (1.png): not an image" in failures[0]


# What is refused


def test_missing_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file or folder"):
        open_images(tmp_path / "nothing", "train")


def test_no_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path, "cat", "dog"))
    assert len(open_images(".", "train")) == 4
    with pytest.raises(ArgumentError, match=r"data must be named, got ''"):
        open_images("", "train")


def test_damaged_large_parquet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the train extra is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "IN_MEMORY_PARQUET_BYTES", 0)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing useful PAR1")
    with pytest.raises(FileError, match=r"\(train\) cannot be read as parquet"):
        open_images(tmp_path, "train")


def test_hub_id_without_a_connection_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("datasets", reason="the train extra is not installed")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\n(offline mode)")

    monkeypatch.setattr(hub, "load_dataset", offline)
    with pytest.raises(
        FileError, match=r"cannot be loaded: Couldn't reach the hub \(offline mode\)\. Check the spelling"
    ):
        open_images("somebody/something", "train")


def test_single_file_must_be_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(FileError, match=r"must be \.parquet, got '\.csv'"):
        open_images(tmp_path / "x.csv", "train")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing useful PAR1")
    with pytest.raises(FileError, match=r"train\.parquet cannot be read as parquet"):
        open_images(tmp_path, "train")


def test_missing_split_lists_the_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0])
    with pytest.raises(FileError, match=r"no split 'validation'. It has: train"):
        open_images(tmp_path, "validation")
    write_folder(tmp_path / "folders" / "train", "a", "b")
    with pytest.raises(FileError, match=r"no split 'validation'. It has: train"):
        open_images(tmp_path / "folders", "validation")


@pytest.mark.parametrize(("option", "value"), [("image_column", "img"), ("label_column", "class")])
def test_wrong_column_lists_the_columns(option: str, value: str) -> None:
    with pytest.raises(FileError, match=rf"no column '{value}'. It has: image, label. Choose one with data.{option}"):
        open_images(IMAGENETTE48, "train", **{option: value})


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([], None, "has no rows"),
        ([0, None], None, "row 1 has no label"),
        ([0, 5], ["a", "b"], "row 1 has label 5, outside the 2 classes"),
        ([0, -1], None, "row 1 has label -1"),
        ([0.5, 1.5], None, "must hold class numbers or names, got float"),
    ],
)
def test_bad_labels_are_named(labels: list[Any], names: list[str] | None, message: str, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", labels or [0], names=names)
    if not labels:
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(FileError, match=message):
        open_images(file, "train")


def test_column_of_something_else_is_not_taken_for_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), tmp_path / "x.parquet")
    with pytest.raises(FileError, match="column 'image' holds int64, not encoded images"):
        open_images(tmp_path / "x.parquet", "train")


def test_folder_without_images_says_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileError, match=r"holds no labelled images. Wanted: parquet files"):
        open_images(tmp_path, "train")


def test_validation_class_unknown_to_training_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", "cat", "dog")
    write_folder(tmp_path / "validation", "cow")
    with pytest.raises(FileError, match="folders cow are not among the 2 classes: cat, dog"):
        open_images(tmp_path, "validation", class_names=["cat", "dog"])


def test_labels_that_do_not_fit_the_model_are_an_error() -> None:
    table = open_images(IMAGENETTE48, "validation")
    check_labels_fit(table, table.class_names, "model")
    check_labels_fit(table, [f"LABEL_{i}" for i in range(10)], "model")
    with pytest.raises(ArgumentError, match=r"has 10 classes .* but the model m has 2 "):
        check_labels_fit(table, ["a", "b"], "m")
    with pytest.raises(ArgumentError, match="calls class 0 'tench', but the model m calls it 'parachute'"):
        check_labels_fit(table, table.class_names[::-1], "m")
