"""Neighborhood attention as it is written in plain PyTorch: ``Tensor.unfold`` along each axis, or indices if dilated.

Windows are views until the ones that are wanted (at a border several queries want the same) are picked, which copies
each key ``prod(kernel_size)`` times. A dilated window is picked by index at once: the gradient of a dilated ``unfold``
would be as large as an undilated one of its whole span.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.inputs import need_room, tensors
from benchmarks.subject import NotHere, Subject, attention_subject


def prepare(case: Case) -> Subject:
    if any(case.is_causal):
        raise NotHere("windows that shrink are no unfolded windows")
    slots, element = case.neighborhood.slots, case.torch_dtype.itemsize
    need_room("unfolded keys and values", 2 * case.queries * case.head_dim * slots * element)
    inputs = tensors(case)
    tables = case.neighborhood.tables(case.spatial)
    axes = len(tables)
    is_dilated = any(d > 1 for d in case.dilation)
    keys: list[Tensor] = []  # [*spatial, *kernel_size] positions along each axis, broadcast
    for axis, table in enumerate(tables):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = table.length, table.kernel_size
        keys.append((table.first[:, None] + torch.arange(table.kernel_size) * table.dilation).view(shape))
    starts: tuple[Tensor, ...] = torch.meshgrid(*(table.first for table in tables), indexing="ij")
    everywhere: Any = slice(None)
    scale = case.head_dim**-0.5
    bias_index = None
    if inputs.bias is not None:
        bias_index = torch.zeros((1,) * (2 * axes), dtype=torch.int64)  # [*spatial, *kernel_size]
        for axis, table in enumerate(tables):
            k, d = table.kernel_size, table.dilation
            position = torch.arange(table.length).view([-1 if a == axis else 1 for a in range(2 * axes)])
            bias_index = bias_index * (2 * k - 1) + (keys[axis] - position) // d + k - 1
        bias_index = bias_index.flatten()

    def windows(t: Tensor) -> Tensor:
        """``[batch, *spatial, heads, dim]`` to ``[batch, *spatial, heads, dim, slots]``."""
        if is_dilated:
            picked = t[everywhere, *keys].flatten(1 + axes, 2 * axes)  # [batch, *spatial, slots, heads, dim]
            return picked.movedim(1 + axes, -1)
        for axis, table in enumerate(tables):
            t = t.unfold(1 + axis, table.kernel_size, 1)
        return t[everywhere, *starts].flatten(-axes)

    def call() -> Tensor:
        scores = torch.matmul((inputs.query * scale).unsqueeze(-2), windows(inputs.key)).squeeze(-2)
        if inputs.bias is not None:
            looked_up = inputs.bias.flatten(1)[:, bias_index].view(case.heads, *case.spatial, slots)
            scores = scores + looked_up.movedim(0, -2).to(scores.dtype)
        return torch.matmul(windows(inputs.value), scores.softmax(-1).unsqueeze(-1)).squeeze(-1)

    return attention_subject("unfold", call, inputs.leaves, case.queries, lambda out: out)
