"""The keys of a recipe: what each is, its default and its range."""

# ruff: noqa: RUF009  (`setting` makes a field, it is not evaluated once for all instances)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

SECTIONS = ("model", "data", "augment", "optim", "schedule", "eval", "run")


def setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None, one_of: Any = None) -> Any:
    """A dataclass field with its documentation and its range (both ends included)."""
    metadata = {"doc": doc, "low": low, "high": high, "one_of": one_of}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelSection:
    """Which network. Keys left null keep the value of the variant, of the checkpoint, or the model's default."""

    type: str = setting("nat", "architecture", one_of=("nat",))
    variant: str | None = setting(None, "a named variant: nat_mini, nat_tiny, nat_small, nat_base")
    pretrained: str | None = setting(None, "folder or hub id to start from; other classes get a new classifier")
    patch_size: int | None = setting(None, "stride of the stem, 2, 4 or 8", one_of=(2, 4, 8))
    embed_dim: int | None = setting(None, "channels of stage 1, doubled by each later stage", low=1)
    depths: list[int] | None = setting(None, "blocks of each stage", low=1)
    num_heads: list[int] | None = setting(None, "attention heads of each stage", low=1)
    kernel_size: int | None = setting(None, "window along each axis", low=1)
    dilations: list[list[int]] | None = setting(None, "dilation of each block of each stage", low=1)
    mlp_ratio: float | None = setting(None, "hidden size of the MLP over its width", low=0.01)
    qkv_bias: bool | None = setting(None, "bias of the query, key and value projections")
    hidden_dropout_prob: float | None = setting(None, "dropout of embeddings and MLP outputs", low=0, high=1)
    attention_probs_dropout_prob: float | None = setting(None, "dropout of attention and its projection", low=0, high=1)
    drop_path_rate: float | None = setting(
        None, "stochastic depth of the last block, rising linearly", low=0, high=0.99
    )
    layer_scale_init_value: float | None = setting(None, "start of the layer scale, 0 for none", low=0)


@dataclass
class DataSection:
    """Where the images are and how the model wants them. ``name``, ``source`` and ``terms`` go to the model card."""

    name: str | None = setting(None, "name of the data set, for the model card")
    source: str | None = setting(None, "where it comes from, for the model card")
    terms: str | None = setting(None, "terms of use of the images, for the model card")
    train_split: str = setting("train", "split to train on")
    eval_split: str = setting("validation", "split to evaluate on")
    image_column: str = setting("image", "column of images (parquet and hub data sets)")
    label_column: str = setting("label", "column of class numbers or names (parquet and hub data sets)")
    image_size: int = setting(224, "height and width the finished model is meant for, pixels", low=8, high=4096)
    resize: str = setting(
        "crop",
        "crop: scale the short side to image_size / crop_ratio and cut the middle; squash: scale both to image_size",
        one_of=("crop", "squash"),
    )
    crop_ratio: float = setting(0.875, "share of the short side that the centre crop keeps", low=0.1, high=1)
    resample: str = setting("bicubic", "filter for evaluation", one_of=("bilinear", "bicubic", "lanczos"))
    mean: list[float] = setting([0.485, 0.456, 0.406], "mean of each channel, images in 0..1 (default: ImageNet)")
    std: list[float] = setting([0.229, 0.224, 0.225], "standard deviation of each channel (default: ImageNet)")
    cache: str = setting(
        "auto", "keep decoded images in memory; auto: if they fit 4 GB", one_of=("auto", "memory", "none")
    )
    cache_size: int | None = setting(None, "short side at which images are kept in memory; null: as they are", low=8)
    num_workers: int = setting(0, "processes that load images; 0: the training process", low=0)
    train_limit: int | None = setting(None, "use only the first so many training images", low=1)
    eval_limit: int | None = setting(None, "use only the first so many evaluation images", low=1)


@dataclass
class AugmentSection:
    """What happens to training images, in this order. The defaults do nothing but crop mildly and flip."""

    crop_scale: list[float] = setting(
        [0.35, 1.0], "area of the random resized crop over the image's", low=0.001, high=1
    )
    crop_aspect: list[float] = setting([0.75, 1.3333], "aspect ratio of the crop before it is made square", low=0.01)
    crop_resample: str = setting("bilinear", "filter of the crop", one_of=("bilinear", "bicubic"))
    hflip_prob: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)
    rand_augment_ops: int = setting(0, "RandAugment: operations a image gets; 0 for none", low=0, high=8)
    rand_augment_magnitude: int = setting(9, "RandAugment: strength, 0 to 30", low=0, high=30)
    rand_augment_group: int = setting(
        8, "images that share a choice of operations (each has its own sign and strength)", low=1
    )
    brightness: float = setting(0.0, "brightness factor in 1 +- this", low=0, high=1)
    contrast: float = setting(0.0, "contrast factor in 1 +- this", low=0, high=1)
    saturation: float = setting(0.0, "saturation factor in 1 +- this", low=0, high=1)
    hue: float = setting(0.0, "hue rotation in +- this, of a full turn", low=0, high=0.5)
    erase_prob: float = setting(0.0, "random erasing: probability", low=0, high=1)
    erase_scale: list[float] = setting([0.02, 0.33], "random erasing: area over the image's", low=0.0001, high=1)
    mixup: float = setting(0.0, "mixup: alpha of the beta distribution; 0 for none", low=0)
    cutmix: float = setting(0.0, "cutmix: alpha of the beta distribution; 0 for none", low=0)
    mix_prob: float = setting(1.0, "share of batches that are mixed", low=0, high=1)
    cutmix_prob: float = setting(0.5, "share of mixed batches that use cutmix when both are on", low=0, high=1)
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", low=0, high=0.99)
    plain_epochs: int = setting(0, "last epochs without mixing, RandAugment and erasing", low=0)


