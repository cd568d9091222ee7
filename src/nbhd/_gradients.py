"""What comes into a backward: gradients of any kind, and what autograd kept, perhaps changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nbhd.errors import BackendError


def is_special(gradient: Tensor | None) -> bool:
    """Whether a gradient is of a subclass, or a batch of gradients as ``is_grads_batched`` has them."""
    return gradient is not None and (
        type(gradient) not in (Tensor, nn.Parameter) or torch._C._functorch.is_legacy_batchedtensor(gradient)
    )


def expect_kept(name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Refuse what autograd kept and gives back changed: backends would read outside of it."""
    if tensor is None or (tensor.shape == torch.Size(shape) and dtype in (None, tensor.dtype)):
        return
    raise BackendError(
        f"{name} must be {_described(shape, dtype)} in the backward, got "
        f"{_described(tensor.shape, dtype and tensor.dtype)}. Hooks on what autograd keeps "
        "(torch.autograd.graph.saved_tensors_hooks) have to return the shape and dtype that they were given."
    )


def _described(shape: Sequence[int], dtype: torch.dtype | None) -> str:
    return f"{list(shape)}" if dtype is None else f"{list(shape)} of {dtype}"
