"""What the GPU kernels are held against on the device: FlexAttention, Swin's windows, the reference.

A peer is a function from a case to a ``Contender``: a call and its leaves. It raises ``NotHere`` with the reason.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._dynamo
from torch import Tensor

import nbhd
from benchmarks.cases import Case
from benchmarks.peers.inputs import Inputs
from benchmarks.subject import NotHere

#: A block mask looks at every pair of tokens.
MOST_FLEX_PAIRS = 1 << 32


class Contender(NamedTuple):
    """``call(*inputs)`` gives the output with its graph; it may be called with other tensors like the inputs.

    Inputs and parameters are leaves and have gradients: the former are as large as the map, the latter are in ``call``.
    ``comparable``, where it is our function, brings the output to ``[batch, *spatial, heads, dim]``.
    """

    call: Callable[..., Tensor]
    inputs: list[Tensor]
    parameters: list[Tensor]
    comparable: Callable[[Tensor], Tensor] | None


def leaves_of(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    shape = (case.batch, *case.spatial, case.heads, case.head_dim)
    query, key, value = (normal(*shape, dtype=case.torch_dtype) for _ in range(3))
    table = (case.heads, *(2 * k - 1 for k in case.kernel_size))
    return Inputs(query, key, value, normal(*table, dtype=torch.float32) if case.has_bias else None)


def prepare_nbhd(case: Case, device: torch.device, backend: str = "triton") -> Contender:
    query, key, value, bias = leaves_of(case, device)
    operator = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}[len(case.spatial)]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = operator(
            query, key, value, case.kernel_size, case.stride, case.dilation, case.is_causal, rel_pos_bias=bias,
            backend=backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return Contender(call, [query, key, value], [] if bias is None else [bias], lambda out: out)


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

    def with_bias(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        apart = []
        for i, axis in enumerate(axes):
            k = axis.kernel_size
            steps = torch.div(positions[i][key] - positions[i][query], axis.dilation, rounding_mode="floor")
            apart.append((steps + k - 1).clamp(0, 2 * k - 2))
        # the leaf itself: a view made once would be of another stream than a graph is recorded on
        return score + bias[(head, *apart)]

    # every mask and score function compiles the same code anew: from the ninth on Dynamo would run it uncompiled
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(flex_attention, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about itself
        blocks = create_block_mask(sees, None, None, case.tokens, case.tokens, device=str(device))

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = compiled(q, k, v, score_mod=None if bias is None else with_bias, block_mask=blocks)
        assert isinstance(out, Tensor)
        return out

    return Contender(
        call, [query, key, value], [] if bias is None else [bias],
        lambda out: out.transpose(1, 2).unflatten(1, case.spatial),
    )  # fmt: skip


def prepare_swin(case: Case, device: torch.device) -> Contender:
    """Swin's shifted window attention by SDPA on the same map, as ``peers.swin`` does it on the processor."""
    from benchmarks.peers import swin

    attend, leaves = swin.prepared(case, leaves_of(case, device))
    return Contender(attend, leaves[:3], leaves[3:], None)


PEERS: dict[str, Callable[[Case, torch.device], Contender]] = {
    "nbhd": prepare_nbhd,
    "flex": prepare_flex,
    "swin": prepare_swin,
    "reference": prepare_reference,
}
