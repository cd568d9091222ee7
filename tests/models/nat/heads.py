"""Heads of transformers with a small NAT inside, and what each is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from nbhd.models import NatConfig

SIZE = (64, 96)
BATCH = 2
LABELS = 3


def nat(*stages: int, **changes: Any) -> NatConfig:
    """A NAT of four stages, of which the head gets these maps."""
    settings: dict[str, Any] = {
        "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "kernel_size": 3, "mlp_ratio": 1.0,
        "drop_path_rate": 0.0, "dilations": [[2], [1], [1], [1]],
    }  # fmt: skip
    return NatConfig(**settings, **changes, out_features=[f"stage{stage}" for stage in stages])


@dataclass(frozen=True)
class Head:
    """A head: its classes, the stages it wants, the settings of a small one, and the names of its main outputs."""

    config: str
    model: str
    stages: tuple[int, ...]
    outputs: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    labels: str = "boxes"
    backbone: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        config = getattr(transformers, self.config)(backbone_config=nat(*self.stages, **self.backbone), **self.settings)
        torch.manual_seed(0)
        return getattr(transformers, self.model)(config)

    def inputs(self) -> dict[str, torch.Tensor]:
        channels = self.backbone.get("num_channels", 3)
        return {"pixel_values": torch.randn(BATCH, channels, *SIZE, generator=torch.Generator().manual_seed(1))}

    def targets(self) -> dict[str, Any]:
        """What the loss is computed from, as the head's forward wants it."""
        masks = torch.zeros(2, *SIZE)
        masks[0, :32], masks[1, 32:, 40:] = 1, 1
        boxes = torch.tensor([[0.5, 0.25, 1.0, 0.5], [0.7, 0.75, 0.6, 0.5]])
        classes = torch.tensor([0, 2])
        return {
            "map": {"labels": torch.arange(SIZE[1]).remainder(LABELS).expand(BATCH, *SIZE).contiguous()},
            "masks": {"mask_labels": [masks] * BATCH, "class_labels": [classes] * BATCH},
            "boxes": {"labels": [{"class_labels": classes, "boxes": boxes} for _ in range(BATCH)]},
            "none": {},
        }[self.labels]


# In the first releases of transformers 5 the defaults of the DETR family ask for timm's ResNet.
NO_TIMM: dict[str, Any] = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
TRANSFORMER: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 12, "num_labels": LABELS,
}  # fmt: skip
REAL_TIME = TRANSFORMER | {
    "encoder_hidden_dim": 32, "encoder_in_channels": [16, 32, 64], "decoder_in_channels": [32, 32, 32],
    "num_denoising": 4, "hidden_expansion": 0.5,
}  # fmt: skip

HEADS = {
    "UperNet": Head(
        "UperNetConfig", "UperNetForSemanticSegmentation", (1, 2, 3, 4), ("logits",),
        {"hidden_size": 16, "auxiliary_channels": 16, "auxiliary_in_channels": 32, "num_labels": LABELS},
        labels="map",
    ),
    "Mask2Former": Head(
        "Mask2FormerConfig", "Mask2FormerForUniversalSegmentation", (1, 2, 3, 4),
        ("class_queries_logits", "masks_queries_logits"),
        {
            "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32,
            "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 32,
            "num_queries": 12, "train_num_points": 64, "num_labels": LABELS,
        },
        labels="masks",
    ),
    "MaskFormer": Head(
        "MaskFormerConfig", "MaskFormerForInstanceSegmentation", (1, 2, 3, 4),
        ("class_queries_logits", "masks_queries_logits"),
        {
            "fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": LABELS,
            "decoder_config": transformers.DetrConfig(**TRANSFORMER, **NO_TIMM, backbone_config=nat(4)),
        },
        labels="masks",
    ),
    "Detr": Head(
        "DetrConfig", "DetrForObjectDetection", (4,), ("logits", "pred_boxes"), TRANSFORMER | NO_TIMM,
    ),
    "DeformableDetr": Head(
        "DeformableDetrConfig", "DeformableDetrForObjectDetection", (2, 3, 4), ("logits", "pred_boxes"),
        TRANSFORMER | NO_TIMM,
    ),
    "RTDetrV2": Head(
        "RTDetrV2Config", "RTDetrV2ForObjectDetection", (2, 3, 4), ("logits", "pred_boxes"), REAL_TIME,
    ),
    "DFine": Head(
        "DFineConfig", "DFineForObjectDetection", (2, 3, 4), ("logits", "pred_boxes"), REAL_TIME,
    ),
    "VitMatte": Head(
        "VitMatteConfig", "VitMatteForImageMatting", (3,), ("alphas",),
        {"hidden_size": 32, "convstream_hidden_sizes": [8, 8, 8], "fusion_hidden_sizes": [16, 16, 8, 8]},
        labels="none", backbone={"num_channels": 4},
    ),
}  # fmt: skip
