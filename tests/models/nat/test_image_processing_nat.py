"""Images to pixel values: the arithmetic, every kind of image, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.auto import image_processing_auto

from nbhd.errors import ArgumentError
from nbhd.models import NatImageProcessor
from nbhd.models._transformers import AutoImageProcessor

try:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # before transformers had one class for each backend
    from transformers.models.vit.image_processing_vit import ViTImageProcessor

PHOTO = Path(__file__).parents[3] / "examples" / "photos" / "church.jpg"

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def picture(height: int = 300, width: int = 400, mode: str = "RGB") -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC).convert(mode)


def expected(image: PIL.Image.Image, edge: int = 256, crop: int = 224) -> np.ndarray:
    """The NAT repository's evaluation transform (timm's), written out."""
    width, height = image.size
    size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    image = image.convert("RGB").resize(size, PIL.Image.Resampling.BICUBIC)
    left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    pixels = np.asarray(image, np.float64)[top : top + crop, left : left + crop]
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (224, 224), (256, 256), (97, 1001), (31, 30)])
def test_defaults_are_the_published_evaluation(height: int, width: int) -> None:
    image = picture(height, width)
    pixels = NatImageProcessor()(image, return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0], expected(image), atol=2e-6)


def test_other_image_sizes_keep_the_share_of_the_edge() -> None:
    processor = NatImageProcessor.for_image_size(128)
    image = picture()
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixels[0].numpy(), expected(image, 146, 128), atol=2e-6)
    assert NatImageProcessor.for_image_size(384, crop_pct=1.0).size == {"shortest_edge": 384}


@pytest.mark.parametrize("make", [
    lambda array: array,
    lambda array: array.transpose(2, 0, 1),
    lambda array: torch.from_numpy(array),
    lambda array: torch.from_numpy(array).permute(2, 0, 1),
], ids=["array last", "array first", "tensor last", "tensor first"])  # fmt: skip
def test_arrays_and_tensors_are_images_too(make: Any) -> None:
    array = np.array(picture())
    pixels = NatImageProcessor()(make(array), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels[0], expected(picture()), atol=2e-6)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "int16"])
def test_integers_of_any_width_are_the_same_image(dtype: str) -> None:
    array, processor = np.asarray(picture()), NatImageProcessor()
    same = processor(array)["pixel_values"][0]
    assert np.array_equal(processor(array.astype(dtype))["pixel_values"][0], same)
    if dtype != "uint16":
        assert np.array_equal(processor(torch.tensor(array.astype(dtype)))["pixel_values"][0], same)
    wide = array.astype(dtype)
    wide[5, 5] = 256
    with pytest.raises(ArgumentError, match=r"must be in 0 to 255, got .* to 256"):
        processor(wide)


def test_grey_arrays_of_two_axes() -> None:
    grey, processor = picture(mode="L"), NatImageProcessor()
    same, array = processor(grey)["pixel_values"][0], np.asarray(grey)
    for images in (array, torch.tensor(array), [array], [grey, array], (array, torch.tensor(array))):
        for found in processor(images)["pixel_values"]:
            assert np.array_equal(found, same)
    assert np.array_equal(processor(PIL.Image.fromarray(array.astype(np.int32)))["pixel_values"][0], same)  # mode I


def test_floats_are_resized_without_rounding() -> None:
    array = np.array(picture()).astype(np.float32)
    pixels = NatImageProcessor()(array / 255, do_rescale=False, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels[0], expected(picture()), atol=0.05)  # up to one of 255 steps, in units of std
    scaled = NatImageProcessor()(array, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(scaled, pixels, atol=1e-5)


def test_batches_of_any_nesting() -> None:
    processor, images = NatImageProcessor(), [picture(), picture(200, 210)]
    single = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
    assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], torch.cat(single))
    as_list = processor(images)["pixel_values"]
    assert [type(pixels) for pixels in as_list] == [np.ndarray, np.ndarray]
    batch = np.stack([np.array(picture()), np.array(picture())])
    assert torch.equal(processor(batch, return_tensors="pt")["pixel_values"], torch.cat([single[0], single[0]]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture(mode=mode)
    pixels = NatImageProcessor()(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels[0], expected(image), atol=2e-6)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    grey = np.asarray(picture(mode="L")).astype(np.uint16 if mode == "I;16" else np.int32) * 257
    image = PIL.Image.fromarray(grey)
    assert image.mode == mode
    pixels = NatImageProcessor()(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels[0], expected(picture(mode="L")), atol=2e-6)


def test_steps_can_be_switched_off_and_changed_in_a_call() -> None:
    image, processor = picture(), NatImageProcessor()
    raw = processor(image, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)["pixel_values"]
    np.testing.assert_array_equal(raw[0], np.array(image).transpose(2, 0, 1))
    assert processor(image, size=100, do_center_crop=False)["pixel_values"][0].shape == (3, 100, 133)
    assert processor(image, size=(50, 60), do_center_crop=False)["pixel_values"][0].shape == (3, 50, 60)
    assert processor(image, crop_size=(32, 48), data_format="channels_last")["pixel_values"][0].shape == (32, 48, 3)
    flat = processor(image, image_mean=0.5, image_std=0.25)["pixel_values"][0]
    np.testing.assert_allclose(
        flat, (expected(image) * STD[:, None, None] + MEAN[:, None, None] - 0.5) / 0.25, atol=1e-5
    )


def test_an_image_smaller_than_the_crop_is_padded_with_black() -> None:
    image = picture(20, 30)
    pixels = NatImageProcessor(do_resize=False, do_normalize=False, do_rescale=False, crop_size=40)(image)[
        "pixel_values"
    ][0]
    assert pixels.shape == (3, 40, 40)
    np.testing.assert_array_equal(pixels[:, 10:30, 5:35], np.array(image).transpose(2, 0, 1))
    assert pixels.sum() == np.array(image, np.int64).sum()


def test_grey_models_need_no_conversion() -> None:
    processor = NatImageProcessor(do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    assert processor(picture(mode="L"), return_tensors="pt")["pixel_values"].shape == (1, 1, 224, 224)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be"),
        ({"size": {"longest_edge": 3}}, "size must be"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size must be"),
        ({"crop_size": "224"}, "crop_size must be"),
        ({"resample": 17}, r"resample must be one of .*3 \(bicubic\)"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        NatImageProcessor(**settings)
    with pytest.raises(ArgumentError, match=message):
        NatImageProcessor()(picture(), **settings)


def test_wrong_images_are_named() -> None:
    processor = NatImageProcessor()
    for image, message in [
        (np.zeros((5, 40, 40), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 40, 3), np.uint8), "at least one pixel"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            processor([image])
    with pytest.raises(ArgumentError, match="images of one size"):
        processor([picture(), picture(100, 500)], do_center_crop=False, return_tensors="pt")
    with pytest.raises(ArgumentError, match="one entry for each channel"):
        processor(picture(mode="L"), do_convert_rgb=False)
    with pytest.raises(ArgumentError, match="sise is not an argument"):
        processor(picture(), sise=3)
    with pytest.raises(ArgumentError, match="data_format"):
        processor(picture(), data_format="last")
    with pytest.raises(ArgumentError, match="image_size"):
        NatImageProcessor.for_image_size(0)
    with pytest.raises(ArgumentError, match="crop_pct"):
        NatImageProcessor.for_image_size(224, crop_pct=2)


def test_what_transformers_processors_take_is_taken() -> None:
    image, processor = picture(), NatImageProcessor()
    same = processor(image, return_tensors="np")["pixel_values"]
    settings = {"device": "cpu", "disable_grouping": True, "do_pad": False, "pad_size": None, "data_format": None,
                "size": None, "size_divisor": None}  # fmt: skip
    found = processor(image, return_tensors="np", **settings)["pixel_values"]  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, same)
    for name, value in [("do_pad", True), ("pad_size", {"height": 9, "width": 9}), ("disable_groupings", False)]:
        with pytest.raises(ArgumentError, match=f"^{name} is not an argument"):
            processor(image, **{name: value})


def test_attributes_are_read_as_arguments_are() -> None:
    image, processor = picture(), NatImageProcessor()
    settings: dict[str, Any] = {"size": 64, "crop_size": (32, 48), "image_mean": 0.5, "image_std": 0.25}
    settings["resample"] = PIL.Image.Resampling.BILINEAR
    for name, value in settings.items():
        setattr(processor, name, value)
    same = NatImageProcessor(**settings)
    np.testing.assert_array_equal(processor(image)["pixel_values"], same(image)["pixel_values"])
    for name in settings:
        setattr(processor, name, None)
    np.testing.assert_array_equal(processor(image)["pixel_values"], NatImageProcessor()(image)["pixel_values"])
    processor.size = "large"  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="size must be"):
        processor(image)


def test_no_images_make_no_batch() -> None:
    assert NatImageProcessor()([])["pixel_values"] == []
    with pytest.raises(ArgumentError, match="images must be at least one for return_tensors='pt', got none"):
        NatImageProcessor()([], return_tensors="pt")


# What transformers 4 wrote


def folder_with(path: Path, settings: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "nat"}')
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"image_processor_type": "ViTImageProcessor"},
        {"image_processor_type": "ViTImageProcessorFast"},
        {"image_processor_type": "ViTImageProcessorPil"},
        {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"},
        {"image_processor_type": "ViTFeatureExtractor", "feature_extractor_type": "ViTFeatureExtractor"},
    ],
    ids=lambda kind: "-".join(map(str, kind.values())),
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_resize": True, "size": 96, "do_normalize": True},
        {"size": {"height": 60, "width": 90}, "resample": 3, "image_mean": MEAN.tolist(), "image_std": STD.tolist()},
        {"size": [60, 90], "rescale_factor": 1 / 127.5, "crop_pct": 0.875},
        {"size": 50, "do_rescale": False},
        {"do_resize": False},
    ],
    ids="-".join,
)
def test_vits_settings_make_vits_pixels(tmp_path: Path, settings: dict[str, Any], kind: dict[str, Any]) -> None:
    image = PIL.Image.open(PHOTO).convert("RGB")
    expected = ViTImageProcessor(**settings)(image, return_tensors="np")["pixel_values"]
    folder = folder_with(tmp_path / "vit", settings | kind)
    processor = NatImageProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "NatImageProcessor"
    processors = [
        processor,
        NatImageProcessor.from_json_file(folder / "preprocessor_config.json"),
        AutoImageProcessor.from_pretrained(tmp_path / "again"),
        *([] if kind else [AutoImageProcessor.from_pretrained(folder)]),
    ]
    for found in processors:
        assert type(found) is NatImageProcessor
        pixels = found(image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels, expected, atol=2e-6, rtol=1e-6)


def test_vits_settings_that_are_null_are_its_defaults() -> None:
    nulls = dict.fromkeys(["size", "resample", "image_mean", "do_center_crop", "crop_size", "do_resize", "device"])
    found = NatImageProcessor.from_dict({"image_processor_type": "ViTImageProcessorFast", **nulls})
    assert found.to_dict() == NatImageProcessor.from_dict({"image_processor_type": "ViTImageProcessor"}).to_dict()


def test_vits_settings_never_crop_unless_told_in_the_call() -> None:
    settings = {"size": 64, "do_center_crop": True, "crop_size": 32, "image_processor_type": "ViTImageProcessor"}
    with pytest.warns(UserWarning, match="do_center_crop .* has no effect"):
        processor = NatImageProcessor.from_dict(settings)
    assert processor(picture())["pixel_values"][0].shape == (3, 64, 64)
    processor = NatImageProcessor.from_dict(settings, do_center_crop=True, crop_size=24, size=40)
    assert processor.size == {"shortest_edge": 40}
    assert processor(picture())["pixel_values"][0].shape == (3, 24, 24)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "NatImageProcessor"},
        {"image_processor_type": "NatImageProcessor", "size": 64},
        {"image_processor_type": "NatImageProcessor", "feature_extractor_type": "ViTFeatureExtractor"},
        {"size": {"shortest_edge": 64}},
        {"do_center_crop": True, "size": 64},
        {"crop_size": 48},
        NatImageProcessor(size=70).to_dict(),
        {name: value for name, value in NatImageProcessor(size=70).to_dict().items() if name != "image_processor_type"},
    ],
    ids="-".join,
)
def test_its_own_settings_stay_its_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    own = NatImageProcessor(**settings).to_dict()
    read = NatImageProcessor.from_pretrained(folder_with(tmp_path / "own", settings))
    for found in (NatImageProcessor.from_dict(settings), read):
        assert found.to_dict() == own
        assert (found.resample, found.image_mean) == (3, list(MEAN))


def test_settings_survive_the_disk(tmp_path: Path) -> None:
    processor = NatImageProcessor(size=(60, 70), crop_size=50, resample=2, image_mean=0.1, do_normalize=False)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "NatImageProcessor"
    assert saved["size"] == {"height": 60, "width": 70}
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert AutoImageProcessor.from_pretrained(tmp_path, crop_size=30).crop_size == {"height": 30, "width": 30}
    np.testing.assert_array_equal(loaded(picture())["pixel_values"][0], processor(picture())["pixel_values"][0])


def test_it_is_the_same_class_where_torchvision_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NatImageProcessor().save_pretrained(tmp_path)
    monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: True)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is NatImageProcessor
