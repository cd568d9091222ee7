"""The model card that training leaves beside a model."""

from __future__ import annotations

from typing import Any

from nbhd.tasks.classification.evaluate import Evaluation
from nbhd.tasks.recipes import Recipe


def model_card(
    recipe: Recipe,
    classes: list[str],
    parameters: int,
    final: Evaluation,
    facts: dict[str, Any],
    history: list[dict[str, Any]],
    *,
    same_images: bool = False,
) -> str:
    """README.md of a finished model: data, recipe, result, terms.

    ``history`` is that of `TaskTrainer`; ``same_images`` says that the model was evaluated on its training images.
    """
    data, schedule = recipe.data, recipe.schedule
    name = data.name or "the training data"
    hours = history[-1]["seconds"] / 3600 if history else 0.0
    hardware = ", ".join(facts["gpus"]) or f"{facts['processes']} x {facts['threads']} threads of {facts['cpu']}"
    sizes = " -> ".join(str(size) for _, size in schedule.image_sizes or [[0, data.image_size]])
    keep = (
        f"short side to {round(data.image_size / data.crop_ratio)}, centre crop"
        if data.resize == "crop"
        else "both sides scaled"
    )
    images = f"{final.images} images of the {data.eval_split} split"
    caution = ""
    if same_images:
        images = f"{final.images} images"
        caution = "\nThese are the images it was trained on: the figures say nothing of new images.\n"
    rows = "\n".join(f"| {row['class']} | {row['images']} | {row['accuracy']:.1%} |" for row in final.per_class)
    return f"""---
library_name: transformers
pipeline_tag: image-classification
tags: [image-classification, neighborhood-attention, nat]
metrics: [accuracy]
---

# NAT image classifier, {name}

A Neighborhood Attention Transformer (Hassani et al., CVPR 2023) with {parameters:,} parameters for
{len(classes)} classes: {", ".join(classes)}. It puts every picture into one of these;
what is none of them gets a wrong name.

```python
import nbhd.models  # registers NAT with transformers
from transformers import pipeline

print(pipeline("image-classification", "THIS_FOLDER")("photo.jpg"))
```

## Data

{name}{f": {data.source}" if data.source else ""}

Terms: {data.terms or "not stated; ask whoever gave you the images."}

## Recipe

`recipe.yaml` in this folder repeats the run: `nbhd train --config recipe.yaml --data DATA --output FOLDER`.

| | |
|---|---|
| image size | {data.image_size} x {data.image_size} ({keep}), trained at {sizes} |
| epochs | {schedule.epochs} |
| batch | {recipe.optim.batch_size} |
| optimiser | AdamW, learning rate {recipe.optim.lr:g}, weight decay {recipe.optim.weight_decay:g} |
| seed | {recipe.run.seed} |
| time | {hours:.2f} h on {hardware} |
| weights stored in | {recipe.run.save_dtype} |

## Result

The files in this folder on the {images}:
**top-1 {final.top1:.2%}**, top-5 {final.top5:.2%}, cross-entropy {final.loss:.4f}.
{caution}
| class | images | accuracy |
|---|---|---|
{rows}
"""
