"""Augmentation is a function of its seed, and evaluation preprocessing is the image processor's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nbhd.models.nat import NatImageProcessor
from nbhd.tasks.recipe_sections import AugmentSection, DataSection
from nbhd.tasks.recipes import parse_recipe
from nbhd.tasks.transforms import (
    BatchAugment,
    crop_box,
    mix,
    normalise,
    processor_settings,
    random_crop,
    resize_for_eval,
    shrink_to,
    smooth_one_hot,
)
from tests.pictures import corners, noise

PLAIN = DataSection(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
EVERYTHING = AugmentSection(
    rand_augment_ops=2, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, erase_prob=0.5, mixup=0.8, cutmix=1.0,
    label_smoothing=0.1, rand_augment_group=3,
)  # fmt: skip


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch(count: int = 8, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return images, torch.arange(count) % 3


# One image


@pytest.mark.parametrize(("width", "height"), [(48, 32), (10, 200), (1, 1), (300, 4)])
def test_crop_lies_inside_and_has_the_area_and_aspect_asked_for(width: int, height: int) -> None:
    draws, scale, aspect = rng(), (0.2, 0.9), (0.75, 4 / 3)
    for _ in range(200):
        left, top, right, bottom = crop_box(width, height, scale, aspect, draws)
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= top < bottom <= height + 1e-9
        ratio = (right - left) / (bottom - top)
        assert 0.75 - 1e-9 <= ratio <= 4 / 3 + 1e-9
        area = (right - left) * (bottom - top) / (width * height)
        assert area <= 0.9 + 1e-9
        if 0.75 <= width / height <= 1.5:  # otherwise the box may have to be the largest that fits
            assert area >= 0.2 - 1e-9


def test_random_crop_is_a_function_of_its_generator() -> None:
    image = np.asarray(noise(40, 30))
    first, same, other = (random_crop(image, 16, AugmentSection(), rng(seed)) for seed in (3, 3, 4))
    assert first.shape == (16, 16, 3)
    assert (first == same).all()
    assert (first != other).any()


def test_whole_crop_without_flip_is_the_image() -> None:
    augment = AugmentSection(crop_scale=[1.0, 1.0], crop_aspect=[1.0, 1.0], hflip_prob=0.0)
    image = np.asarray(noise(24, 24))
    assert (random_crop(image, 24, augment, rng()) == image).all()
    augment.hflip_prob = 1.0
    assert (random_crop(image, 24, augment, rng()) == image[:, ::-1]).all()


def test_shrinking_keeps_the_aspect_and_never_enlarges() -> None:
    assert shrink_to(noise(400, 200), 50).size == (100, 50)
    assert shrink_to(noise(40, 30), 50).size == (40, 30)
    assert shrink_to(noise(400, 200), None).size == (400, 200)


# A batch


def test_without_augmentation_only_normalises() -> None:
    images, labels = batch()
    data = DataSection()
    pixels, targets = BatchAugment(AugmentSection(), data, 3)(images, labels, [0])
    torch.testing.assert_close(pixels, normalise(images, data), atol=1e-5, rtol=1e-5)
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 3).float())


@pytest.mark.parametrize("size", [16, 33])
def test_everything_at_once_is_a_function_of_its_seed(size: int) -> None:
    pytest.importorskip("kornia", reason="the train extra is not installed")
    images, labels = batch(size=size)
    before = torch.random.get_rng_state()
    augment = BatchAugment(EVERYTHING, DataSection(), 3)
    first = augment(images, labels, [5, 1, 2])
    torch.rand(7)  # the global generator has no say
    same = BatchAugment(EVERYTHING, DataSection(), 3)(images, labels, [5, 1, 2])
    other = augment(images, labels, [5, 1, 3])
    assert first[0].shape == (8, 3, size, size)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close(first[1].sum(1), torch.ones(8))
    torch.random.set_rng_state(before)
    augment(images, labels, [5, 1, 2])
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator was moved"


def test_rand_augment_and_erasing_change_images_but_not_in_plain_epochs() -> None:
    pytest.importorskip("kornia", reason="the train extra is not installed")
    images, labels = batch(16, 32)
    for augment in (AugmentSection(rand_augment_ops=2), AugmentSection(erase_prob=1.0), AugmentSection(cutmix=1.0)):
        run = BatchAugment(augment, PLAIN, 3)
        assert (run(images, labels, [0])[0] - normalise(images, PLAIN)).abs().max() > 0.1
        torch.testing.assert_close(run(images, labels, [0], plain=True)[0], normalise(images, PLAIN))


def jittered(images: torch.Tensor, seed: int, **strength: float) -> torch.Tensor:
    labels = torch.zeros(len(images), dtype=torch.long)
    return BatchAugment(AugmentSection(**strength), PLAIN, 2)(images, labels, [seed])[0]  # type: ignore[arg-type]


def test_brightness_scales_every_pixel_of_an_image_alike() -> None:
    images, _ = batch()
    factor = jittered(images, 0, brightness=0.5) / normalise(images, PLAIN)
    factor = factor.nan_to_num(nan=float("nan")).flatten(1)
    each = factor.nanmedian(1).values
    torch.testing.assert_close(factor[~factor.isnan()], each[:, None].expand_as(factor)[~factor.isnan()])
    assert ((each >= 0.5) & (each <= 1.5)).all()
    assert each.std() > 0.1


def test_contrast_keeps_the_mean_brightness() -> None:
    images, _ = batch()
    luma = torch.tensor([0.299, 0.587, 0.114])
    before, after = normalise(images, PLAIN), jittered(images, 0, contrast=0.5)
    torch.testing.assert_close(torch.einsum("c,bcxy->b", luma, after), torch.einsum("c,bcxy->b", luma, before))
    assert ((after.flatten(1).std(1) / before.flatten(1).std(1) - 1).abs() > 0.02).any()


@pytest.mark.parametrize("strength", [{"saturation": 0.5}, {"hue": 0.5}])
def test_saturation_and_hue_keep_the_brightness_of_each_pixel(strength: dict[str, float]) -> None:
    images, _ = batch()
    luma = torch.tensor([0.299, 0.587, 0.114])
    before, after = normalise(images, PLAIN), jittered(images, 0, **strength)
    assert (after - before).abs().max() > 0.05
    brightness = [torch.einsum("c,bcxy->bxy", luma, pixels) for pixels in (before, after)]
    torch.testing.assert_close(*brightness, atol=2e-3, rtol=0)


def test_grey_has_no_hue_and_no_saturation() -> None:
    grey = torch.full((4, 8, 8, 3), 90, dtype=torch.uint8)
    torch.testing.assert_close(jittered(grey, 0, saturation=0.9, hue=0.5), normalise(grey, PLAIN), atol=2e-3, rtol=0)


def test_jitter_in_one_product_equals_its_steps_one_after_the_other() -> None:
    images, _ = batch()
    at_once = jittered(images, 9, brightness=0.4, contrast=0.3, saturation=0.5)
    draws = torch.from_numpy(rng([9]).uniform(-1, 1, (4, len(images))).astype(np.float32))  # type: ignore[arg-type]
    factors = [(1 + strength * draw).view(-1, 1, 1, 1) for strength, draw in zip((0.4, 0.3, 0.5), draws, strict=False)]
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    pixels = normalise(images, PLAIN) * factors[0]
    mean = (pixels * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pixels = mean + factors[1] * (pixels - mean)
    grey = (pixels * luma).sum(1, keepdim=True)
    torch.testing.assert_close(at_once, grey + factors[2] * (pixels - grey))


def test_smoothed_targets_are_distributions() -> None:
    targets = smooth_one_hot(torch.tensor([2, 0]), 4, 0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_mixed_in_the_share_of_the_pixels(kind: str) -> None:
    # Image i is i everywhere, so pixels say what they came from.
    pixels = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 20, 20)
    targets = torch.eye(6)
    augment = AugmentSection(**{kind: 1.0})
    shares = set()
    for seed in range(20):
        mixed, mixed_targets = mix(pixels, targets, augment, rng(seed))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), mixed_targets @ torch.arange(6.0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed_targets.sum(1), torch.ones(6))
        shares.add(round(float(mixed_targets[0, 0]), 6))
        if kind == "cutmix":
            assert set(mixed.unique().tolist()) <= set(range(6))
    assert len(shares) > 10


def test_mixing_can_be_rare_and_off() -> None:
    pixels, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
    for augment in (AugmentSection(), AugmentSection(mixup=1.0, cutmix=1.0, mix_prob=0.0)):
        assert mix(pixels, targets, augment, rng())[0] is pixels
    both = AugmentSection(mixup=1.0, cutmix=1.0, mix_prob=0.5)
    same = sum(mix(pixels, targets, both, rng(seed))[0] is pixels for seed in range(200))
    assert 60 <= same <= 140


# Evaluation


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (77, 131), (30, 40), (64, 64), (131, 77), (75, 73)])
@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": 64, "resize": "squash"},
        {"image_size": 64, "resize": "crop"},
        {"image_size": 56, "resize": "crop", "crop_ratio": 0.9, "resample": "bilinear"},
        {"image_size": 48, "resize": "crop", "crop_ratio": 1.0, "mean": [0.5] * 3, "std": [0.25] * 3},
    ],
)
def test_evaluation_during_training_sees_what_the_saved_processor_gives(
    settings: dict[str, Any], size: tuple[int, int]
) -> None:
    recipe = parse_recipe({"data": settings})
    image: Image.Image = noise(*size, seed=3)
    ours = normalise(torch.tensor(resize_for_eval(image, recipe.data))[None], recipe.data)
    theirs = NatImageProcessor(**processor_settings(recipe.data))(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_evaluation_resizing_keeps_the_image_upright() -> None:
    pixels = resize_for_eval(corners(60, 40), DataSection(image_size=32, resize="squash"))
    assert [tuple(pixels[i, j]) for i, j in ((0, 0), (0, -1), (-1, 0))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
