"""One query at a time, from the definition of :mod:`tests.truth`: for maps too large for the whole triple loop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from tests.truth import keys_of


def attend_at(query, key, value, position, kernel_size, dilation, *, stride=None, causal=None, scale=1.0, bias=None):
    """Scores ``[heads, slots]`` and output ``[heads, dim]`` of one position of arrays ``[*spatial, heads, dim]``.

    Unused slots hold minus infinity, and come where the window has them: at the end of each axis.
    """
    spatial, heads = query.shape[:-2], query.shape[-2]
    axes = len(spatial)
    stride = (1,) * axes if stride is None else stride
    causal = (False,) * axes if causal is None else causal
    slots = itertools.product(
        *(keys_of(*axis) for axis in zip(position, spatial, kernel_size, stride, dilation, causal, strict=True))
    )
    scores = np.full((heads, math.prod(kernel_size)), -np.inf)
    values = np.zeros((*scores.shape, value.shape[-1]))
    for slot, found in enumerate(slots):
        if None in found:
            continue
        scores[:, slot] = scale * (query[position] * key[found]).sum(-1)
        if bias is not None:
            places = tuple(
                j // d - i // d + k - 1 for i, j, k, d in zip(position, found, kernel_size, dilation, strict=True)
            )
            scores[:, slot] += bias[(slice(None), *places)]
        values[:, slot] = value[found]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return scores, (weights[..., None] * values).sum(1)


def everywhere(query, key, value, kernel_size, dilation, **options):
    """:func:`attend_at` at every position of ``[batch, *spatial, heads, dim]`` tensors: scores and outputs, float64."""
    q, k, v = (t.detach().double().numpy() for t in (query, key, value))
    options = {n: o.detach().double().numpy() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    scores, outs = [], []
    for b in range(len(q)):
        for position in itertools.product(*map(range, q.shape[1:-2])):
            s, o = attend_at(q[b], k[b], v[b], position, kernel_size, dilation, **options)
            scores.append(s)
            outs.append(o)
    shape = q.shape[:-1]
    return torch.from_numpy(np.reshape(scores, (*shape, -1))), torch.from_numpy(np.reshape(outs, (*shape, -1)))


def some_positions(spatial, count=40, seed=0):
    """All corners and a sample between them."""
    corners = list(itertools.product(*((0, n - 1) for n in spatial)))
    random = np.random.default_rng(seed)
    return [*dict.fromkeys(corners), *(tuple(int(random.integers(n)) for n in spatial) for _ in range(count))]
