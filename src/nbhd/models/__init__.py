"""The models. Importing this package registers them with the Auto classes of transformers.

    import nbhd.models
    model = AutoModelForImageClassification.from_pretrained(FOLDER_OR_HUB_ID)
    classify = pipeline("image-classification", model=FOLDER_OR_HUB_ID)

Two things some versions of transformers cannot do: ``AutoBackbone.from_pretrained`` reads no folder (5.24), use
``NatBackbone.from_pretrained``; and ``transformers.AutoImageProcessor`` asks for torchvision (5.6 to 5.15), use
``NatImageProcessor.from_pretrained``. Pipelines are not concerned.
"""

import inspect

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from nbhd.flops import give_to_counters
from nbhd.models._transformers import AutoImageProcessor
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

give_to_counters()  # transformers imports PyTorch's counter of operations

__all__ = [
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatImageProcessor",
    "NatModel",
    "NatPreTrainedModel",
]
