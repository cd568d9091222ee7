"""The classifier from Python: the right numbers, in order, for anything given to it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nbhd.errors import ArgumentError, CheckpointError
from nbhd.tasks.classification import Classification, Classifier, Score, predict as predict_module
from nbhd.tasks.inputs import Input
from tests.pictures import bombs, encode, noise
from tests.tiny import LABELS, write_classifier


@pytest.fixture(scope="module")
def classifier(tiny_model: Path) -> Classifier:
    return Classifier(tiny_model, "cpu")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Twelve different pictures of different sizes and formats."""
    made = []
    for i in range(12):
        kind = ("PNG", "JPEG", "WEBP")[i % 3]
        path = tmp_path / f"{i:02}.{kind.lower()}"
        path.write_bytes(encode(noise(40 + 10 * i, 120 - 5 * i, seed=i).resize((90 + i, 70 + 2 * i)), kind))
        made.append(path)
    return made


def reference(model: Path, image: Image.Image) -> torch.Tensor:
    """Probabilities by transformers alone, one picture at a time."""
    from transformers import AutoModelForImageClassification

    from nbhd.models._transformers import AutoImageProcessor

    network = AutoModelForImageClassification.from_pretrained(model).eval()
    processor = AutoImageProcessor.from_pretrained(model)
    with torch.no_grad():
        return network(**processor(images=image, return_tensors="pt")).logits[0].softmax(-1)


def test_probabilities_are_those_of_transformers(classifier: Classifier, tiny_model: Path, files: list[Path]) -> None:
    results = classifier.predict(files, top_k=10, batch_size=5)
    for path, result in zip(files, results, strict=True):
        with Image.open(path) as image:
            expected = reference(tiny_model, image.convert("RGB"))
        order = expected.argsort(descending=True).tolist()
        assert [score.label for score in result.predictions] == [LABELS[i] for i in order]
        np.testing.assert_allclose([s.probability for s in result.predictions], expected[order], rtol=1e-4, atol=1e-6)
    assert len({result.predictions for result in results}) == len(files)  # the model does tell them apart


