"""``natten.backends.reference``: the operator on plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nbhd.compat.natten.core import fused
from nbhd.compat.natten.core.signature import Signature, heads_last
from nbhd.compat.natten.core.tensors import check_tensor

__all__ = ["reference_fna_generic"]


def reference_fna_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Neighborhood attention ``[batch, *spatial, heads, dim]`` in plain PyTorch: slow, and the truth of the others."""
    rank = query.ndim if isinstance(query, Tensor) else 0
    signature = Signature("0.21", "reference_fna_generic", f"query, key and value {heads_last(2)} or with 1 or 3 axes")
    if rank not in (4, 5, 6):
        check_tensor(signature, "query", query, 5)
    return fused.attend(
        signature,
        rank - 3,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        None,
        additional_keys,
        additional_values,
        return_lse,
        "reference",
    )
