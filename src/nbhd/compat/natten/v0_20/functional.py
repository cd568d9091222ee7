"""``natten.functional`` of 0.20: heads last, ``stride`` fifth; ``merge_attentions`` returns the output alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nbhd.compat.natten.core import full_attention, knobs, merging
from nbhd.compat.natten.core.generic import generic
from nbhd.compat.natten.core.signature import Signature
from nbhd.compat.natten.core.unfused_names import old_names

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention_generic",
]

_ERA = "0.20"

neighborhood_attention_generic = generic(_ERA, __name__)
na1d, na2d, na3d = (generic(_ERA, __name__, axes) for axes in (1, 2, 3))

_ATTENTION = Signature(
    "0.20 to 0.21.1",
    "attention",
    "(query, key, value, scale=None, ...), query [batch, queries, heads, dim], key and value [batch, keys, heads, dim]",
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention over all keys: query ``[batch, queries, heads, dim]``, key and value ``[batch, keys, heads, dim]``.

    Returns:
        Output, or with ``return_lse`` output and log-sum-exp ``[batch, queries, heads]``.

    Raises:
        ArgumentError: a shape or parameter does not fit (a ``ValueError``).
    """
    knobs.backend_for(backend, "fmha")
    knobs.check_schedule(kernel_schedule)
    knobs.ignore(
        q_tile_size=q_tile_size,
        kv_tile_size=kv_tile_size,
        backward_q_tile_size=backward_q_tile_size,
        backward_kv_tile_size=backward_kv_tile_size,
        backward_kv_splits=backward_kv_splits,
        backward_use_pt_reduction=backward_use_pt_reduction,
        run_persistent_kernel=run_persistent_kernel,
        kernel_schedule=kernel_schedule,
        torch_compile=torch_compile,
    )
    return full_attention.attention(_ATTENTION, query, key, value, False, scale, (None,) * 6, return_lse)


def merge_attentions(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True) -> Tensor:
    """Attention over the union of the keys of two or more attentions ``[batch, tokens, heads, dim]``: the output alone.

    Gradients reach every part through output and log-sum-exp; the inputs are not overwritten.

    Raises:
        ArgumentError: fewer than two parts, or shapes that do not match.
    """
    return merging.merge(outputs, lse_tensors)[0]


# Gone from NATTEN since 0.20; kept for callers that still have them.
_old = old_names(__name__)
globals().update(_old)
__all__ += [*_old]
