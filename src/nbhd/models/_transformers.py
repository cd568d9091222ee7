"""Names that moved between transformers 5.0 and today's, under one address."""

from __future__ import annotations

try:
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
except ImportError:  # TODO: drop when the oldest supported transformers has transformers.backbone_utils
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin

__all__ = ["BackboneConfigMixin", "BackboneMixin"]
