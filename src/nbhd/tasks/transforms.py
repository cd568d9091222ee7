"""Training augmentation and evaluation preprocessing, without torchvision.

Geometry (random resized crop, flip) works on one decoded image with Pillow: antialiased, 0.3 ms at 128x128. Everything
else works on the whole batch, on the model's device: colour jitter and normalisation together as one 3x4 matrix an
image, RandAugment and random erasing by kornia, mixup and cutmix on the labels too.

No step reads a global random state: randomness is a function of (seed, epoch, row of the image or first of the batch),
so a resumed run sees exactly what an unbroken one does.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nbhd.errors import MissingExtra
from nbhd.tasks.recipe_sections import AugmentSection, DataSection

RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


# ------------------------------------------------------------------------------------------------- one image


def random_crop(
    image: np.ndarray | Image.Image, size: int, augment: AugmentSection, rng: np.random.Generator
) -> np.ndarray:
    """Random resized crop and flip: ``[X, Y, 3]`` uint8 of any size to ``[size, size, 3]`` uint8."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    box = crop_box(picture.width, picture.height, augment.crop_scale, augment.crop_aspect, rng)
    result = np.asarray(picture.resize((size, size), RESAMPLE[augment.crop_resample], box=box))
    return np.ascontiguousarray(result[:, ::-1]) if rng.random() < augment.hflip_prob else result


def crop_box(
    width: int, height: int, scale: Sequence[float], aspect: Sequence[float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box of random area and aspect ratio inside the image, as Inception cropped (Szegedy et al. 2015).

    Ten tries; then the largest centred box of the nearest allowed aspect ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(scale[0], scale[1])
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return (left, top, left + w, top + h)
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, height * ratio), min(height, width / ratio)
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)


def shrink_to(image: Image.Image, short_side: int | None) -> Image.Image:
    """Scale down so that the short side is ``short_side``; smaller images and ``None`` leave it alone."""
    if short_side is None or min(image.size) <= short_side:
        return image
    factor = short_side / min(image.size)
    size = (max(short_side, round(image.width * factor)), max(short_side, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------------------- a batch


class BatchAugment:
    """Colour, RandAugment, normalisation, erasing, mixup and cutmix for a training batch.

    Called with uint8 ``[B, X, Y, 3]`` images and int64 ``[B]`` labels on any device; returns float32 ``[B, 3, X, Y]``
    images and float32 ``[B, classes]`` targets.
    """

    def __init__(self, augment: AugmentSection, data: DataSection, num_classes: int) -> None:
        self.augment = augment
        self.num_classes = num_classes
        self._mean, self._std = torch.tensor(data.mean), torch.tensor(data.std)
        self._rand_augment: Any = None
        self._erase: Any = None
        if augment.rand_augment_ops:
            auto = _kornia_auto()
            self._rand_augment = auto.RandAugment(n=augment.rand_augment_ops, m=augment.rand_augment_magnitude)
        if augment.erase_prob:
            self._erase = _kornia().RandomErasing(
                scale=tuple(augment.erase_scale), ratio=(0.3, 3.3), p=augment.erase_prob
            )

    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, seed: Sequence[int], *, plain: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``plain`` leaves out RandAugment, erasing and mixing (the last epochs of a recipe with ``plain_epochs``)."""
        rng = np.random.default_rng(list(seed))
        # One copy, uint8 to float, straight into channels-last memory as the convolutions of the stem like it.
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        if self._rand_augment is not None and not plain:
            with seeded(rng):
                unit = (pixels / 255).contiguous()
                groups = [self._rand_augment(group) for group in unit.split(self.augment.rand_augment_group)]
                pixels = torch.cat(groups).clamp_(0, 1).mul_(255)
        matrix, offset = self._colour(pixels, rng)
        size = pixels.shape
        pixels = torch.baddbmm(offset, matrix, pixels.reshape(size[0], 3, -1)).reshape(size)
        if self._erase is not None and not plain:
            with seeded(rng):
                pixels = self._erase(pixels)
        targets = smooth_one_hot(labels, self.num_classes, self.augment.label_smoothing)
        return (pixels, targets) if plain else mix(pixels, targets, self.augment, rng)

    def _colour(self, pixels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Jitter and normalisation of 0..255 pixels as ``[B, 3, 3]`` matrices and ``[B, 3, 1]`` offsets.

        Brightness, contrast, saturation and hue rotation (in YIQ) are linear in the pixel, so their product is too;
        there is no clamp in between. Normalisation to the data's mean and deviation comes last.
        """
        augment, batch = self.augment, pixels.shape[0]
        draws = torch.from_numpy(rng.uniform(-1, 1, (4, batch)).astype(np.float32)).to(pixels.device)
        luma = pixels.new_tensor([0.299, 0.587, 0.114])
        matrix = torch.eye(3, device=pixels.device).expand(batch, 3, 3)
        offset = pixels.new_zeros(batch, 3, 1)
        if augment.brightness:
            matrix = matrix * (1 + augment.brightness * draws[0]).view(-1, 1, 1)
        if augment.contrast:
            factor = (1 + augment.contrast * draws[1]).view(-1, 1, 1)
            grey = luma @ (matrix @ pixels.mean((2, 3)).unsqueeze(-1)).squeeze(-1).T  # [B], mean luma so far
            matrix, offset = matrix * factor, offset * factor + (1 - factor) * grey.view(-1, 1, 1)
        if augment.saturation:
            factor = (1 + augment.saturation * draws[2]).view(-1, 1, 1)
            blend = factor * torch.eye(3, device=pixels.device) + (1 - factor) * luma.expand(3, 3)
            matrix, offset = blend @ matrix, blend @ offset
        if augment.hue:
            turn = _hue_rotation(2 * math.pi * augment.hue * draws[3])
            matrix, offset = turn @ matrix, turn @ offset
        std = self._std.to(pixels.device).view(1, 3, 1)
        return matrix / (255 * std), (offset / 255 - self._mean.to(pixels.device).view(1, 3, 1)) / std


def _hue_rotation(angle: Tensor) -> Tensor:
    """``[B, 3, 3]``: rotation of the chroma plane of YIQ (NTSC 1953) by ``angle`` radians."""
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], device=angle.device
    )
    cos, sin = torch.cos(angle), torch.sin(angle)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq


