"""The Neighborhood Attention Transformer."""

from nbhd.models.nat.configuration_nat import NatConfig
from nbhd.models.nat.image_processing_nat import NatImageProcessor
from nbhd.models.nat.modeling_nat import NatBackbone, NatForImageClassification, NatModel, NatPreTrainedModel
from nbhd.models.nat.variants import VARIANTS

__all__ = [
    "VARIANTS",
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatImageProcessor",
    "NatModel",
    "NatPreTrainedModel",
]
