"""The models. Importing this package registers them with the Auto classes of transformers.

    import nbhd.models
    model = AutoModelForImageClassification.from_pretrained(FOLDER_OR_HUB_ID)
    classify = pipeline("image-classification", model=FOLDER_OR_HUB_ID)

``AutoBackbone.from_pretrained`` takes hub ids only in recent versions of transformers (5.23 and 5.24 at least); for a
folder use ``NatBackbone.from_pretrained``.
"""

import inspect

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)

from nbhd.models.nat import (
    NatBackbone,
    NatConfig,
    NatForImageClassification,
    NatImageProcessor,
    NatModel,
    NatPreTrainedModel,
)

# exist_ok: a later transformers may bring the type back; the classes asked for by importing this package are ours.
AutoConfig.register(NatConfig.model_type, NatConfig, exist_ok=True)
AutoModel.register(NatConfig, NatModel, exist_ok=True)
AutoModelForImageClassification.register(NatConfig, NatForImageClassification, exist_ok=True)
AutoBackbone.register(NatConfig, NatBackbone, exist_ok=True)
if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
    # One class for both: it uses Pillow whether torchvision is there or not.
    AutoImageProcessor.register(
        NatConfig, image_processor_classes={"pil": NatImageProcessor, "torchvision": NatImageProcessor}, exist_ok=True
    )
else:  # TODO: drop when the oldest supported transformers knows image_processor_classes
    AutoImageProcessor.register(NatConfig, slow_image_processor_class=NatImageProcessor, exist_ok=True)

__all__ = [
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatImageProcessor",
    "NatModel",
    "NatPreTrainedModel",
]