@dataclass
class OptimSection:
    """AdamW. Norms, biases, ``rpb`` and layer scale are never decayed."""

    lr: float = setting(1e-3, "peak learning rate", low=0)
    lr_batch_size: int | None = setting(
        None, "batch size that lr is meant for: scaled linearly; null: no scaling", low=1
    )
    batch_size: int = setting(128, "images an optimiser step, over all devices and accumulation steps", low=1)
    device_batch_size: int | None = setting(None, "most images a device takes at once; the rest is accumulated", low=1)
    weight_decay: float = setting(0.05, "decoupled weight decay", low=0)
    beta1: float = setting(0.9, "AdamW beta 1", low=0, high=0.9999)
    beta2: float = setting(0.999, "AdamW beta 2", low=0, high=0.99999)
    eps: float = setting(1e-8, "AdamW epsilon", low=0)
    clip_grad_norm: float | None = setting(None, "largest norm of the gradient; null: no clipping", low=0)
    ema_decay: float | None = setting(None, "decay a step of the averaged weights; null: none", low=0, high=0.999999)


@dataclass
class ScheduleSection:
    """Linear warm-up, half a cosine down to ``min_lr_ratio``, constant cool-down."""

    epochs: int = setting(10, "passes over the training images, warm-up and cool-down included", low=1)
    warmup_epochs: float = setting(0.0, "linear warm-up, epochs", low=0)
    warmup_lr_ratio: float = setting(0.001, "learning rate at the start of the warm-up over the peak", low=0, high=1)
    cooldown_epochs: float = setting(0.0, "constant last epochs at the least learning rate", low=0)
    min_lr_ratio: float = setting(0.01, "least learning rate over the peak", low=0, high=1)
    image_sizes: list[list[int]] | None = setting(
        None, "[[first epoch, size], ...] to train at growing sizes; null: data.image_size throughout", low=0
    )


@dataclass
class EvalSection:
    """When and how to evaluate during training. With averaged weights, those are evaluated."""

    batch_size: int = setting(128, "images a device takes at once", low=1)
    every_epochs: int = setting(1, "evaluate after every so many epochs, and always after the last", low=1)


@dataclass
class RunSection:
    """What does not change the result, but for the seed."""

    seed: int = setting(0, "seed of weights, data order and augmentation", low=0, high=2**31)
    device: str = setting("auto", "auto: a GPU a process, if there are any", one_of=("auto", "cpu"))
    precision: str = setting("float32", "autocast type of the forward pass", one_of=("float32", "bfloat16", "float16"))
    compile: bool = setting(False, "torch.compile the model")
    save_every_steps: int | None = setting(
        None, "checkpoint every so many optimiser steps; null: after each epoch", low=1
    )
    keep_checkpoints: int = setting(2, "checkpoints kept for resuming", low=1)
    save_dtype: str = setting("float32", "type of the finished model's weights on disk", one_of=("float32", "float16"))
    plot: bool = setting(True, "draw curves.png")


@dataclass
class Recipe:
    """A whole recipe. `load_recipe` makes one from a file, ``to_yaml`` writes it with every default spelled out."""

    task: str = "classification"
    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    data: DataSection = dataclasses.field(default_factory=DataSection)
    augment: AugmentSection = dataclasses.field(default_factory=AugmentSection)
    optim: OptimSection = dataclasses.field(default_factory=OptimSection)
    schedule: ScheduleSection = dataclasses.field(default_factory=ScheduleSection)
    eval: EvalSection = dataclasses.field(default_factory=EvalSection)
    run: RunSection = dataclasses.field(default_factory=RunSection)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        import yaml

        lines = [f"task: {self.task}"]
        for section in SECTIONS:
            lines += ["", f"{section}:"]
            for key, value in dataclasses.asdict(getattr(self, section)).items():
                text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
                lines.append(f"  {key}: {text.removesuffix(chr(10)).removesuffix('...').strip()}")
        return "\n".join(lines) + "\n"
