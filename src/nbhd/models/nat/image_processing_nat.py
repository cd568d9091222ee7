"""Images to ``pixel_values`` as the published NATs were evaluated; needs Pillow and numpy, never torchvision.

One class for every version of transformers and whether torchvision is installed or not, so that a checkpoint gives the
same numbers on every machine. Defaults are those of the NAT repository's evaluation (timm's): shortest edge to 256 with
bicubic interpolation, the middle 224 x 224 (256 * 0.875), ImageNet's mean and standard deviation.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.utils import TensorType

from nbhd.errors import ArgumentError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BICUBIC = int(PIL.Image.Resampling.BICUBIC)
SHORTEST_EDGE = 256
CROP_SIZE = 224

#: Names in files that ViT's image processor wrote.
_VIT_TYPES = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor")
#: What ViT's image processor does where its file does not say; it has no crop.
_VIT_DEFAULTS: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": int(PIL.Image.Resampling.BILINEAR),
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
#: Arguments of transformers' image processors that change nothing here: everything runs on the CPU, image by image.
_WITHOUT_EFFECT = ("device", "disable_grouping")
#: Those of a step that is not here, and may only be switched off.
_OFF = ("do_pad", "pad_size")

Size = int | Sequence[int] | Mapping[str, int]


class NatImageProcessor(BaseImageProcessor):
    """Resize, crop the middle, scale to [0, 1], normalise. Each step can be switched off, here or in a call.

    ``from_pretrained`` also reads what transformers 4 wrote for NAT and DiNAT, which had ViT's image processor; see
    `from_dict`.

    Args:
        do_resize: whether to resize.
        size: ``n`` or ``{"shortest_edge": n}`` keeps the aspect ratio; ``(height, width)`` or
            ``{"height": h, "width": w}`` does not.
        resample: `PIL.Image.Resampling`; 3 is bicubic.
        do_center_crop: whether to crop the middle; a smaller image is padded with black.
        crop_size: side of the square, ``(height, width)`` or ``{"height": h, "width": w}``.
        do_rescale: whether to multiply with ``rescale_factor``.
        rescale_factor: 1/255 takes 8-bit images to [0, 1].
        do_normalize: whether to subtract ``image_mean`` and divide by ``image_std``.
        image_mean, image_std: a number or one for each channel, on the scale after ``rescale_factor``.
        do_convert_rgb: whether Pillow images become RGB first (alpha is dropped, 16-bit grey is reduced to 8 bits).

    Example:
        >>> processor = NatImageProcessor()
        >>> processor(PIL.Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 224, 224])
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        do_resize: bool = True,
        size: Size | None = None,
        resample: int = BICUBIC,
        do_center_crop: bool = True,
        crop_size: Size | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = _size("size", _given(size, SHORTEST_EDGE), square=False)
        self.resample = _resample(resample)
        self.do_center_crop = do_center_crop
        self.crop_size = _size("crop_size", _given(crop_size, CROP_SIZE), square=True)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _channels(_given(image_mean, IMAGENET_MEAN))
        self.image_std = _channels(_given(image_std, IMAGENET_STD))
        self.do_convert_rgb = do_convert_rgb

    @classmethod
    def for_image_size(cls, image_size: int, crop_pct: float = 0.875, **kwargs: Any) -> NatImageProcessor:
        """A processor for squares of ``image_size`` pixels from the middle of an image resized to a bit more.

        Args:
            image_size: pixels each side.
            crop_pct: share of the shorter edge that is kept, in (0, 1].
            **kwargs: further arguments of the class.
        """
        if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
            raise ArgumentError(
                f"image_size must be an integer of at least 1, got {image_size!r}. Published models use 224."
            )
        if not 0 < crop_pct <= 1:
            raise ArgumentError(f"crop_pct must be in (0, 1], got {crop_pct!r}. Published models use 0.875.")
        return cls(size={"shortest_edge": int(image_size / crop_pct)}, crop_size=image_size, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor with these settings; with those of ViT's processor it makes the pixels that ViT's makes.

        ViT's are those whose ``image_processor_type`` or ``feature_extractor_type`` says so, and those without a type,
        as transformers 4.40.2 read them, unless they have what ViT's has not: ``do_center_crop``, ``crop_size``, or a
        ``size`` with a ``shortest_edge``. There an integer ``size`` is the side of a square, 224 by default, the mean
        and the standard deviation are 0.5 and the interpolation is bilinear unless they say otherwise, and nothing is
        cropped, even if they ask for it.

        Args:
            image_processor_dict: what a ``preprocessor_config.json`` holds.
            **kwargs: arguments of the class, which win over the settings.
        """
        settings = _without_vit(image_processor_dict)
        is_vit = settings is not image_processor_dict
        if is_vit and image_processor_dict.get("do_center_crop") and kwargs.get("do_center_crop") is None:
            warnings.warn(
                "do_center_crop in the settings of ViT's image processor has no effect, as in transformers 4.40.2. "
                "Pass do_center_crop=True and crop_size if the model was trained with a crop.",
                stacklevel=2,
            )
        return super().from_dict(settings, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """The processor with the settings in a file, read as by `from_dict`."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    @property
    def backend(self) -> str:
        """Always ``"pil"``."""
        return "pil"

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: Size | None = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Size | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_rgb: bool | None = None,
        return_tensors: str | TensorType | None = None,
        data_format: str | None = "channels_first",
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Images to ``pixel_values``, ``(channels, height, width)`` float32 each.

        Args:
            images: an image or a list of them: Pillow images, numpy arrays or torch tensors with one, three or four
                channels first or last (or two axes for grey). A single array with four axes is a batch. Integers
                are in 0 to 255, of any dtype. Floats are resized as they are; pass ``do_rescale=False`` if they are
                in [0, 1] already.
            return_tensors: ``"pt"`` or ``"np"`` for one tensor of the batch; default a list of arrays.
            data_format: ``"channels_first"`` or ``"channels_last"``, of the result.
            input_data_format: the same of arrays and tensors; default: told from the shape.

        The other arguments are those of the class and default to the processor's. ``device`` and ``disable_grouping``,
        which transformers' image processors take, have no effect: the result is on the CPU.

        Returns:
            `transformers.BatchFeature` with ``pixel_values``.

        Raises:
            ArgumentError: an argument or an image is not of a kind described here, images of a batch differ in size, or
                there are none to make a batch of.
        """
        unknown = [
            name
            for name, value in kwargs.items()
            if not (value is None or name in _WITHOUT_EFFECT or (name in _OFF and not value))
        ]
        if unknown:
            raise ArgumentError(
                f"{', '.join(unknown)} is not an argument of NatImageProcessor. It takes do_resize, size, resample, "
                "do_center_crop, crop_size, do_rescale, rescale_factor, do_normalize, image_mean, image_std, "
                "do_convert_rgb, return_tensors, data_format and input_data_format."
            )
        do_resize = self.do_resize if do_resize is None else do_resize
        # Of the attributes too: they may have been set since.
        target = _size("size", _given(size, self.size, SHORTEST_EDGE), square=False)
        resample = _resample(_given(resample, self.resample, BICUBIC))
        do_center_crop = self.do_center_crop if do_center_crop is None else do_center_crop
        crop = _size("crop_size", _given(crop_size, self.crop_size, CROP_SIZE), square=True)
        do_rescale = self.do_rescale if do_rescale is None else do_rescale
        rescale_factor = self.rescale_factor if rescale_factor is None else rescale_factor
        do_normalize = self.do_normalize if do_normalize is None else do_normalize
        mean = _channels(_given(image_mean, self.image_mean, IMAGENET_MEAN))
        std = _channels(_given(image_std, self.image_std, IMAGENET_STD))
        do_convert_rgb = self.do_convert_rgb if do_convert_rgb is None else do_convert_rgb
        data_format = "channels_first" if data_format is None else getattr(data_format, "value", data_format)
        if data_format not in ("channels_first", "channels_last"):
            raise ArgumentError(f"data_format must be 'channels_first' or 'channels_last', got {data_format!r}.")

        # (x * factor - mean) / std in one multiplication and one addition.
        gain: Any = np.float32(rescale_factor if do_rescale else 1.0)
        offset: Any = np.float32(0.0)
        if do_normalize:
            gain = (gain / np.asarray(std, np.float64)).astype(np.float32)
            offset = (-np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32)

        pixel_values = []
        flat: list[Any] = make_flat_list_of_images(self.fetch_images(_with_channels(images)))  # type: ignore[assignment]
        for image in flat:
            planes = _planes(image, do_convert_rgb, input_data_format)
            if do_resize:
                planes = _resize(planes, _resized(planes[0].size, target), resample)
            if do_center_crop:
                planes = [_center_crop(plane, crop["height"], crop["width"]) for plane in planes]
            pixels = _pixels(planes)  # [height, width, channels]
            if do_normalize and np.ndim(gain) and pixels.shape[-1] != len(gain) and len(gain) != 1:
                raise ArgumentError(
                    f"image_mean and image_std must have one entry for each channel: there are {len(gain)}, "
                    f"but the image has {pixels.shape[-1]}. Pass do_convert_rgb=True, or as many entries as channels."
                )
            pixels = pixels * gain + offset
            if data_format == "channels_first":
                pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
            pixel_values.append(pixels)

        shapes = {pixels.shape for pixels in pixel_values}
        if return_tensors is not None:
            if not shapes:
                raise ArgumentError(
                    f"images must be at least one for return_tensors={str(return_tensors)!r}, got none. Skip empty "
                    "batches, or leave return_tensors out for an empty list."
                )
            if len(shapes) > 1:
                raise ArgumentError(
                    f"return_tensors={str(return_tensors)!r} needs images of one size, got {sorted(shapes)}. "
                    "Leave do_resize and do_center_crop on, or pass the images one by one."
                )
            return BatchFeature({"pixel_values": np.stack(pixel_values)}, tensor_type=return_tensors)
        return BatchFeature({"pixel_values": pixel_values})


def _without_vit(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with which `NatImageProcessor` does what ViT's does with these; those of others as they are."""
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    size = settings.get("size")
    if kind is None:
        has_crop = "do_center_crop" in settings or "crop_size" in settings
        is_vit = not has_crop and not (isinstance(size, Mapping) and "shortest_edge" in size)
    else:
        is_vit = kind in _VIT_TYPES
    if not is_vit:
        return settings
    left_out = ("image_processor_type", "feature_extractor_type", "do_center_crop", "crop_size")
    found = {name: value for name, value in settings.items() if value is not None and name not in left_out}
    if type(size) is int:
        found["size"] = (size, size)
    return _VIT_DEFAULTS | found


def _given(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _size(name: str, value: Any, square: bool) -> dict[str, int]:
    """``{"shortest_edge": n}`` or ``{"height": h, "width": w}``."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        result = {"height": int(value), "width": int(value)} if square else {"shortest_edge": int(value)}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        result = {"height": value[0], "width": value[1]}
    else:
        try:
            result = {key: side for key, side in dict(value).items() if side is not None}
        except (TypeError, ValueError):
            result = {}
    allowed = [{"height", "width"}] if square else [{"height", "width"}, {"shortest_edge"}]
    sides = result.values()
    if set(result) not in allowed or not all(isinstance(side, (int, np.integer)) and side >= 1 for side in sides):
        forms = '{"height": h, "width": w}' if square else '{"shortest_edge": n} or {"height": h, "width": w}'
        raise ArgumentError(
            f"{name} must be an integer, a pair, or {forms}, in pixels of at least 1, got {value!r}. Use e.g. 224."
        )
    return {key: int(side) for key, side in result.items()}


def _resample(value: Any) -> int:
    try:
        return int(PIL.Image.Resampling(value))
    except ValueError:
        names = ", ".join(f"{int(r)} ({r.name.lower()})" for r in PIL.Image.Resampling)
        raise ArgumentError(f"resample must be one of {names}, got {value!r}. Published models use 3.") from None


def _channels(value: Any) -> list[float]:
    return [float(v) for v in value] if isinstance(value, (list, tuple, np.ndarray)) else [float(value)]


def _planes(image: Any, do_convert_rgb: bool, input_data_format: str | None) -> list[PIL.Image.Image]:
    """An image as one Pillow image with 8-bit channels, or as one 32-bit float Pillow image per channel."""
    if isinstance(image, PIL.Image.Image):
        if image.mode.startswith("I;16") or image.mode == "I":
            # convert() would clip instead of scaling: keep the upper 8 of 16 bits. "I" may hold 8 bits as well.
            values = np.asarray(image).astype(np.int64)
            is_short = image.mode == "I" and values.max(initial=0) <= 255
            image = PIL.Image.fromarray((values if is_short else values >> 8).clip(0, 255).astype(np.uint8))
        if do_convert_rgb:
            return [image if image.mode == "RGB" else image.convert("RGB")]
        return [image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")]
    array = image.detach().cpu() if isinstance(image, torch.Tensor) else image
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).numpy()
    array = _eight_bits(np.asarray(array))
    array = array[..., None] if array.ndim == 2 else _channels_last(array, input_data_format)
    if array.shape[-1] == 1 and do_convert_rgb:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    elif array.shape[-1] == 4 and do_convert_rgb:
        array = array[..., :3]
    if array.dtype == np.uint8:
        return [PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))]
    return [PIL.Image.fromarray(np.ascontiguousarray(array[..., c], dtype=np.float32)) for c in range(array.shape[-1])]


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """Integers of any width as uint8, which they must be by value; floats and booleans as they are."""
    if array.dtype == np.uint8 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        return array
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 255:
        raise ArgumentError(
            f"images of integers must be in 0 to 255, got {array.dtype} from {low} to {high}. Of 16 bits take the "
            "upper eight, (image >> 8).astype('uint8'), or pass floats and the rescale_factor that they need."
        )
    return array.astype(np.uint8)


def _with_channels(images: Any) -> Any:
    """Arrays of two axes with a third one, and tuples as lists, as every transformers 5 wants them."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 2:
        return images[..., None]
    return [_with_channels(image) for image in images] if isinstance(images, (list, tuple)) else images


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    layout = getattr(input_data_format, "value", input_data_format)
    if array.ndim != 3 or not array.size:
        raise ArgumentError(
            f"images must have two or three axes and at least one pixel, got an array of shape {array.shape}."
        )
    if layout is None:
        first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
        if not first and not last:
            raise ArgumentError(
                f"images must have 1, 3 or 4 channels on the first or last axis, got an array of shape {array.shape}. "
                "Pass input_data_format if it is of another kind."
            )
        layout = "channels_first" if first else "channels_last"
    if layout not in ("channels_first", "channels_last"):
        raise ArgumentError(
            f"input_data_format must be 'channels_first' or 'channels_last', got {input_data_format!r}."
        )
    return array.transpose(1, 2, 0) if layout == "channels_first" else array


def _resized(size: tuple[int, int], target: dict[str, int]) -> tuple[int, int]:
    """Pillow's (width, height) after resizing; the longer edge is rounded down, as torchvision does."""
    if "shortest_edge" not in target:
        return target["width"], target["height"]
    width, height = size
    edge = target["shortest_edge"]
    if width <= height:
        return edge, max(1, int(edge * height / width))
    return max(1, int(edge * width / height)), edge


def _resize(planes: list[PIL.Image.Image], size: tuple[int, int], resample: int) -> list[PIL.Image.Image]:
    return [plane if plane.size == size else plane.resize(size, PIL.Image.Resampling(resample)) for plane in planes]


def _center_crop(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """The middle; Pillow fills what lies outside with zeros."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    if (left, top, width, height) == (0, 0, image.width, image.height):
        return image
    return image.crop((left, top, left + width, top + height))


def _pixels(planes: list[PIL.Image.Image]) -> np.ndarray:
    if len(planes) == 1:
        array = np.asarray(planes[0])
        return array if array.ndim == 3 else array[..., None]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)
