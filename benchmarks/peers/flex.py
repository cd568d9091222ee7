"""FlexAttention under torch.compile: the neighborhood as a block mask, the bias as a score function.

Tokens stay in row-major order and blocks have the default size. On the CPU it has no backward.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.dense import axes_of_tokens
from benchmarks.peers.inputs import tensors
from benchmarks.subject import NotHere, Subject, attention_subject

#: Making the block mask evaluates every pair of tokens.
MOST_TOKENS = 8192


def prepare(case: Case) -> Subject:
    if case.tokens > MOST_TOKENS:
        raise NotHere(f"its block mask is made out of all pairs of {case.tokens} positions")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise NotHere(f"this torch has no FlexAttention: {error}") from None
    inputs = tensors(case)
    axes = axes_of_tokens(case)
    bias = None if inputs.bias is None else inputs.bias.detach().flatten(1)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor | None = None
        for axis in axes:
            position = axis.position[key]
            here = (position >= axis.first[query]) & (position <= axis.last[query])
            if axis.dilation > 1:
                here = here & ((position - axis.first[query]) % axis.dilation == 0)
            seen = here if seen is None else seen & here
        assert seen is not None
        return seen

    def with_bias(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        index: Tensor | int = 0
        for axis in axes:
            k = axis.kernel_size
            apart = axis.position[key] - axis.position[query]
            if axis.dilation > 1:
                apart = torch.div(apart, axis.dilation, rounding_mode="floor")
            index = index * (2 * k - 1) + (apart + k - 1).clamp(0, 2 * k - 2)
        return score + bias[head, index]

    def in_tokens(t: Tensor) -> Tensor:
        return t.detach().flatten(1, -3).transpose(1, 2)

    query, key, value = in_tokens(inputs.query), in_tokens(inputs.key), in_tokens(inputs.value)
    compiled = torch.compile(flex_attention, dynamic=False)
    try:
        blocks = create_block_mask(sees, None, None, case.tokens, case.tokens, device="cpu")

        def call() -> Tensor:
            out = compiled(query, key, value, score_mod=None if bias is None else with_bias, block_mask=blocks)
            assert isinstance(out, Tensor)
            return out

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own, about itself
            call()
    except Exception as error:  # no compiler, no instruction set it knows, ...
        raise NotHere(f"it does not compile: {str(error).strip().splitlines()[0][:160]}") from None

    def in_our_layout(out: Tensor) -> Tensor:
        return out.transpose(1, 2).unflatten(1, case.spatial)

    subject = attention_subject(
        "flex-compiled", call, [], case.queries, in_our_layout, backward="no backward on the CPU"
    )
    subject.only_at = torch.get_num_threads()  # compiled in
    subject.is_compiled = True
    return subject
