"""Neighborhood attention as three loops in float64: written from the definition, sharing nothing with the package.

A neighborhood on one axis of length L, with window k, stride s, dilation d:

    group g = i mod d,  place u = i div d,  group length Lg = ceil((L - g) / d)

    not causal:  leader = min((u div s) * s + s div 2, Lg - 1)
                 places [w, w + k - 1],  w = clamp(leader - k div 2, 0, Lg - k)
    causal:      leader = min((u div s) * s + s - 1, Lg - 1)
                 places [max(leader - k + 1, 0), u]
"""

from __future__ import annotations

import itertools
import math

import numpy as np


def keys_of(i: int, length: int, k: int, s: int, d: int, causal: bool) -> list[int | None]:
    """Positions of the ``k`` slots of query ``i``; None where a slot is unused."""
    group, place = i % d, i // d
    group_length = -(-(length - group) // d)
    if causal:
        leader = min((place // s) * s + s - 1, group_length - 1)
        places = range(max(leader - k + 1, 0), place + 1)
    else:
        leader = min((place // s) * s + s // 2, group_length - 1)
        first = min(max(leader - k // 2, 0), group_length - k)
        places = range(first, first + k)
    positions: list[int | None] = [p * d + group for p in places]
    return positions + [None] * (k - len(positions))


def attention(query, key, value, kernel_size, stride, dilation, is_causal, scale=None, rel_pos_bias=None):
    """Output, log-sum-exp and probabilities of numpy arrays ``[batch, *spatial, heads, dim]``, per-axis tuples."""
    query, key, value = (np.asarray(t, dtype=np.float64) for t in (query, key, value))
    bias = None if rel_pos_bias is None else np.asarray(rel_pos_bias, dtype=np.float64)
    batch, *spatial, heads, dim = query.shape
    per_key = heads // key.shape[-2]
    scale = dim**-0.5 if scale is None else scale
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    lse = np.zeros(query.shape[:-1])
    weights = np.zeros((*query.shape[:-1], math.prod(kernel_size)))
    for b, h in itertools.product(range(batch), range(heads)):
        for i in itertools.product(*map(range, spatial)):
            slots = itertools.product(
                *(keys_of(*axis) for axis in zip(i, spatial, kernel_size, stride, dilation, is_causal, strict=True))
            )
            scores, places = [], []
            for slot, j in enumerate(slots):
                if None in j:
                    continue
                score = scale * float(query[(b, *i, h)] @ key[(b, *j, h // per_key)])
                if bias is not None:
                    relative = tuple(
                        jj // d - ii // d + k - 1 for ii, jj, k, d in zip(i, j, kernel_size, dilation, strict=True)
                    )
                    assert all(0 <= r <= 2 * k - 2 for r, k in zip(relative, kernel_size, strict=True))
                    score += bias[(h, *relative)]
                scores.append(score)
                places.append((slot, j))
            top = max(scores)
            total = sum(math.exp(x - top) for x in scores)
            lse[(b, *i, h)] = top + math.log(total)
            for score, (slot, j) in zip(scores, places, strict=True):
                weight = math.exp(score - top) / total
                weights[(b, *i, h, slot)] = weight
                out[(b, *i, h)] += weight * value[(b, *j, h // per_key)]
    return out, lse, weights
