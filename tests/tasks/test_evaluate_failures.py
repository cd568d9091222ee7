"""Measuring models that do not answer, models that cannot be measured, and pictures that need care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nbhd.errors import ArgumentError, CheckpointError
from nbhd.tasks.checkpoints import Loaded, load_classifier
from nbhd.tasks.classification import predict
from nbhd.tasks.classification.evaluate import Evaluation, check_measurable, evaluate_images
from nbhd.tasks.datasets import open_images
from tests.pictures import encode, noise
from tests.tasks.test_datasets import write_parquet
from tests.tiny import LABELS, write_classifier


@pytest.fixture
def loaded(tiny_model: Path) -> Loaded:
    return load_classifier(tiny_model, torch.device("cpu"))


def _table(folder: Path, images: list[bytes]) -> Any:
    return open_images(write_parquet(folder / "x.parquet", list(range(len(images))), images), "validation")


def _nan_where(loaded: Loaded, pictures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model answer NaN for some pictures, by their place in the order they come in."""
    seen = 0
    forward = loaded.model.forward

    def answer(pixel_values: torch.Tensor) -> Any:
        nonlocal seen
        output = forward(pixel_values=pixel_values)
        for i in range(len(pixel_values)):
            if seen in pictures:
                output.logits[i, 3] = torch.nan
            seen += 1
        return output

    monkeypatch.setattr(loaded.model, "forward", answer)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_pictures_whose_answer_is_not_a_number_are_left_out(
    batch_size: int, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [encode(noise(seed=i), "PNG") for i in range(5)]
    images[1] = b"no picture"
    table = _table(tmp_path, images)
    whole = evaluate_images(loaded, table, batch_size=batch_size)
    _nan_where(loaded, [1, 3], monkeypatch)  # rows 2 and 4
    result = evaluate_images(loaded, table, batch_size=batch_size)
    assert result.images == 2
    assert result.confusion.sum(1).tolist() == [1, 0, 0, 1] + [0] * 6
    assert (result.confusion <= whole.confusion).all()
    assert 0 < result.loss_sum < whole.loss_sum
    assert [(text.split(" row ")[1][0], "not a number" in text) for text in sorted(result.failures)] == [
        ("1", False),
        ("2", True),
        ("4", True),
    ]
    assert json.loads(json.dumps(result.summary(), allow_nan=False))["skipped"] == 3


def test_a_model_that_never_answers_is_an_error(loaded: Loaded, tmp_path: Path) -> None:
    with torch.no_grad():
        loaded.model.classifier.bias[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"answers none of 2 pictures of .* with numbers: it has bad weights"):
        evaluate_images(loaded, _table(tmp_path, [encode(noise(), "PNG"), b"no picture", encode(noise(), "PNG")]))


def test_a_loss_without_bound_is_null_in_json() -> None:
    result = Evaluation(["a", "b"], np.eye(2, dtype=np.int64), 2, float("inf"))
    assert result.summary()["loss"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "gives a picture any number of labels"),
        ({"id2label": {0: "cat"}, "label2id": {"cat": 0}}, "has one label"),
        ({"problem_type": "regression"}, r"is a regressor .* NatForImageClassification\.from_pretrained"),
    ],
)
def test_what_does_not_choose_a_label_is_not_measured(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    loaded = load_classifier(write_classifier(tmp_path / "model", **settings), torch.device("cpu"))
    with pytest.raises(ArgumentError, match=message):
        check_measurable(loaded)
    with pytest.raises(ArgumentError, match=message):
        evaluate_images(loaded, _table(tmp_path, [encode(noise(), "PNG")]))


def test_strips_are_cut_before_they_are_resized(loaded: Loaded, tmp_path: Path) -> None:
    sizes = []
    processor = loaded.processor

    def watched(images: Image.Image, **options: Any) -> Any:
        sizes.append(images.size)
        return processor(images=images, **options)

    strips = [encode(Image.new("RGB", size, (9, 99, 200)), "PNG") for size in ((1, 60_000), (60_000, 1))]
    for name in ("do_resize", "size"):
        setattr(watched, name, getattr(processor, name))
    result = evaluate_images(Loaded(loaded.model, watched, loaded.source), _table(tmp_path, strips))
    assert result.images == 2
    assert sorted(sizes) == [(1, predict.MAX_ASPECT), (predict.MAX_ASPECT, 1)]


def test_a_picture_without_memory_for_it_is_left_out(loaded: Loaded, tmp_path: Path) -> None:
    processor = loaded.processor

    def full(images: Image.Image, **options: Any) -> Any:
        if images.width == 33:
            raise MemoryError
        return processor(images=images, **options)

    table = _table(tmp_path, [encode(noise(), "PNG"), encode(noise(33, 40), "PNG")])
    result = evaluate_images(Loaded(loaded.model, full, loaded.source), table)
    assert result.images == 1
    assert result.failures == [f"{table.name(1)}: not enough memory to prepare it"]


def test_pictures_that_the_processor_leaves_in_their_sizes(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_center_crop": False}))
    loaded = load_classifier(folder, torch.device("cpu"))
    images = [encode(noise(40 + 10 * (i % 3), 40, seed=i), "PNG") for i in range(7)]
    table = _table(tmp_path, images)
    together, alone = evaluate_images(loaded, table), evaluate_images(loaded, table, batch_size=1)
    assert together.images == 7
    assert (together.confusion == alone.confusion).all()
    assert together.loss == pytest.approx(alone.loss, rel=1e-4)
    assert together.class_names == list(LABELS)
