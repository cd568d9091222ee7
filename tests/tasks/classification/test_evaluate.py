"""`nbhd evaluate`: the figures against a direct count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nbhd.checkpoints import default_checkpoint
from nbhd.errors import ArgumentError, CheckpointError, FileError
from nbhd.tasks.checkpoints import Loaded, load_classifier
from nbhd.tasks.classification.evaluate import Evaluation, evaluate_images, open_for_model
from nbhd.tasks.datasets import first_rows, open_images
from tests.tasks.test_datasets import IMAGENETTE48, write_folder, write_parquet
from tests.tiny import LABELS, write_classifier

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "imagenette128"


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    return load_classifier(tiny_model, torch.device("cpu"))


def test_figures_equal_a_direct_count(loaded: Loaded) -> None:
    table = open_images(IMAGENETTE48, "train")
    result = evaluate_images(loaded, table, batch_size=7)
    pixels = [loaded.processor(table.decode(row), return_tensors="pt")["pixel_values"] for row in range(len(table))]
    with torch.no_grad():
        logits = torch.cat([loaded.model(pixel_values=image).logits for image in pixels])
    labels = torch.from_numpy(table.labels)
    assert result.images == 80
    assert result.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    order = logits.argsort(1, descending=True)[:, :5]
    assert result.top5 == pytest.approx((order == labels[:, None]).any(1).float().mean().item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    for i, row in enumerate(result.per_class):
        mine = labels == i
        assert row["class"] == LABELS[i]
        assert row["images"] == int(mine.sum()) == 8
        assert row["accuracy"] == pytest.approx((logits.argmax(1)[mine] == i).float().mean().item())
        assert result.confusion[i].sum() == 8
    assert json.dumps(result.summary(), allow_nan=False)


def test_classes_that_do_not_occur_are_left_out_and_confusion_names_the_worst() -> None:
    confusion = np.array([[3, 1, 2], [0, 0, 0], [0, 0, 4]])
    result = Evaluation(["a", "b", "c"], confusion, 10, 5.0)
    assert (result.images, result.top1, result.top5, result.loss) == (10, 0.7, 1.0, 0.5)
    first, last = result.per_class
    assert (first["class"], first["accuracy"], first["precision"]) == ("a", 0.5, 1.0)
    assert (first["mistaken_for"], first["mistaken"]) == ("c", 2)
    assert (last["class"], last["precision"], last["mistaken_for"]) == ("c", pytest.approx(4 / 6), None)


def test_classes_are_matched_by_name(loaded: Loaded, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", ["tench", "parachute"])
    assert open_for_model(loaded, file, "validation").labels.tolist() == [0, 9]
    folder = write_folder(tmp_path / "folder", "golf ball", "church", images=1)
    assert open_for_model(loaded, folder, "validation").labels.tolist() == [4, 8]


def test_model_without_names_takes_the_datas_numbers(tmp_path: Path) -> None:
    nameless = {"id2label": {i: f"LABEL_{i}" for i in range(10)}, "label2id": {f"LABEL_{i}": i for i in range(10)}}
    loaded = load_classifier(write_classifier(tmp_path / "m", **nameless), torch.device("cpu"))
    table = open_for_model(loaded, IMAGENETTE48, "validation")
    assert evaluate_images(loaded, table).images == 40


def test_data_with_more_classes_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    table = open_images(write_parquet(tmp_path / "x.parquet", [0, 10]), "train")
    with pytest.raises(ArgumentError, match="has 11 classes"):
        evaluate_images(loaded, table)


def test_nothing_to_decode_is_an_error(loaded: Loaded, tmp_path: Path) -> None:
    table = open_images(write_parquet(tmp_path / "x.parquet", [0, 1], [b"no", b"image"]), "train")
    with pytest.raises(FileError, match=r"none of the images can be decoded\. The first: .* row 0"):
        evaluate_images(loaded, table)


@pytest.mark.slow
def test_default_checkpoint_knows_most_of_imagenette() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"the full data set is not in {SHARED}")
    try:
        folder = default_checkpoint()
    except CheckpointError as error:
        pytest.skip(f"no default checkpoint: {error}")
    loaded = load_classifier(folder, torch.device("cpu"))
    table = first_rows(open_for_model(loaded, SHARED, "validation"), 400)
    assert evaluate_images(loaded, table).top1 >= 0.6
