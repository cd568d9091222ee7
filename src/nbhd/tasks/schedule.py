"""What a training run does when: the order of the images, their size, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from nbhd.tasks.recipe_sections import ScheduleSection

Key = tuple[int, int]  # (epoch, row): what a training sampler yields


class EpochSampler(Sampler[Key]):
    """``length`` of all rows an epoch, in an order that depends on the seed and the epoch alone; the rest sits out."""

    def __init__(self, rows: int, length: int, seed: int) -> None:
        self.rows, self.length, self.seed, self.epoch = rows, length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)[: self.length]
        return ((epoch, int(row)) for row in order)


def size_at(epoch: int, schedule: ScheduleSection, image_size: int) -> int:
    """Training image size of an epoch (counted from 0)."""
    sizes = schedule.image_sizes or [[0, image_size]]
    return next(size for first, size in reversed(sizes) if first <= epoch)


def lr_factor(step: int, steps_per_epoch: int, schedule: ScheduleSection) -> float:
    """Learning rate of an optimiser step over the peak: linear warm-up, half a cosine, constant cool-down."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    end = round((schedule.epochs - schedule.cooldown_epochs) * steps_per_epoch)
    if step < warmup:
        return schedule.warmup_lr_ratio + (1 - schedule.warmup_lr_ratio) * step / warmup
    if step >= end:
        return schedule.min_lr_ratio
    progress = (step - warmup) / max(1, end - warmup)
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
