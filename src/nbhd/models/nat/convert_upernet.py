"""UPerNet checkpoints of mmsegmentation with a NAT inside, to `UperNetForSemanticSegmentation` of transformers.

backbone.*                                      backbone.*, see `original_nat`
decode_head, auxiliary_head:
  conv_seg                                      classifier
  psp_modules.I.1.conv, bn                      psp_modules.I.1.conv, batch_norm
  bottleneck, fpn_bottleneck, lateral_convs.I,
  fpn_convs.I, convs.I, conv_cat: conv, bn      the same, conv, batch_norm
"""

from __future__ import annotations

import re
from typing import Any

import PIL.Image
import torch
import transformers
from transformers import PreTrainedModel

from nbhd.errors import CheckpointError
from nbhd.models.nat.configuration_nat import NatConfig
from nbhd.models.nat.image_processing_nat import IMAGENET_MEAN, IMAGENET_STD
from nbhd.models.nat.loading_nat import check_weights, weights_for
from nbhd.models.nat.modeling_nat import NatBackbone
from nbhd.models.nat.original_nat import Original

_HEADS = ("decode_head.", "auxiliary_head.")


def is_upernet(original: Original) -> bool:
    """Whether the checkpoint has the heads of a UPerNet."""
    return {"decode_head.conv_seg.weight", "decode_head.fpn_bottleneck.conv.weight"} <= set(original.heads)


def build_upernet(original: Original, config: NatConfig) -> PreTrainedModel:
    """The `UperNetForSemanticSegmentation` with the weights of a checkpoint that `is_upernet`.

    Raises:
        CheckpointError: a weight is missing, unexpected, or of another shape; the first of them are named.
    """
    heads = {
        name.replace("conv_seg.", "classifier.").replace(".bn.", ".batch_norm."): value
        for name, value in original.heads.items()
        if name.startswith(_HEADS)
    }
    weights = {f"backbone.{name}": value for name, value in weights_for(original, NatBackbone, config).items()} | heads
    with torch.device("meta"):
        model = transformers.UperNetForSemanticSegmentation(_config(heads, config))
    expected = model.state_dict()
    counters = {name: torch.tensor(0) for name in expected if name.endswith(".num_batches_tracked")}
    weights = counters | weights
    check_weights(
        {name: value.shape for name, value in weights.items()},
        {name: value.shape for name, value in expected.items()},
        original.name,
    )
    model.load_state_dict({name: value.contiguous() for name, value in weights.items()}, assign=True)
    return model.eval()


def mean_and_std(channels: int) -> tuple[list[float], list[float]]:
    """ImageNet's mean and standard deviation of each channel; of other channels than RGB, averaged over the colours."""
    if channels == len(IMAGENET_MEAN):
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    mean, std = (round(sum(values) / len(values), 6) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return [mean] * channels, [std] * channels


def upernet_image_processor(image_size: int, num_labels: int, channels: int = 3) -> dict[str, Any]:
    """Settings of an image processor to squares of ``image_size`` pixels, normalised as the published models' were.

    mmsegmentation keeps a picture's proportions instead, with a shorter side of 512 pixels.
    """
    # Not an object of the class: in some versions of transformers (5.5 to 5.20) it asks for torchvision, without need.
    mean, std = mean_and_std(channels)
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": int(PIL.Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_reduce_labels": num_labels == 150,  # ADE20K: 0 is no class
    }


def _config(heads: dict[str, torch.Tensor], backbone: NatConfig) -> Any:
    """Settings of the heads from the shapes of their weights."""
    scales = (1, 2, 3, 6)
    psp = {int(match[1]) for name in heads if (match := re.match(r"decode_head\.psp_modules\.(\d+)\.", name))}
    if psp != set(range(len(scales))):
        raise CheckpointError(f"decode_head.psp_modules must be four, for the scales {scales}; it has {sorted(psp)}.")
    convolutions = {int(match[1]) for name in heads if (match := re.match(r"auxiliary_head\.convs\.(\d+)\.", name))}
    with_auxiliary = any(name.startswith("auxiliary_head.") for name in heads)
    auxiliary: dict[str, Any] = {"use_auxiliary_head": with_auxiliary}
    if with_auxiliary:
        try:
            auxiliary |= {
                "auxiliary_num_convs": len(convolutions),
                "auxiliary_channels": heads["auxiliary_head.classifier.weight"].shape[1],
                "auxiliary_concat_input": "auxiliary_head.conv_cat.conv.weight" in heads,
            }
        except (KeyError, IndexError) as error:
            raise CheckpointError("auxiliary_head.conv_seg.weight is missing or has too few axes.") from error
    classes, width = heads["decode_head.classifier.weight"].shape[:2]
    settings: dict[str, Any] = {"hidden_size": width, "pool_scales": list(scales), "num_labels": classes} | auxiliary
    return transformers.UperNetConfig(backbone_config=backbone, **settings)