def test_pipeline_agrees(classifier: Classifier, tiny_model: Path, files: list[Path]) -> None:
    from transformers import pipeline

    pipe = pipeline("image-classification", model=str(tiny_model), device="cpu")
    expected = pipe(str(files[0]), top_k=3)
    found = classifier.predict(files[0], top_k=3)[0].predictions
    assert [score.label for score in found] == [each["label"] for each in expected]
    assert [score.probability for score in found] == pytest.approx([each["score"] for each in expected], rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("workers", [1, 4])
def test_order_and_answers_do_not_depend_on_batch_size_and_workers(
    classifier: Classifier, files: list[Path], batch_size: int, workers: int
) -> None:
    expected = classifier.predict(files)
    found = classifier.predict(files, batch_size=batch_size, workers=workers)
    assert [each.path for each in found] == [str(path) for path in files]
    for one, other in zip(expected, found, strict=True):
        assert [s.label for s in one.predictions] == [s.label for s in other.predictions]
        assert [s.probability for s in one.predictions] == pytest.approx(
            [s.probability for s in other.predictions], rel=1e-4
        )


def test_a_large_photograph_gives_nearly_the_same_answer_though_decoded_smaller(
    classifier: Classifier, tiny_model: Path
) -> None:
    image = noise(40, 30, seed=3).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encode(image, "JPEG", quality=95)
    found = {score.label: score.probability for score in classifier.predict(data, top_k=10)[0].predictions}
    expected = reference(tiny_model, image)
    assert max(abs(found[label] - p) for label, p in zip(LABELS, expected.tolist(), strict=True)) < 0.02


def test_every_kind_of_source(classifier: Classifier, files: list[Path]) -> None:
    data = files[0].read_bytes()
    with Image.open(files[0]) as image:
        image.load()
    results = classifier.predict([files[0], str(files[0]), data, image, Input(str(files[0]))])
    assert [result.path for result in results] == [str(files[0]), str(files[0]), None, None, str(files[0])]
    assert {result.predictions for result in results} == {results[0].predictions}


def test_one_source_alone(classifier: Classifier, files: list[Path]) -> None:
    for source in (files[0], str(files[0]), files[0].read_bytes()):
        assert len(classifier.predict(source)) == 1


def test_nothing(classifier: Classifier) -> None:
    assert classifier.predict([]) == []


def test_bad_pictures_do_not_disturb_the_others(classifier: Classifier, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no")
    sources = [tmp_path / "none.jpg", files[0], bombs()["png"], tmp_path / "text.jpg", files[1], Input("x", "why not")]
    found = classifier.predict(sources, batch_size=2)
    assert [result.error is None for result in found] == [False, True, False, False, True, False]
    assert found[0] == Classification(str(tmp_path / "none.jpg"), error="no such file")
    assert found[-1] == Classification("x", error="why not")
    alone = classifier.predict(files[0])[0].predictions
    assert [score.label for score in found[1].predictions] == [score.label for score in alone]
    assert [score.probability for score in found[1].predictions] == pytest.approx(
        [s.probability for s in alone], rel=1e-4
    )


def test_many_bad_pictures(classifier: Classifier, files: list[Path]) -> None:
    found = classifier.predict([*[b"bad"] * 500, files[0]], batch_size=2)
    assert len(found) == 501
    assert found[-1].error is None


def test_a_file_that_vanishes_midway(classifier: Classifier, files: list[Path]) -> None:
    stream = classifier.stream(files, batch_size=1, workers=1)
    assert next(stream).error is None
    files[-1].unlink()
    assert list(stream)[-1] == Classification(str(files[-1]), error="no such file")


def test_pictures_are_taken_in_as_they_are_needed(classifier: Classifier, files: list[Path]) -> None:
    """100,000 pictures need no more memory than a few batches."""
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield files[0]

    stream = classifier.stream(endless(), batch_size=4, workers=2)
    for given in range(1, 40):
        next(stream)
        assert taken <= given + 3 * 4 + 2
    stream.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("nbhd-decode") and not _ends(thread)
    ]


def _ends(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def test_strips_do_not_fill_the_memory(classifier: Classifier) -> None:
    strips = [encode(Image.new("RGB", size, (9, 99, 200)), "PNG") for size in ((1, 60_000), (60_000, 1), (1, 1))]
    found = classifier.predict(strips)
    assert [result.error for result in found] == [None] * 3
    first = found[0].predictions
    for result in found[1:]:
        assert [s.label for s in result.predictions] == [s.label for s in first]


def test_a_picture_without_memory_for_it_does_not_disturb_the_others(tiny_model: Path, files: list[Path]) -> None:
    classifier = Classifier(tiny_model, "cpu")
    processor = classifier.processor

    def full(images: Image.Image, **options: object) -> object:
        if images.width == 91:
            raise MemoryError
        return processor(images=images, **options)

    classifier.processor = full
    assert [result.error for result in classifier.predict(files[:3])] == [
        None,
        "not enough memory to prepare it",
        None,
    ]


def test_more_labels_than_there_are(classifier: Classifier, files: list[Path]) -> None:
    scores = classifier.predict(files[0], top_k=1000)[0].predictions
    assert sorted(score.label for score in scores) == sorted(LABELS)
    assert sum(score.probability for score in scores) == pytest.approx(1)


@pytest.mark.parametrize("name", ["top_k", "batch_size", "workers"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "4"])
def test_numbers_are_checked_at_once(classifier: Classifier, name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be a whole number of at least 1, got {value!r}"):
        classifier.stream([], **{name: value})  # type: ignore[arg-type]


def test_an_answer_that_is_not_a_number_is_an_error(tiny_model: Path, files: list[Path]) -> None:
    broken = Classifier(tiny_model, "cpu")
    with torch.no_grad():
        broken.model.classifier.bias[3] = torch.nan
    result = broken.predict(files[0])[0]
    assert result.predictions == ()
    assert result.error is not None
    assert "not a number" in result.error


def test_several_labels_may_be_true(tmp_path: Path, files: list[Path]) -> None:
    model = write_classifier(tmp_path / "model", problem_type="multi_label_classification")
    scores = Classifier(model, "cpu").predict(files[0], top_k=10)[0].predictions
    assert sum(score.probability for score in scores) > 1.5


def test_a_regressor_has_no_labels(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", problem_type="regression")
    with pytest.raises(
        ArgumentError, match=r"it has no labels to choose from. Call it in Python: Nat\w+\.from_pre"
    ) as e:
        Classifier(model, "cpu")
    assert str(model) in str(e.value)


def test_as_dict() -> None:
    result = Classification("a", (Score("x", 0.5),))
    assert result.as_dict() == {"path": "a", "predictions": [{"label": "x", "probability": 0.5}], "error": None}


# Checkpoints


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints_run_in_float32_on_a_cpu(tmp_path: Path, files: list[Path], dtype: str) -> None:
    model = Classifier(write_classifier(tmp_path / "model", dtype=dtype), "cpu")
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
    assert model.predict(files[0])[0].error is None


def test_without_an_image_processor_nats_own_is_used(tmp_path: Path, files: list[Path]) -> None:
    from nbhd.models.nat import NatImageProcessor

    model = Classifier(write_classifier(tmp_path / "model", processor=False), "cpu")
    assert isinstance(model.processor, NatImageProcessor)
    assert model.processor.to_dict() == NatImageProcessor().to_dict()
    assert model.predict(files[0])[0].error is None


def test_pictures_of_different_sizes_share_a_batch_if_the_processor_leaves_them_so(
    tmp_path: Path, files: list[Path]
) -> None:
    folder = write_classifier(tmp_path / "model")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "do_center_crop": False, "do_resize": False})
    )
    model = Classifier(folder, "cpu")
    together, alone = model.predict(files, batch_size=12), [model.predict(path)[0] for path in files]
    for one, other in zip(together, alone, strict=True):
        assert [s.label for s in one.predictions] == [s.label for s in other.predictions]


def test_other_architectures(tmp_path: Path, files: list[Path]) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=3
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}})
    )
    assert len(Classifier(tmp_path / "vit", "cpu").predict(files[0])[0].predictions) == 3


