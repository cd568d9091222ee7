"""Folders on the disk, the Auto classes, the pipeline and the Trainer, all offline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

from nbhd.models import NatBackbone, NatConfig, NatForImageClassification, NatImageProcessor, NatModel
from nbhd.models._transformers import AutoImageProcessor
from tests.fixtures.nat_reference import fill_weights

SETTINGS: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "kernel_size": 3,
    "id2label": {0: "cat", 1: "dog", 2: "cow"},
    "label2id": {"cat": 0, "dog": 1, "cow": 2},
    "layer_scale_init_value": 0.1,
}


@pytest.fixture
def model() -> NatForImageClassification:
    model = NatForImageClassification(NatConfig(**SETTINGS)).eval()
    fill_weights(model, seed=0)
    return model


@pytest.fixture
def folder(model: NatForImageClassification, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    NatImageProcessor.for_image_size(40).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def picture() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def test_auto_classes_read_a_folder(folder: Path, model: NatForImageClassification) -> None:
    pixels = torch.randn(2, 3, 24, 40)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert type(loaded) is NatForImageClassification
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert type(AutoConfig.from_pretrained(folder)) is NatConfig
    base = AutoModel.from_pretrained(folder)
    assert type(base) is NatModel
    assert torch.equal(base(pixels).pooler_output, model.nat(pixels).pooler_output)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is NatImageProcessor
    assert processor.to_dict() == NatImageProcessor.for_image_size(40).to_dict()


def test_backbone_takes_the_weights_of_a_classifier(folder: Path, model: NatForImageClassification) -> None:
    backbone = NatBackbone.from_pretrained(folder, out_features=["stem", "stage1", "stage2"]).eval()
    pixels = torch.randn(1, 3, 24, 40)
    stem = model.nat.embeddings(pixels)
    states = backbone(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], stem)
    assert torch.equal(states[2], model.nat(pixels, output_hidden_states=True).hidden_states[-1])
    for norm in backbone.hidden_states_norms.values():  # not in the checkpoint: initial weights, not what memory held
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_backbone_from_a_configuration(folder: Path) -> None:
    backbone = AutoBackbone.from_config(NatConfig(**SETTINGS, out_indices=[1, 2]))
    assert type(backbone) is NatBackbone
    assert backbone.channels == [8, 16]
    assert backbone.out_features == ["stage1", "stage2"]
    saved = folder.parent / "backbone"
    backbone.save_pretrained(saved)
    again = NatBackbone.from_pretrained(saved).eval()
    pixels = torch.randn(1, 3, 24, 40)
    for a, b in zip(again(pixels).feature_maps, backbone.eval()(pixels).feature_maps, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("from_objects", [False, True])
def test_pipeline(folder: Path, model: Any, picture: PIL.Image.Image, from_objects: bool) -> None:
    if from_objects:
        classify = pipeline("image-classification", model=model, image_processor=NatImageProcessor.for_image_size(40))
    else:
        classify = pipeline("image-classification", model=str(folder))
    pixels = NatImageProcessor.for_image_size(40)(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1)[0]
    answers = classify(picture)
    assert [a["label"] for a in answers] == [SETTINGS["id2label"][int(i)] for i in expected.argsort(descending=True)]
    assert [a["score"] for a in answers] == pytest.approx(expected.sort(descending=True).values.tolist())
    picture.save(folder / "picture.png")
    assert classify([str(folder / "picture.png")] * 2, top_k=1) == [answers[:1]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_of_a_checkpoint_stays_unless_another_is_asked(folder: Path, model: Any, dtype: torch.dtype) -> None:
    assert AutoModelForImageClassification.from_pretrained(folder, dtype=dtype).dtype == dtype
    model.to(dtype).save_pretrained(folder)
    assert AutoModelForImageClassification.from_pretrained(folder).dtype == dtype
    assert AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_weights_a_checkpoint_lacks_get_initial_values(folder: Path, model: NatForImageClassification) -> None:
    # Copies: older versions of safetensors map the file, and write over it in place.
    weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    lacking = {name: value for name, value in weights.items() if "rpb" not in name and "layer_scale" not in name}
    assert len(lacking) == len(weights) - 4
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    for name, value in loaded.named_parameters():
        if "rpb" in name:
            assert not value.any(), name
        elif "layer_scale" in name:
            assert torch.equal(value, torch.full_like(value, 0.1)), name
        else:
            assert torch.equal(value, weights[name]), name


def test_keys_are_those_of_4_40_2() -> None:
    keys = set(NatForImageClassification(NatConfig(**SETTINGS)).state_dict())
    layer = {
        *(f"{part}.{kind}" for part in (
            "layernorm_before", "layernorm_after", "attention.self.query", "attention.self.key", "attention.self.value",
            "attention.output.dense", "intermediate.dense", "output.dense",
        ) for kind in ("weight", "bias")),
        "attention.self.rpb", "layer_scale_parameters",
    }  # fmt: skip
    assert keys == {
        *(f"nat.encoder.levels.{i}.layers.0.{name}" for i in (0, 1) for name in layer),
        *(f"nat.embeddings.patch_embeddings.projection.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
        *(f"nat.{name}.{kind}" for name in ("embeddings.norm", "layernorm") for kind in ("weight", "bias")),
        "nat.encoder.levels.0.downsample.reduction.weight",
        "nat.encoder.levels.0.downsample.norm.weight", "nat.encoder.levels.0.downsample.norm.bias",
        "classifier.weight", "classifier.bias",
    }  # fmt: skip


@pytest.mark.slow
def test_trainer_trains_accumulates_and_evaluates(tmp_path: Path, model: NatForImageClassification) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install 'nbhd[train]'")
    from transformers import Trainer, TrainingArguments

    data = [{"pixel_values": torch.randn(3, 24, 24), "labels": i % 3} for i in range(8)]

    def trained(batch: int, steps: int) -> dict[str, torch.Tensor]:
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=2, seed=0,
            learning_rate=0.01, optim="sgd", use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
            lr_scheduler_type="constant", max_grad_norm=0, dataloader_pin_memory=False,
        )  # fmt: skip
        copy = NatForImageClassification(NatConfig(**SETTINGS, drop_path_rate=0.0))
        copy.load_state_dict(model.state_dict())
        trainer = Trainer(copy, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        return copy.state_dict()

    # Two accumulated halves are one whole batch: the loss of the steps is averaged, not added.
    for (name, a), b in zip(trained(4, 1).items(), trained(2, 2).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-6, rtol=1e-5)
        # The softmax does not see a constant added to all keys.
        assert name.endswith("key.bias") or not torch.equal(a, model.state_dict()[name]), name


def test_import_registers_and_needs_no_torchvision() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"  # any import of it now fails
        "import nbhd.models\n"
        "from transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('nat')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "NatConfig"
