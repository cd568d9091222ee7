"""Checkpoints of the original repository: same outputs after conversion, and every file that is not one is named."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from nbhd.errors import ArgumentError, CheckpointError, FileError
from nbhd.models._transformers import AutoImageProcessor
from nbhd.models.nat import VARIANTS, NatConfig, NatForImageClassification, NatImageProcessor
from nbhd.models.nat.convert_nat import build, convert_nat, read_labels
from nbhd.models.nat.loading_nat import load_weights
from nbhd.models.nat.original_nat import _ratio, infer_config, rename, take_apart
from tests.commands import nbhd
from tests.fixtures.nat_reference import fill_weights
from tests.models.nat.original import OriginalNat

SMALL: dict[str, Any] = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 4], "kernel_size": 3, "num_classes": 6}


def original(seed: int = 0, **settings: Any) -> OriginalNat:
    model = OriginalNat(**(SMALL | settings))
    fill_weights(model, seed)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(original().state_dict(), tmp_path / "nat.pth")
    return tmp_path / "nat.pth"


@pytest.mark.parametrize(
    "settings", [{}, {"qkv_bias": False, "layer_scale": True, "mlp_ratio": 2.0}, {"kernel_size": 7}]
)
@pytest.mark.parametrize("wrap", ["raw", "state_dict", "model", "distributed", "safetensors"])
def test_converted_model_gives_the_original_logits(tmp_path: Path, settings: dict[str, Any], wrap: str) -> None:
    model = original(**settings)
    weights: Any = model.state_dict()
    file = tmp_path / ("nat.safetensors" if wrap == "safetensors" else "nat.pth")
    if wrap == "safetensors":
        save_file(weights, file)
    elif wrap == "distributed":
        torch.save(
            {"state_dict": {f"module._orig_mod.{k}": v for k, v in weights.items()}, "args": argparse.Namespace(lr=1)},
            file,
        )
    else:
        torch.save(weights if wrap == "raw" else {wrap: weights, "epoch": 3}, file)

    done = convert_nat(file, tmp_path / "out")

    converted = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    pixels = torch.randn(2, 3, 22, 36)
    torch.testing.assert_close(converted(pixels).logits, model(pixels), atol=2e-5, rtol=1e-5)
    assert done.parameters == sum(p.numel() for p in model.parameters())
    assert done.variant is None


@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants_are_recognised_and_take_every_key(name: str) -> None:
    published = NatConfig.from_variant(name)
    with torch.device("meta"):
        model = OriginalNat(
            published.embed_dim,
            published.depths,
            published.num_heads,
            mlp_ratio=published.mlp_ratio,
            kernel_size=published.kernel_size,
            layer_scale=published.layer_scale_init_value > 0,
        )
        expected = NatForImageClassification(published).state_dict()

    resolution = "" if "384" in name else "_in1k_224"
    config, variant = infer_config(take_apart(model.state_dict(), Path(f"{name}{resolution}.pth")))
    renamed = rename(model.state_dict())

    assert variant == name
    assert config.to_dict() == published.to_dict()
    names = {f"nat.{k}" if not k.startswith("classifier") else k: v.shape for k, v in renamed.items()}
    assert names == {k: v.shape for k, v in expected.items()}


def test_folder_has_configuration_weights_and_image_processor(checkpoint: Path, tmp_path: Path) -> None:
    convert_nat(checkpoint, tmp_path / "out", image_size=64)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.crop_size == {"height": 64, "width": 64}
    assert processor.size == {"shortest_edge": 73}
    mask = os.umask(0)
    os.umask(mask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~mask for p in (tmp_path / "out").iterdir())


def folder_with(path: Path, processor: dict[str, Any]) -> Path:
    NatForImageClassification(NatConfig(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


NAT: dict[str, Any] = {"image_processor_type": "NatImageProcessor"}
VIT: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "do_resize": True}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            NAT | {"size": {"shortest_edge": 240}, "crop_size": {"height": 224, "width": 224}},
            {"size": {"shortest_edge": 102}, "crop_size": {"height": 96, "width": 96}},
        ),
        (
            NAT | {"size": {"height": 300, "width": 400}, "crop_size": {"height": 200, "width": 300}},
            {"size": {"height": 144, "width": 192}, "crop_size": {"height": 96, "width": 96}},
        ),
        (
            NAT | {"size": {"shortest_edge": 224}, "do_center_crop": False},
            {"size": {"shortest_edge": 96}, "do_center_crop": False},
        ),
        (NAT, {"size": {"shortest_edge": 109}, "crop_size": {"height": 96, "width": 96}}),
        (VIT | {"size": {"height": 224, "width": 320}}, {"size": {"height": 96, "width": 96}}),
        (VIT | {"size": 224}, {"size": 96}),
        (
            VIT | {"size": {"shortest_edge": 800, "longest_edge": 1333}},
            {"size": {"shortest_edge": 96, "longest_edge": 159}},
        ),
        (VIT | {"size": [256, 256], "crop_size": 224}, {"size": [109, 109], "crop_size": 96}),
    ],
)
def test_another_image_size_leaves_the_rest_of_the_image_processor(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    others = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "resample": 2, "rescale_factor": 0.5}
    convert_nat(folder_with(tmp_path / "folder", before | others), tmp_path / "out", image_size=96)
    found = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    wanted = before | others | after
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("size", [{}, {"size": "large"}, {"size": {}}, {"size": {"shortest_edge": 0}}, {"size": []}])
def test_an_image_processor_without_a_size_is_named(tmp_path: Path, size: dict[str, Any]) -> None:
    folder = folder_with(tmp_path / "folder", VIT | size)
    with pytest.raises(ArgumentError, match=r"image_size cannot be put into .*preprocessor_config\.json"):
        convert_nat(folder, tmp_path / "out", image_size=96)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
@pytest.mark.parametrize("of", ["the original", "transformers"])
def test_images_of_other_channels_than_rgb_reach_the_model(tmp_path: Path, channels: int, mode: str, of: str) -> None:
    config = NatConfig(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3, num_channels=channels)
    NatForImageClassification(config).save_pretrained(tmp_path / "nat")
    weights = OriginalNat(8, [2], [1], kernel_size=3, num_classes=6).state_dict()
    weights["patch_embed.proj.0.weight"] = torch.randn(4, channels, 3, 3)
    torch.save(weights, tmp_path / "nat.pth")
    result = nbhd("convert", tmp_path / ("nat" if of == "transformers" else "nat.pth"), tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert f"num_channels is {channels}: images are not made RGB" in result.stderr
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.image_mean, processor.image_std) == ([0.449] * channels, [0.226] * channels)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    picture = PIL.Image.new(mode, (300, 260), (255,) * channels if channels > 1 else 255)
    for image in (picture, np.asarray(picture)):
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, channels, 224, 224)
        assert pixels.unique().item() == pytest.approx((1 - 0.449) / 0.226, abs=1e-5)
        assert model(pixels).logits.shape == (1, model.config.num_labels)


def test_images_of_three_channels_are_made_rgb(checkpoint: Path, tmp_path: Path) -> None:
    result = nbhd("convert", checkpoint, tmp_path / "out")
    assert "num_channels" not in result.stderr
    assert NatImageProcessor.from_pretrained(tmp_path / "out").to_dict() == NatImageProcessor().to_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_weights_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(original().to(dtype).state_dict(), tmp_path / "nat.pth")
    convert_nat(tmp_path / "nat.pth", tmp_path / "out")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").dtype == dtype


def test_without_a_head_it_is_a_feature_extractor(tmp_path: Path) -> None:
    weights = {k: v for k, v in original().state_dict().items() if not k.startswith("head.")}
    model = build(weights, infer_config(weights)[0])
    assert type(model).__name__ == "NatModel"


def test_dilations_are_taken_from_the_caller() -> None:
    weights = original().state_dict()
    assert infer_config(weights, dilations=[[1, 2], [3]])[0].dilations == [[1, 2], [3]]


@pytest.mark.parametrize(
    "text", ["a\nb\nc\nd\ne\nf\n", json.dumps(list("abcdef")), json.dumps({str(i): c for i, c in enumerate("abcdef")})]
)
def test_labels_come_from_text_or_json(checkpoint: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    convert_nat(checkpoint, tmp_path / "out", labels=tmp_path / "labels")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate("abcdef"))
    assert model.config.label2id["f"] == 5


@pytest.mark.parametrize("text", ["a\nb\nc\nd\ne\nf\n", json.dumps(list("abcdef"))])
def test_labels_may_begin_with_a_byte_order_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text, encoding="utf-8-sig")
    assert read_labels(tmp_path / "labels") == list("abcdef")


@pytest.mark.parametrize("text", ["", " \n\n", "[]", "{}"])
def test_empty_labels_are_refused(checkpoint: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(FileError, match=r"the labels in .*labels are none"):
        convert_nat(checkpoint, tmp_path / "out", labels=tmp_path / "labels")
    assert not (tmp_path / "out").exists()


def test_the_ratio_of_the_mlp_gives_its_channels_back() -> None:
    for dim in (*range(2, 130, 2), 192, 224, 448):
        for hidden in range(1, 4 * dim + 2):
            for stage in range(4):
                assert int(_ratio(hidden, dim) * (dim * 2**stage)) == hidden * 2**stage, (hidden, dim)
    with torch.device("meta"):
        weights = OriginalNat(56, [1], [1], kernel_size=3, mlp_ratio=61.5 / 56).state_dict()
    assert int(infer_config(weights)[0].mlp_ratio * 56) == 61


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, zipped: bool, nested: bool) -> None:
    trap = Hostile(tmp_path / "executed")
    content = {"state_dict": original().state_dict(), "extra": trap} if nested else trap
    torch.save(content, tmp_path / "nat.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"mkdir.*could run code"):
        convert_nat(tmp_path / "nat.pth", tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(1000), bytes(range(256)) * 9], ids=["empty", "text", "zeros", "noise"]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_other_kinds_are_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"nat{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"nat\."):
        load_weights(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_named(tmp_path: Path, zipped: bool) -> None:
    torch.save(original().state_dict(), tmp_path / "nat.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "nat.pth").read_bytes()
    (tmp_path / "nat.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path / "nat.pth")


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 3}, {}, {"state_dict": {"a": "b"}}, {1: torch.ones(2)}, torch.ones(3)]
)
def test_content_that_is_no_state_dict_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "nat.pth")
    with pytest.raises(CheckpointError, match="state dict"):
        load_weights(tmp_path / "nat.pth")


def test_missing_and_unexpected_and_misshapen_weights_are_named() -> None:
    weights = original().state_dict()
    config, _ = infer_config(weights)
    for change, message in [
        ({"levels.0.blocks.1.mlp.fc2.bias": None}, r"levels\.0\.layers\.1\.output\.dense\.bias is missing"),
        ({"levels.0.blocks.0.extra": torch.ones(2)}, r"levels\.0\.blocks\.0\.extra is unexpected"),
        ({"norm.weight": torch.ones(3)}, r"layernorm\.weight is \(3,\) and should be \(16,\)"),
        ({"levels.0.blocks.0.gamma1": torch.ones(8)}, "incomplete"),
        ({"norm.weight": torch.ones(16, dtype=torch.int64)}, "floating point"),
    ]:
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            build(changed, config)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("patch_embed", "patch_embed.proj is missing"),
        ("levels", "incomplete"),
        ("levels.0.blocks.0.", "incomplete"),
        ("levels.0.blocks.0.attn.rpb", "attn.rpb is missing"),
        ("levels.0.blocks.0.mlp", "mlp.fc1.weight is missing"),
    ],
)
def test_weights_that_do_not_tell_the_size_are_named(drop: str, message: str) -> None:
    weights = {k: v for k, v in original().state_dict().items() if not k.startswith(drop)}
    with pytest.raises(CheckpointError, match=message):
        infer_config(weights)


def test_weights_of_transformers_are_recognised() -> None:
    model = NatForImageClassification(NatConfig(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3))
    with pytest.raises(CheckpointError, match="names of transformers already"):
        infer_config(model.state_dict())


def test_output_must_be_new_or_empty(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_nat(checkpoint, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ArgumentError, match="new or empty"):
        convert_nat(checkpoint, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(FileError, match="does not exist"):
        convert_nat(checkpoint, tmp_path / "no" / "out")
    with pytest.raises(FileError, match="does not exist"):
        convert_nat(tmp_path / "no.pth", tmp_path / "out2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty is not a model: its config\.json is missing"):
        convert_nat(tmp_path / "empty", tmp_path / "out2")


def test_failure_while_writing_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nbhd.models.nat.image_processing_nat.NatImageProcessor.save_pretrained", fail)
    with pytest.raises(FileError, match="No space left"):
        convert_nat(checkpoint, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["nat.pth"]


def test_wrong_labels_are_named(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels"
    file.write_text("a\nb\n")
    with pytest.raises(ArgumentError, match=r"6 classes, but .* has 2"):
        convert_nat(checkpoint, tmp_path / "out", labels=file)
    assert not (tmp_path / "out").exists()
    for text in ['{"0": "a", "2": "b"}', "[1, 2]", "{", '{"x": "y"}']:
        file.write_text(text)
        with pytest.raises(FileError, match="labels"):
            read_labels(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="labels"):
        read_labels(file)
    with pytest.raises(FileError, match="labels"):
        read_labels(tmp_path / "missing")


def test_command_writes_the_folder_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    result = nbhd("convert", checkpoint, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "out")
    assert "6 classes" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_command_names_a_bad_file_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "nat.pth").write_bytes(b"no")
    result = nbhd("convert", tmp_path / "nat.pth", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "nat.pth" in result.stderr
    assert "Traceback" not in result.stderr


def test_swin_like_stems_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="DiNAT_s"):
        infer_config(
            {"patch_embed.proj.weight": torch.ones(8, 3, 4, 4), "layers.0.blocks.0.norm1.weight": torch.ones(8)}
        )


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("nat_base.pth", "nat_base"),
        ("model.pth", "nat_base"),
        ("DiNAT-base-224.pth", "dinat_base"),
        ("dinat.pth", "dinat_base"),
    ],
)
def test_the_file_s_name_tells_a_dinat_from_a_nat_of_the_same_shapes(file: str, expected: str) -> None:
    with torch.device("meta"):
        weights = OriginalNat(128, [3, 4, 18, 5], [4, 8, 16, 32], mlp_ratio=2.0, layer_scale=True).state_dict()
    assert infer_config(take_apart(weights, Path(file)))[1] == expected
    # What the file holds knows better than its name.
    content = {"state_dict": weights, "arch": "dinat_base", "args": argparse.Namespace(model="dinat_base")}
    assert infer_config(take_apart(weights, Path(file), content))[1] == "dinat_base"


def test_a_large_dinat_of_unknown_resolution_is_asked_about() -> None:
    with torch.device("meta"):
        weights = OriginalNat(192, [3, 4, 18, 5], [6, 12, 24, 48], mlp_ratio=2.0).state_dict()
    assert infer_config(take_apart(weights, Path("large_224.pth")))[1] == "dinat_large"  # no NAT has these sizes
    assert infer_config(take_apart(weights, Path("dinat_large_in22k_in1k_384.pth")))[1] == "dinat_large_384"
    with pytest.raises(CheckpointError, match="Give them as dilations"):
        infer_config(take_apart(weights, Path("dinat_large.pth")))