def test_a_dinat_of_transformers_needs_no_natten(tmp_path: Path, files: list[Path]) -> None:
    from transformers import DinatConfig

    from nbhd.models import NatConfig, NatForImageClassification

    sizes = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "kernel_size": 3, "dilations": [[1, 2], [4]]}
    folder = tmp_path / "dinat"
    DinatConfig(**sizes, num_labels=3).save_pretrained(folder)
    weights = NatForImageClassification(NatConfig(**sizes, num_labels=3)).state_dict()
    torch.save({name.replace("nat.", "dinat."): value for name, value in weights.items()}, folder / "pytorch_model.bin")
    classifier = Classifier(folder, "cpu")
    assert len(classifier.predict(files[0])[0].predictions) == 3


def refused(model: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        Classifier(model, "cpu")  # type: ignore[arg-type]
    return str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == f"model {str(tmp_path / 'none')!r}: there is no such folder."
    assert "there is no such folder" in refused("./none")
    assert "there is no such folder" in refused("../a/b")


def test_a_file_is_no_model(tiny_model: Path) -> None:
    assert "is a file" in refused(tiny_model / "config.json")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(tmp_path)


def test_a_training_folder_points_to_its_last_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "checkpoint-100")
    assert f"Did you mean {tmp_path / 'checkpoint-100'}?" in refused(tmp_path)


def test_a_hub_id_while_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused("nobody/such-model-as-this")
    assert message.startswith("model 'nobody/such-model-as-this' is not a folder here, and cannot be had from the")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "half"])
def test_damaged_files(tiny_model: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes({"empty": b"", "garbage": b"\xff\x00" * 50, "half": data[: len(data) // 2]}[damage])
    assert "cannot load" in refused(folder)


def test_weights_missing(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "cannot load" in refused(folder)


def test_a_backbone_alone_would_answer_at_random(tmp_path: Path) -> None:
    from nbhd.models.nat import NatConfig, NatModel

    NatModel(NatConfig(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3)).save_pretrained(tmp_path / "model")
    assert "lacks 2 of the weights of a NatForImageClassification (classifier.bias, classifier.weight)" in refused(
        tmp_path / "model"
    )


def test_weights_of_another_shape(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "embed_dim": 16}))
    assert "cannot load" in refused(folder)


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "model")
    assert "cannot load an image classifier" in refused(tmp_path / "model")


def test_a_model_for_grey_pictures(tmp_path: Path) -> None:
    assert "1 channels" in refused(write_classifier(tmp_path / "model", num_channels=1))


def test_code_in_a_model_folder_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "surely-not-known"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot load" in refused(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("gpu", "not a name torch knows"),
        ("cpu:7", "there is one cpu device"),
        ("meta", "not available on this machine"),
    ],
)
def test_unknown_devices(tiny_model: Path, device: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match=f"device '{device}': {reason}. Use one of .*'cpu'"):
        Classifier(tiny_model, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(tiny_model: Path) -> None:
    with pytest.raises(ArgumentError, match="device 'cuda:0': not available on this machine"):
        Classifier(tiny_model, "cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(classifier: Classifier, tiny_model: Path, files: list[Path]) -> None:
    on_cuda = Classifier(tiny_model, "cuda").predict(files, top_k=10)
    for one, other in zip(classifier.predict(files, top_k=10), on_cuda, strict=True):
        expected = {s.label: s.probability for s in one.predictions}
        assert {s.label: s.probability for s in other.predictions} == pytest.approx(expected, abs=1e-3)


def test_out_of_memory_says_what_to_do(
    classifier: Classifier, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predict_module.torch, "stack", lambda *_: full())
    with pytest.raises(Exception, match="Use a smaller batch_size"):
        classifier.predict(files[0])
