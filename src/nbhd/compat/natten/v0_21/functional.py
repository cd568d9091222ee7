"""``natten.functional`` of 0.21.5 to 0.21.7: heads last, ``stride`` fifth, log-sum-exps, packed sequences."""

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

_ERA = "0.21"

neighborhood_attention_generic = generic(_ERA, __name__)
na1d, na2d, na3d = (generic(_ERA, __name__, axes) for axes in (1, 2, 3))

_ATTENTION = Signature(
    _ERA,
    "attention",
    "(query, key, value, is_causal=False, scale=None, ...), query [batch, queries, heads, dim], key and value [batch, "
    "keys, kv_heads, dim]",
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Any = None,  # noqa: N803
    seqlens_KV: Any = None,  # noqa: N803
    cumulative_seqlen_Q: Tensor | None = None,  # noqa: N803
    cumulative_seqlen_KV: Tensor | None = None,  # noqa: N803
    max_seqlen_Q: int | None = None,  # noqa: N803
    max_seqlen_KV: int | None = None,  # noqa: N803
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
    """Attention over all keys: query ``[batch, queries, heads, dim]``, key and value ``[batch, keys, kv_heads, dim]``.

    Args:
        query: any floating dtype, on any device.
        key: ``kv_heads`` divides ``heads``.
        value: may have another ``dim``.
        is_causal: query ``i`` sees the keys 0 to ``i``, whatever the two lengths.
        scale: factor on the scores; default ``dim ** -0.5``; 0.0 is 0.0.
        seqlens_Q: length of each packed sequence, with batch 1 and ``seqlens_KV``.
        seqlens_KV: see there.
        cumulative_seqlen_Q: instead of lengths, their sums from 0 on, int32, with the three that follow.
        cumulative_seqlen_KV: see there.
        max_seqlen_Q: greatest length.
        max_seqlen_KV: see there.
        backend: accepted, without effect, as are tile sizes, splits and schedules.
        q_tile_size: without effect.
        kv_tile_size: without effect.
        backward_q_tile_size: without effect.
        backward_kv_tile_size: without effect.
        backward_kv_splits: without effect.
        backward_use_pt_reduction: without effect.
        run_persistent_kernel: without effect.
        kernel_schedule: without effect.
        torch_compile: without effect.
        return_lse: also return the log-sum-exp, which has a gradient.

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
    lengths = (seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)
    return full_attention.attention(_ATTENTION, query, key, value, is_causal, scale, lengths, return_lse)


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of the keys of two or more attentions: output and log-sum-exp.

    Args:
        outputs: each ``[batch, tokens, heads, dim]``, over sets of keys that do not overlap.
        lse_tensors: the log-sum-exp of each, ``[batch, tokens, heads]``.
        torch_compile: without effect.
        use_autograd_fix: without effect: gradients reach every part through output and log-sum-exp as they are, and
            the inputs are not overwritten.

    Returns:
        The output in the dtype of ``outputs[0]`` and the log-sum-exp in float32 (float64 for float64).

    Raises:
        ArgumentError: fewer than two parts, or shapes that do not match.
    """
    knobs.ignore(use_autograd_fix=use_autograd_fix)
    return merging.merge(outputs, lse_tensors)


# Gone from NATTEN since 0.20; kept for callers that still have them.
_old = old_names(__name__)
globals().update(_old)
__all__ += [*_old]
