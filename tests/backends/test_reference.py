"""The reference against the triple loop in float64: output, log-sum-exp, weights; then every gradient."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import nbhd
from nbhd.backends import reference
from tests import truth
from tests.cases import NAMED, Case, cases

OPERATORS = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}


def run(case: Case, dtype: torch.dtype = torch.float64, **options):
    tensors = case.tensors(dtype)
    operator = OPERATORS[len(case.spatial)]
    bias = tensors.pop("rel_pos_bias", None)
    return operator(
        *tensors.values(),
        *case.geometry,
        case.scale,
        rel_pos_bias=bias,
        backend="reference",
        return_lse=True,
        **options,
    )


def expected(case: Case):
    tensors = {name: t.numpy() for name, t in case.tensors().items()}
    bias = tensors.pop("rel_pos_bias", None)
    return truth.attention(*tensors.values(), *case.geometry, case.scale, bias)


def compare(case: Case) -> None:
    out, lse = run(case)
    true_out, true_lse, true_weights = expected(case)
    np.testing.assert_allclose(out.numpy(), true_out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), true_lse, rtol=0, atol=1e-12)
    tensors = case.tensors()
    weights = nbhd.attention_weights(
        tensors["query"], tensors["key"], *case.geometry, case.scale, rel_pos_bias=tensors.get("rel_pos_bias"),
        backend="reference",
    )  # fmt: skip
    np.testing.assert_allclose(weights.numpy(), true_weights, rtol=0, atol=1e-12)
    summed = nbhd.apply_attention_weights(weights, tensors["value"], *case.geometry, backend="reference")
    np.testing.assert_allclose(summed.numpy(), true_out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_named_settings_match_the_triple_loop(name):
    compare(NAMED[name])


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_setting_matches_the_triple_loop(case):
    compare(case)


@pytest.mark.parametrize("name", NAMED)
def test_every_gradient_by_finite_differences(name):
    case = NAMED[name]
    tensors = {n: t.requires_grad_() for n, t in case.tensors().items()}
    operator = OPERATORS[len(case.spatial)]

    def attend(query, key, value, bias=None):
        return operator(
            query, key, value, *case.geometry, case.scale, rel_pos_bias=bias, return_lse=True, backend="reference"
        )

    # Random projections of the Jacobian, so that the large settings are affordable.
    assert torch.autograd.gradcheck(attend, tuple(tensors.values()), fast_mode=True)


SMALL = ["1d-causal-stride-dilation-bias", "1d-even-window", "2d-minimum", "3d-causal-time", "2d-grouped-heads"]


@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives_by_finite_differences(name):
    case = NAMED[name]
    tensors = {n: t.requires_grad_() for n, t in case.tensors().items()}
    operator = OPERATORS[len(case.spatial)]

    def attend(query, key, value, bias=None):
        return operator(
            query, key, value, *case.geometry, case.scale, rel_pos_bias=bias, return_lse=True, backend="reference"
        )

    assert torch.autograd.gradgradcheck(attend, tuple(tensors.values()), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("name", SMALL)
def test_unfused_pair_differentiates_twice(name):
    case = NAMED[name]
    tensors = {n: t.requires_grad_() for n, t in case.tensors().items()}

    def attend(query, key, value, bias=None):
        weights = nbhd.attention_weights(query, key, *case.geometry, case.scale, rel_pos_bias=bias, backend="reference")
        return nbhd.apply_attention_weights(weights, value, *case.geometry, backend="reference")

    assert torch.autograd.gradcheck(attend, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(attend, tuple(tensors.values()), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("name", ["2d-per-axis", "3d-everything", "2d-grouped-heads"])
def test_chunks_do_not_change_the_result(name, monkeypatch):
    case = NAMED[name]
    tensors = {n: t.requires_grad_() for n, t in case.tensors().items()}
    operator = OPERATORS[len(case.spatial)]

    def everything():
        bias = tensors.get("rel_pos_bias")
        out, lse = operator(
            tensors["query"], tensors["key"], tensors["value"], *case.geometry, rel_pos_bias=bias, return_lse=True,
            backend="reference",
        )  # fmt: skip
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), tuple(tensors.values()))]

    whole = everything()
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", 1)  # one query at a time
    for one, other in zip(whole, everything(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_window_of_the_whole_map_is_full_attention():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 5, 6, 3, 8, dtype=torch.float64) for _ in range(3))
    out = nbhd.na2d(query, key, value, (5, 6), backend="reference")
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]
    full = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(out.shape)
    torch.testing.assert_close(out, full, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_dtypes_accumulate_in_float32(dtype):
    case = NAMED["2d-window-7"]
    out, lse = run(case, dtype)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    rounded = {name: t.to(dtype).double().numpy() for name, t in case.tensors().items()}
    bias = rounded.pop("rel_pos_bias")
    true_out, true_lse, _ = truth.attention(*rounded.values(), *case.geometry, None, bias)
    # One rounding of the output, nothing else: half a unit in the last place of the largest value.
    atol = max(1e-6, float(np.abs(true_out).max()) * torch.finfo(dtype).eps)
    np.testing.assert_allclose(out.double().numpy(), true_out, rtol=0, atol=atol)
    np.testing.assert_allclose(lse.double().numpy(), true_lse, rtol=0, atol=1e-5)


PEAK = """
import resource, torch, nbhd
query = torch.randn(1, 1024, 1024, 1, 4)
nbhd.na2d(query[:, :8, :8], query[:, :8, :8], query[:, :8, :8], 7, backend="reference")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nbhd.na2d(query, query, query, 7, backend="reference")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_large_map_never_holds_all_windows():
    """1024 x 1024 positions of a 7 x 7 window, one head of 4: the gathered keys and values alone would be 1644 MB."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 400_000