def smooth_one_hot(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """``[B, classes]`` float32 targets: ``1 - smoothing`` on the label, ``smoothing / classes`` everywhere."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_add_(1, labels.view(-1, 1), torch.full_like(targets[:, :1], 1 - smoothing))


def mix(pixels: Tensor, targets: Tensor, augment: AugmentSection, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of each image with its mirror in the batch order."""
    wanted = rng.random() < augment.mix_prob and len(pixels) > 1
    if not wanted or not (augment.mixup or augment.cutmix):
        return pixels, targets
    use_cutmix = bool(augment.cutmix) and (not augment.mixup or rng.random() < augment.cutmix_prob)
    alpha = augment.cutmix if use_cutmix else augment.mixup
    share = float(rng.beta(alpha, alpha))  # of the image itself
    if use_cutmix:
        height, width = pixels.shape[2:]
        cut_h, cut_w = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
        row, column = int(rng.integers(height)), int(rng.integers(width))
        rows = slice(max(row - cut_h // 2, 0), min(row + cut_h // 2, height))
        columns = slice(max(column - cut_w // 2, 0), min(column + cut_w // 2, width))
        mixed = pixels.clone()
        mixed[:, :, rows, columns] = pixels.flip(0)[:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        pixels = mixed
    else:
        pixels = torch.lerp(pixels.flip(0), pixels, share)
    return pixels, torch.lerp(targets.flip(0), targets, share)


@contextlib.contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Run a block with torch's CPU generator seeded from ``rng``, and leave its state as it was.

    kornia draws its parameters from it, on the CPU for every device.
    """
    state = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(int(rng.integers(2**62)))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


# ------------------------------------------------------------------------------------------------- evaluation


def resize_for_eval(image: Image.Image, data: DataSection) -> np.ndarray:
    """``[image_size, image_size, 3]`` uint8 as the finished model's image processor makes it, before normalising."""
    processor = _geometry(data.image_size, data.resize, data.crop_ratio, data.resample)
    return processor(image, data_format="channels_last")["pixel_values"][0].astype(np.uint8)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=8)
def _geometry(image_size: int, resize: str, crop_ratio: float, resample: str) -> Any:
    """The image processor with nothing on but resizing and cropping."""
    from nbhd.models.nat import NatImageProcessor

    data = DataSection(image_size=image_size, resize=resize, crop_ratio=crop_ratio, resample=resample)
    return NatImageProcessor(**(processor_settings(data) | {"do_rescale": False, "do_normalize": False}))


def processor_settings(data: DataSection) -> dict[str, Any]:
    """What the image processor beside a finished model is told."""
    side = {"height": data.image_size, "width": data.image_size}
    settings = {"resample": int(RESAMPLE[data.resample]), "image_mean": data.mean, "image_std": data.std}
    if data.resize == "squash":
        return settings | {"do_resize": True, "size": side, "do_center_crop": False}
    short = max(data.image_size, round(data.image_size / data.crop_ratio))
    return settings | {"do_resize": True, "size": {"shortest_edge": short}, "do_center_crop": True, "crop_size": side}


def normalise(images: Tensor, data: DataSection) -> Tensor:
    """uint8 ``[B, X, Y, 3]`` to float32 ``[B, 3, X, Y]`` with the mean and deviation of the data."""
    pixels = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    return pixels.sub_(mean).div_(std)


def _kornia() -> Any:
    try:
        import kornia.augmentation as augmentation
    except ImportError as error:
        raise MissingExtra("RandAugment and random erasing", "train", "kornia") from error
    return augmentation


def _kornia_auto() -> Any:
    try:
        from kornia.augmentation import auto
    except ImportError as error:
        raise MissingExtra("RandAugment and random erasing", "train", "kornia") from error
    return auto
