"""Checkpoints of detectors and segmenters: the backbone loads, and a UPerNet converts whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoModelForSemanticSegmentation, pipeline

from nbhd.errors import CheckpointError
from nbhd.models import NatBackbone, NatModel
from nbhd.models._transformers import AutoImageProcessor
from nbhd.models.nat.convert_nat import convert_nat
from tests.commands import nbhd
from tests.fixtures.nat_reference import fill_weights
from tests.models.nat.original import OriginalNat, OriginalUPerNet

DENSE: dict[str, Any] = {
    "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "kernel_size": 3, "mlp_ratio": 2.0,
    "dilations": [[2], [1, 2], [1], [1]],
}  # fmt: skip
MM_CONFIG = """
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='DiNAT', embed_dim=8, dilations=[[2], [1, 2], [1], [1]], drop_path_rate=0.4, norm=unknown),
    decode_head=dict(type='UPerHead', channels=16))
optimizer = dict(type='AdamW')
"""


def upernet() -> OriginalUPerNet:
    model = OriginalUPerNet(16, 4, **DENSE)
    fill_weights(model, seed=3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.linspace(-0.3, 0.5, buffer.numel()))
        elif name.endswith("running_var"):
            buffer.copy_(torch.linspace(0.5, 2.0, buffer.numel()))
    return model.eval()


@pytest.fixture
def segmenter(tmp_path: Path) -> Path:
    meta = {"config": MM_CONFIG, "CLASSES": ("wall", "sky", "tree", "road"), "PALETTE": [[1, 2, 3]] * 4}
    content = {"meta": meta, "state_dict": upernet().state_dict(), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "segmenter.pth")
    return tmp_path / "segmenter.pth"


def test_upernet_of_mmsegmentation_gives_the_original_scores(segmenter: Path, tmp_path: Path) -> None:
    result = nbhd("convert", segmenter, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "UperNetForSemanticSegmentation: a DiNAT of no published size" in result.stderr
    assert "4 classes" in result.stderr
    assert "left out" not in result.stderr

    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "wall", 1: "sky", 2: "tree", 3: "road"}
    backbone = model.config.backbone_config
    assert (backbone.dilations, backbone.drop_path_rate) == (DENSE["dilations"], 0.4)
    assert backbone.out_features == ["stage1", "stage2", "stage3", "stage4"]
    pixels = torch.randn(2, 3, 72, 100, dtype=torch.float64)
    model = model.double()
    scores, auxiliary = upernet().double()(pixels)
    torch.testing.assert_close(model(pixels).logits, scores, atol=1e-12, rtol=1e-12)
    found = model.auxiliary_head(model.backbone(pixels).feature_maps)
    found = torch.nn.functional.interpolate(found, pixels.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, auxiliary, atol=1e-12, rtol=1e-12)

    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip


def test_image_processor_of_a_converted_segmenter(segmenter: Path, tmp_path: Path) -> None:
    convert_nat(segmenter, tmp_path / "out", image_size=64)
    try:
        processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    except (ImportError, ValueError) as error:
        assert "torchvision" in str(error).lower()
        pytest.skip("this transformers' SegformerImageProcessor asks for torchvision")
    picture = PIL.Image.new("RGB", (60, 40), (255, 255, 255))
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels[0, 0].unique().item() == pytest.approx((1 - 0.485) / 0.229, abs=1e-5)
    found = pipeline("image-segmentation", model=str(tmp_path / "out"))(picture)
    assert {piece["label"] for piece in found} <= {"wall", "sky", "tree", "road"}


def test_backbone_of_a_segmenter_loads_by_itself(segmenter: Path) -> None:
    backbone = NatBackbone.from_pretrained(segmenter)
    pixels = torch.randn(1, 3, 72, 100)
    for found, expected in zip(backbone(pixels).feature_maps, upernet().backbone(pixels), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert backbone.config.drop_path_rate == 0.4
    two = NatBackbone.from_pretrained(segmenter, out_features=["stage2", "stage4"], drop_path_rate=0.0)
    torch.testing.assert_close(two(pixels).feature_maps[1], found)
    assert two.config.drop_path_rate == 0.0
    with pytest.raises(CheckpointError, match=r"segmenter\.pth do not fit this model: layernorm\.weight is missing"):
        NatModel.from_pretrained(segmenter)


def test_detector_gives_its_backbone(tmp_path: Path) -> None:
    body = OriginalNat(**DENSE, out_indices=(1, 2, 3))
    fill_weights(body, seed=1)
    weights = {f"backbone.{k}": v for k, v in body.state_dict().items()}
    weights |= {"neck.lateral_convs.0.conv.weight": torch.ones(2), "roi_head.bbox_head.fc_cls.weight": torch.ones(2)}
    torch.save({"state_dict": weights, "meta": {"config": MM_CONFIG}}, tmp_path / "maskrcnn.pth")
    result = nbhd("convert", tmp_path / "maskrcnn.pth", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "NatBackbone" in result.stderr
    assert "left out, because transformers has no such head: neck, roi_head" in result.stderr
    backbone = NatBackbone.from_pretrained(tmp_path / "out")
    assert backbone.out_features == ["stage2", "stage3", "stage4"]
    pixels = torch.randn(1, 3, 48, 52)
    for found, expected in zip(backbone(pixels).feature_maps, body(pixels), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "text", ["", "model = [", "model = dict(backbone=dict(type='DiNAT', dilations=f(1)))", "x = 1"]
)
def test_dilations_nothing_tells_are_asked_for(tmp_path: Path, text: str) -> None:
    meta = {"config": text} if text else {}
    torch.save({"state_dict": upernet().state_dict(), "meta": meta}, tmp_path / "upernet_dinat_small.pth")
    result = nbhd("convert", tmp_path / "upernet_dinat_small.pth", tmp_path / "out")
    assert result.exit_code == 2
    assert "is a DiNAT, whose dilations are not in its weights" in result.stderr
    assert not (tmp_path / "out").exists()
    for wrong, message in [("[[2],", "must be JSON"), ("[[2], [1, 2]]", "dilations needs one list for each stage")]:
        result = nbhd("convert", tmp_path / "upernet_dinat_small.pth", tmp_path / "out", "--dilations", wrong)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    result = nbhd("convert", tmp_path / "upernet_dinat_small.pth", tmp_path / "out", "--dilations", DENSE["dilations"])
    assert result.exit_code == 0, result.stderr
    pixels = torch.randn(1, 3, 64, 64)
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(pixels).logits, upernet()(pixels)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decode_head.fpn_convs.1.bn.running_var", r"fpn_convs\.1\.batch_norm\.running_var is missing"),
        ("decode_head.psp_modules.3.1", r"psp_modules must be four"),
        ("auxiliary_head.conv_seg", r"auxiliary_head\.conv_seg\.weight is missing"),
        ("backbone.levels.1.blocks.1.norm2.bias", r"levels\.1\.layers\.1\.layernorm_after\.bias is missing"),
        ("backbone.norm3.bias", r"backbone\.hidden_states_norms\.stage4\.bias is missing"),
    ],
)
def test_incomplete_segmenter_is_refused(tmp_path: Path, name: str, message: str) -> None:
    weights = {key: value for key, value in upernet().state_dict().items() if not key.startswith(name)}
    torch.save({"state_dict": weights}, tmp_path / "upernet.pth")
    with pytest.raises(CheckpointError, match=message):
        convert_nat(tmp_path / "upernet.pth", tmp_path / "out", dilations=DENSE["dilations"])
