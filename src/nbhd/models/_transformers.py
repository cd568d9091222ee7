"""Names that moved between transformers 5.0 and today's, under one address."""

from __future__ import annotations

# Not the name at the top level: in some versions (5.6, 5.10, 5.15) that one asks for torchvision, without need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

try:
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
except ImportError:  # TODO: drop when the oldest supported transformers has transformers.backbone_utils
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin

__all__ = ["AutoImageProcessor", "BackboneConfigMixin", "BackboneMixin"]
