"""`NatBackbone` inside transformers' heads for segmentation, detection and matting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers import pipeline

from nbhd.errors import CheckpointError
from nbhd.models import NatBackbone
from tests.models.nat.heads import HEADS, LABELS, SIZE, Head

PHOTO = Path(__file__).parents[3] / "examples" / "photos" / "church.jpg"
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)

# Two of the heads name the backbones they were published with.
pytestmark = pytest.mark.filterwarnings("ignore:Backbone nat is not a supported model")


def inside(model: Any) -> NatBackbone:
    (backbone,) = (module for module in model.modules() if isinstance(module, NatBackbone))
    return backbone


@every_head
def test_loss_reaches_every_weight_of_the_backbone(head: Head) -> None:
    model = head.build().train()
    backbone = inside(model)
    out = model(**head.inputs(), **head.targets())
    loss = out.alphas.mean() if head.labels == "none" else out.loss  # matting has no loss in transformers
    assert loss.isfinite()
    loss.backward()
    unused = tuple(f"encoder.levels.{level}." for level in range(max(head.stages), 4))
    unused += (f"encoder.levels.{max(head.stages) - 1}.downsample.",)  # after the last map that is asked for
    for name, parameter in backbone.named_parameters():
        if name.startswith(unused):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all(), name
            # The softmax does not see a constant added to all keys.
            assert parameter.grad.any() or name.endswith("key.bias"), name


@every_head
def test_saved_and_loaded_again_it_gives_the_same_bits(head: Head, tmp_path: Path) -> None:
    model = head.build().eval()
    model.save_pretrained(tmp_path)
    again, info = getattr(transformers, head.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.backbone_config.dilations == [[2], [1], [1], [1]]
    for parameter in again.parameters():  # a file's weights lie anywhere, and convolutions round by where they lie
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found, expected = again(**head.inputs()), model(**head.inputs())
    for name in head.outputs:
        assert torch.equal(found[name], expected[name]), name


@every_head
def test_backbone_of_a_saved_head_loads_by_itself(head: Head, tmp_path: Path) -> None:
    model = head.build().eval()
    model.save_pretrained(tmp_path)
    backbone, info = NatBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    expected = inside(model).state_dict()
    assert backbone.state_dict().keys() == expected.keys()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert backbone.out_features == [f"stage{stage}" for stage in head.stages]
    backbone.save_pretrained(tmp_path / "backbone")
    assert not NatBackbone.from_pretrained(tmp_path / "backbone", output_loading_info=True)[1]["missing_keys"]


@every_head
def test_a_dinat_inside_a_saved_head_loads_as_a_nat_with_dilations(head: Head, tmp_path: Path) -> None:
    model = head.build().eval()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["backbone_config"]["model_type"] = "dinat"
    (tmp_path / "config.json").write_text(json.dumps(content))
    backbone = NatBackbone.from_pretrained(tmp_path)
    assert backbone.config.dilations == [[2], [1], [1], [1]]
    assert backbone.out_features == [f"stage{stage}" for stage in head.stages]
    pixels = head.inputs()["pixel_values"]
    with torch.no_grad():
        for found, expected in zip(backbone(pixels).feature_maps, inside(model)(pixels).feature_maps, strict=True):
            assert torch.equal(found, expected)


def test_a_folder_with_no_nat_inside_is_refused(tmp_path: Path) -> None:
    HEADS["UperNet"].build().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for settings in ({"model_type": "resnet"}, None):
        (tmp_path / "config.json").write_text(json.dumps(content | {"backbone_config": settings}))
        with pytest.raises(CheckpointError, match="is a upernet, and its configuration names no NAT or DiNAT inside"):
            NatBackbone.from_pretrained(tmp_path)


@every_head
def test_weights_of_a_backbone_can_be_put_inside(head: Head) -> None:
    model = head.build()
    backbone = NatBackbone(model.config.backbone_config)
    for parameter in backbone.parameters():
        parameter.data.normal_()
    inside(model).load_state_dict(backbone.state_dict())
    pixels = head.inputs()["pixel_values"]
    for a, b in zip(inside(model)(pixels)[0], backbone(pixels)[0], strict=True):
        assert torch.equal(a, b)


def test_backbone_settings_may_be_a_dictionary() -> None:
    head = HEADS["UperNet"]
    settings = head.build().config.backbone_config.to_dict()
    config = transformers.UperNetConfig(**head.settings, backbone_config=settings)
    assert type(transformers.UperNetForSemanticSegmentation(config).backbone) is NatBackbone


# Pipelines, from a folder, on a photograph


def processor(name: str, **settings: Any) -> Any:
    """The image processor that needs no torchvision; its plain name in the oldest versions of transformers."""
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    try:
        return kind(size={"height": SIZE[0], "width": SIZE[1]}, **settings)
    except ImportError:  # Segformer's, from 5.5 to 5.20
        pytest.skip(f"this transformers' {kind.__name__} asks for torchvision, without need")


def save(head: Head, image_processor: Any, folder: Path) -> Any:
    model = head.build().eval()
    model.config.id2label = {0: "stone", 1: "sky", 2: "tree"}
    model.config.label2id = {"stone": 0, "sky": 1, "tree": 2}
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return model


@pytest.fixture
def photo() -> PIL.Image.Image:
    return PIL.Image.open(PHOTO).convert("RGB")


def test_pipeline_of_semantic_segmentation(tmp_path: Path, photo: PIL.Image.Image) -> None:
    prepare = processor("SegformerImageProcessor")
    model = save(HEADS["UperNet"], prepare, tmp_path)
    found = pipeline("image-segmentation", model=str(tmp_path))(photo)
    with torch.no_grad():
        logits = model(**prepare(photo, return_tensors="pt")).logits
    classes = torch.nn.functional.interpolate(logits, photo.size[::-1], mode="bilinear").argmax(1)[0]
    assert sorted(piece["label"] for piece in found) == sorted(model.config.id2label[int(i)] for i in classes.unique())
    for piece in found:
        expected = classes == model.config.label2id[piece["label"]]
        assert piece["mask"].size == photo.size
        assert (np.asarray(piece["mask"]).astype(bool) == expected.numpy()).mean() > 0.999


@pytest.mark.parametrize("name", ["Mask2Former", "MaskFormer"])
def test_pipeline_of_instance_segmentation(tmp_path: Path, photo: PIL.Image.Image, name: str) -> None:
    model = save(HEADS[name], processor(f"{name}ImageProcessor"), tmp_path)
    model.class_predictor.bias.data[-1] = -10  # untrained, the queries would say that there is nothing
    model.save_pretrained(tmp_path)
    segment = pipeline("image-segmentation", model=str(tmp_path))
    for subtask in ("panoptic", "instance", "semantic"):
        found = segment(photo, subtask=subtask, threshold=0.0, mask_threshold=0.0, overlap_mask_area_threshold=0.0)
        assert found, subtask
        for piece in found:
            assert piece["label"] in ("stone", "sky", "tree")
            assert piece["mask"].size == photo.size


@pytest.mark.parametrize(
    ("name", "image_processor"),
    [
        ("Detr", "DetrImageProcessor"),
        ("DeformableDetr", "DeformableDetrImageProcessor"),
        ("RTDetrV2", "RTDetrImageProcessor"),
        ("DFine", "RTDetrImageProcessor"),
    ],
)
def test_pipeline_of_object_detection(tmp_path: Path, photo: PIL.Image.Image, name: str, image_processor: str) -> None:
    prepare = processor(image_processor)
    model = save(HEADS[name], prepare, tmp_path)
    found = pipeline("object-detection", model=str(tmp_path))(photo, threshold=0.0)
    with torch.no_grad():
        out = model(**prepare(photo, return_tensors="pt"))
    (expected,) = prepare.post_process_object_detection(out, threshold=0.0, target_sizes=[photo.size[::-1]])
    assert len(found) == len(expected["scores"]) >= 12
    best = expected["scores"].argmax()
    assert found[0]["score"] == pytest.approx(expected["scores"][best].item(), abs=1e-4)
    assert found[0]["label"] == model.config.id2label[int(expected["labels"][best])]
    for piece in found:
        assert set(piece["box"]) == {"xmin", "ymin", "xmax", "ymax"}


def test_matting_with_a_trimap(photo: PIL.Image.Image) -> None:
    head = HEADS["VitMatte"]
    model = head.build().eval()
    kind = getattr(transformers, "VitMatteImageProcessorPil", None) or transformers.VitMatteImageProcessor
    small = photo.resize((96, 64))
    trimap = PIL.Image.new("L", small.size, 128)
    inputs = kind()(images=small, trimaps=trimap, return_tensors="pt")
    with torch.no_grad():
        alphas = model(**inputs).alphas
    assert alphas.shape == (1, 1, 64, 96)
    assert alphas.min() >= 0 and alphas.max() <= 1


def test_number_of_labels_is_the_heads() -> None:
    for head in HEADS.values():
        if head.labels != "none":
            assert head.build().config.num_labels == LABELS
