"""What the GPU kernels are held against on the device: FlexAttention, Swin's windows, the reference.

A peer is a function from a case to a ``Contender``: a call and its leaves. It raises ``NotHere`` with the reason.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import nbhd
from benchmarks.cases import Case
from benchmarks.subject import NotHere

#: A block mask looks at every pair of tokens.
MOST_FLEX_PAIRS = 1 << 32


class Contender(NamedTuple):
    """``call`` gives the output with its graph, ``leaves`` have gradients; ``comparable``: it is our function."""

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    comparable: Callable[[Tensor], Tensor] | None


def leaves_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    shape = (case.batch, *case.spatial, case.heads, case.head_dim)
    query, key, value = (normal(*shape, dtype=case.torch_dtype) for _ in range(3))
    table = (case.heads, *(2 * k - 1 for k in case.kernel_size))
    return query, key, value, normal(*table, dtype=torch.float32) if case.has_bias else None


def prepare_nbhd(case: Case, device: torch.device, backend: str = "triton") -> Contender:
    query, key, value, bias = leaves_of(case, device)
    operator = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}[len(case.spatial)]

    def call() -> Tensor:
        out = operator(
            query, key, value, case.kernel_size, case.stride, case.dilation, case.is_causal, rel_pos_bias=bias,
            backend=backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return Contender(call, [t for t in (query, key, value, bias) if t is not None], lambda out: out)


def prepare_reference(case: Case, device: torch.device) -> Contender:
    if math.prod(case.kernel_size) * case.queries * case.head_dim > 1 << 36:
        raise NotHere("it would take minutes")
    return prepare_nbhd(case, device, "reference")


def prepare_flex(case: Case, device: torch.device) -> Contender:
    """FlexAttention under torch.compile, the neighborhood as NATTEN defines it; static shapes, the mask made once."""
    if case.tokens**2 > MOST_FLEX_PAIRS:
        raise NotHere(f"its block mask is made out of all pairs of {case.tokens} positions")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from benchmarks.peers.dense import axes_of_tokens

    axes = axes_of_tokens(case)
    positions, firsts, lasts = ([getattr(a, n).to(device) for a in axes] for n in ("position", "first", "last"))

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= 0
        for i, axis in enumerate(axes):
            at = positions[i][key]
            seen = seen & (at >= firsts[i][query]) & (at <= lasts[i][query])
            if axis.dilation > 1:
                seen = seen & ((at - firsts[i][query]) % axis.dilation == 0)
        return seen

    query, key, value, bias = leaves_of(case, device)
    flat = None if bias is None else bias.flatten(1)

    def with_bias(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        index: Tensor | int = 0
        for i, axis in enumerate(axes):
            k = axis.kernel_size
            apart = torch.div(positions[i][key] - positions[i][query], axis.dilation, rounding_mode="floor")
            index = index * (2 * k - 1) + (apart + k - 1).clamp(0, 2 * k - 2)
        assert flat is not None
        return score + flat[head, index]

    compiled = torch.compile(flex_attention, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about itself
        blocks = create_block_mask(sees, None, None, case.tokens, case.tokens, device=str(device))

    def call() -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = compiled(q, k, v, score_mod=None if bias is None else with_bias, block_mask=blocks)
        assert isinstance(out, Tensor)
        return out

    return Contender(
        call, [t for t in (query, key, value, bias) if t is not None],
        lambda out: out.transpose(1, 2).unflatten(1, case.spatial),
    )  # fmt: skip


def prepare_swin(case: Case, device: torch.device) -> Contender:
    """Swin's shifted window attention by SDPA on the same map: roll, cut, attend with bias and mask, put together."""
    if len(case.spatial) != 2 or case.kernel_size[0] != case.kernel_size[1]:
        raise NotHere("Swin's windows are squares on a map of two axes")
    from benchmarks.peers import swin

    window, heads, dim = case.kernel_size[0], case.heads, case.head_dim
    rows, columns = (-(-length // window) * window for length in case.spatial)
    shift = window // 2 if min(case.spatial) > window else 0
    area = window * window
    tensors = leaves_of(case, device)
    with torch.no_grad():
        flat = [t.flatten(-2).detach().requires_grad_() for t in tensors[:3]]
    table = None
    if case.has_bias:
        table = torch.randn((2 * window - 1) ** 2, heads, device=device, dtype=case.torch_dtype, requires_grad=True)
    index = swin._bias_index(window).to(device)
    mask = swin._shift_mask(rows, columns, window, shift).to(device, case.torch_dtype) if shift else None
    dense = None if mask is None else mask[None, :, None].expand(case.batch, -1, -1, -1, -1).flatten(0, 1)

    def cut(x: Tensor) -> Tensor:
        return swin._partition(swin._roll(swin._pad(x, rows, columns), -shift), window).view(-1, area, heads, dim)

    def call() -> Tensor:
        q, k, v = (cut(x).transpose(1, 2) for x in flat)
        added = None
        if table is not None:
            added = table[index].view(area, area, heads).permute(2, 0, 1).contiguous()[None]
        if dense is not None:
            added = dense if added is None else added + dense
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
        whole = swin._roll(
            swin._merge(out.transpose(1, 2).reshape(-1, window, window, heads * dim), window, rows, columns), shift
        )
        return whole[:, : case.spatial[0], : case.spatial[1]].contiguous()

    return Contender(call, [*flat, *([] if table is None else [table])], None)


PEERS: dict[str, Callable[[Case, torch.device], Contender]] = {
    "nbhd": prepare_nbhd,
    "flex": prepare_flex,
    "swin": prepare_swin,
    "reference": prepare_reference,
}
