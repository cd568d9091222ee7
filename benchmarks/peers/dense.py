"""Neighborhoods as masks and tables over flattened maps, for the peers that want them so. Read from the geometry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case


@dataclass
class AxisOfTokens:
    """One axis as seen from flattened tokens; all ``[tokens]``."""

    position: Tensor
    first: Tensor
    last: Tensor
    dilation: int
    kernel_size: int


def axes_of_tokens(case: Case) -> list[AxisOfTokens]:
    """For each axis the position of each token and its first and last key."""
    tables = case.neighborhood.tables(case.spatial)
    flat = torch.arange(case.tokens)
    inner = case.tokens
    found = []
    for table in tables:
        inner //= table.length
        position = flat // inner % table.length
        last = table.first + (table.count - 1) * table.dilation
        # Copies: the tables are cached and shared.
        found.append(
            AxisOfTokens(
                position, table.first[position].clone(), last[position].clone(), table.dilation, table.kernel_size
            )
        )
    return found


def mask_and_bias_index(case: Case) -> tuple[Tensor, Tensor]:
    """``[tokens, tokens]``: whether query (row) sees key (column), and the entry of a head's flattened bias table."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    index = torch.zeros(1, 1, dtype=torch.int32)
    for axis in axes_of_tokens(case):
        key = axis.position[None]
        here = (key >= axis.first[:, None]) & (key <= axis.last[:, None])
        apart = key - axis.position[:, None]
        if axis.dilation > 1:
            here &= apart % axis.dilation == 0
        seen = seen & here
        k = axis.kernel_size
        place = (apart.div(axis.dilation, rounding_mode="floor") + k - 1).clamp_(0, 2 * k - 2)
        index = index * (2 * k - 1) + place.to(torch.int32)
    return seen, index
