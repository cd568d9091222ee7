"""The tensors of a case, the same for every peer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.subject import NotHere


class Inputs(NamedTuple):
    """Leaves: ``[batch, *spatial, heads, dim]`` three times and ``[heads, 2k - 1, ...]``, or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]


def tensors(case: Case) -> Inputs:
    """Standard normal tensors that require gradients. The bias is float32, as a model under autocast keeps it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    shape = (case.batch, *case.spatial, case.heads, case.head_dim)
    query, key, value = (normal(*shape, dtype=case.torch_dtype) for _ in range(3))
    table = (case.heads, *(2 * k - 1 for k in case.kernel_size))
    bias = normal(*table, dtype=torch.float32) if case.has_bias else None
    return Inputs(query, key, value, bias)


def need_room(what: str, needed_bytes: int, limit_bytes: int = 1 << 30) -> None:
    """Refuse what takes more memory than a reasonable user would give it."""
    if needed_bytes > limit_bytes:
        raise NotHere(f"{what} would take {needed_bytes / 2**30:.1f} GiB")
