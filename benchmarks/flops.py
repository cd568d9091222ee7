"""Useful arithmetic: what the attention needs, counted from the geometry tables; masked-out work is not useful.

A multiply and an add are two. For each query and key: QK^T and PV forward; QK^T again, dP = dO V^T, dV = P^T dO,
dQ = dS K and dK = dS^T Q backward. With equal dimensions of key and value that is ``4 * K * dim`` forward and
``10 * K * dim`` backward for each query and head with ``K`` keys. The softmax is not counted.
"""

from __future__ import annotations

import math

from benchmarks.cases import Case


def pairs(case: Case) -> int:
    """Query-key pairs of one map and head: the product over the axes of the sum of all window sizes."""
    return math.prod(int(table.count.sum()) for table in case.neighborhood.tables(case.spatial))


def forward_flop(case: Case) -> int:
    return 4 * case.head_dim * pairs(case) * case.batch * case.heads


def backward_flop(case: Case) -> int:
    return 10 * case.head_dim * pairs(case) * case.batch * case.heads
