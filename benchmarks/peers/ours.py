"""nbhd, as it is called by a user, and itself under other conditions."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

import nbhd
from benchmarks.cases import Case
from benchmarks.peers.inputs import tensors
from benchmarks.subject import NotHere, Subject, attention_subject

OPERATORS = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}


def prepare(case: Case) -> Subject:
    return _prepare("nbhd", case)


def prepare_float32(case: Case) -> Subject:
    """The same call in float32: what a shorter type gains."""
    return _prepare("nbhd-float32", replace(case, dtype="float32"), is_same_function=False)


def prepare_undilated(case: Case) -> Subject:
    """The same call with dilation 1: what dilation costs."""
    undilated = replace(case, dilation=(1,) * len(case.spatial))
    return _prepare("nbhd-undilated", undilated, is_same_function=False)


def prepare_nat_map(case: Case) -> Subject:
    """The same call on eight maps of 56x56, compared per query: what the size of the map costs."""
    if len(case.spatial) != 2:
        raise NotHere("it is a map of two axes")
    return _prepare("nbhd-56x56", replace(case, spatial=(56, 56), batch=8), is_same_function=False)


def prepare_reference(case: Case) -> Subject:
    """The plain PyTorch backend, which works in chunks of bounded memory."""
    return _prepare("nbhd-reference", case, backend="reference")


def _prepare(name: str, case: Case, backend: str = "auto", is_same_function: bool = True) -> Subject:
    operator = OPERATORS[len(case.spatial)]
    inputs = tensors(case)

    def call() -> Tensor:
        out = operator(
            inputs.query, inputs.key, inputs.value, case.kernel_size, case.stride, case.dilation, case.is_causal,
            rel_pos_bias=inputs.bias, backend=backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return attention_subject(name, call, inputs.leaves, case.queries, _as_it_is if is_same_function else None)


def _as_it_is(out: Tensor) -> Tensor:
    return out
