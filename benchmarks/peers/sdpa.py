"""PyTorch's scaled_dot_product_attention over the whole map, the neighborhood as a mask.

Without gradients mask and bias are laid out once, as one does for inference; with them the bias is looked up at each
call, for its gradient. Where every query sees the whole map and there is no bias there is no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import Case
from benchmarks.peers.dense import mask_and_bias_index
from benchmarks.peers.inputs import need_room, tensors
from benchmarks.subject import Subject, attention_subject


def prepare(case: Case) -> Subject:
    # int64 indices of every pair, and the mask itself
    need_room("a mask over all pairs of positions", case.tokens**2 * (4 + 4 * case.heads * case.has_bias), 1 << 30)
    inputs = tensors(case)
    seen, index = mask_and_bias_index(case)
    minus_infinity = torch.tensor(float("-inf"), dtype=case.torch_dtype)

    def looked_up(bias: Tensor) -> Tensor:
        dense = bias.flatten(1).to(case.torch_dtype)[:, index.view(-1)].view(case.heads, *index.shape)
        return torch.where(seen, dense, minus_infinity)[None]

    def in_tokens(t: Tensor) -> Tensor:
        return t.flatten(1, -3).transpose(1, 2)  # [batch, heads, tokens, dim], a view

    mask: Tensor | None
    with torch.no_grad():
        if inputs.bias is not None:
            mask = looked_up(inputs.bias)
        elif bool(seen.all()):
            mask = None
        else:
            mask = torch.where(seen, torch.zeros((), dtype=case.torch_dtype), minus_infinity)[None, None]
    if inputs.bias is None:
        del index

    def call() -> Tensor:
        added = looked_up(inputs.bias) if torch.is_grad_enabled() and inputs.bias is not None else mask
        return functional.scaled_dot_product_attention(
            in_tokens(inputs.query), in_tokens(inputs.key), in_tokens(inputs.value), attn_mask=added
        )

    def in_our_layout(out: Tensor) -> Tensor:
        return out.transpose(1, 2).unflatten(1, case.spatial)

    return attention_subject("dense-sdpa", call, inputs.leaves, case.queries, in_our_layout)
