"""Switches, queries and helpers that callers import beside the operators."""

from __future__ import annotations

import warnings

import pytest
import torch

from nbhd.compat.natten import v0_15, v0_17, v0_20, v0_21, v0_21_1
from nbhd.compat.natten.core import checks
from nbhd.errors import ArgumentError

CHANGES = {
    "use_fused_na": ((True,), v0_17),
    "use_autotuner": ((True,), v0_17),
    "use_gemm_na": ((False,), v0_17),
    "use_tf32_in_gemm_na": ((False,), v0_17),
    "use_tiled_na": ((False,), v0_17),
    "use_kv_parallelism_in_fused_na": ((True,), v0_21),
    "set_memory_usage_preference": (("unrestricted",), v0_21),
    "use_deterministic_algorithms": ((True,), v0_21),
    "allow_flex_compile": ((True,), v0_20),
    "allow_flex_compile_backprop": ((True,), v0_21),
}


@pytest.fixture(autouse=True)
def _defaults():
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v0_17.context.NattenContext.reset()
        v0_21.context.NattenContext.reset()


@pytest.mark.parametrize("name", CHANGES)
def test_a_switch_is_kept_and_says_once_that_it_changes_nothing(name):
    arguments, era = CHANGES[name]
    with pytest.warns(UserWarning, match="has no effect in nbhd"):
        getattr(era, name)(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(era, name)(*arguments)


@pytest.mark.filterwarnings("ignore:NATTEN's")
def test_what_was_set_is_told_back():
    assert not v0_17.is_fused_na_enabled()
    v0_17.use_fused_na(True)
    assert v0_17.is_fused_na_enabled() and v0_17.is_fna_enabled() and v0_17.is_kv_parallelism_in_fused_na_enabled()
    v0_17.use_autotuner(forward_pass=True, thorough_mode_backward=True)
    assert v0_17.is_autotuner_enabled_for_forward() and v0_17.is_autotuner_thorough_for_backward()
    assert not v0_17.is_autotuner_enabled_for_backward()
    v0_17.context.AutotunerContext.reset()
    assert not v0_17.is_autotuner_enabled() and v0_17.is_fused_na_enabled()
    v0_17.context.NattenContext.reset()
    assert not v0_17.is_fused_na_enabled()
    assert v0_21.is_kv_parallelism_in_fused_na_enabled()  # on from 0.20
    assert v0_21.get_memory_usage_preference() == "default" and v0_21.is_memory_usage_default()
    v0_21.set_memory_usage_preference("strict")
    assert v0_21.is_memory_usage_strict() and not v0_21.is_memory_usage_unrestricted()
    assert v0_21.get_memory_usage_preference() == v0_21.context.MemoryUsagePreference.Strict
    v0_21.allow_flex_compile(True, True)
    assert v0_21.is_flex_compile_allowed() and v0_21.is_flex_compile_backprop_allowed()
    v0_21.disable_flex_compile()
    assert not v0_21.is_flex_compile_allowed()


@pytest.mark.filterwarnings("ignore:NATTEN's")
def test_natten_s_own_rules():
    for era in (v0_17, v0_21):
        era.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="deterministic"):
            era.use_kv_parallelism_in_fused_na(True)
        era.use_kv_parallelism_in_fused_na(False)
        with pytest.raises(ValueError, match="Expected `bool`, got int"):
            era.use_deterministic_algorithms(1)
    with pytest.raises(RuntimeError, match="autotuner"):
        v0_17.use_autotuner(True)
    with pytest.raises(ValueError, match="only one of three settings: `default`, `strict`, and `unrestricted`"):
        v0_21.set_memory_usage_preference("lots")
    v0_21.context.NattenContext.reset()
    v0_21.use_kv_parallelism_in_fused_na(False)
    torch.use_deterministic_algorithms(True)
    try:
        v0_21.use_kv_parallelism_in_fused_na(True)  # a warning, and the request does not count
        assert not v0_21.is_kv_parallelism_in_fused_na_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_queries_answer_for_nbhd():
    for era in (v0_17, v0_20, v0_21, v0_21_1):
        assert era.has_fused_na() and era.has_fna() and era.has_half(0) and era.has_bfloat()
        assert era.HAS_LIBNATTEN is True
    for era in (v0_15, v0_17):
        assert era.has_cuda() == torch.cuda.is_available()
        assert not era.has_gemm()
    with pytest.warns(UserWarning, match="gemm_na"):
        v0_15.enable_gemm_na()


def test_tile_listings_are_empty():
    q = torch.randn(1, 8, 8, 2, 32)
    for family in ("cutlass", "cutlass_hopper", "cutlass_blackwell"):
        for kind in ("fna", "fmha"):
            assert getattr(v0_21, f"get_configs_for_{family}_{kind}")(q, q, q) == []
            assert getattr(v0_21, f"get_bwd_configs_for_{family}_{kind}")(q, q, q) == []
    assert v0_21.get_configs_for_flex_fna(q, q, q, torch_compile=True) == []


def test_argument_helpers():
    assert checks.check_all_args(2, 3, None, (1, 2), True) == ((3, 3), (1, 1), (1, 2), (True, True))
    from nbhd.compat.natten.v0_17 import utils

    assert utils.check_all_args(2, [3, 5], 2, None) == ((3, 5), (2, 2), (False, False))
    assert checks.get_num_na_weights((3, 5)) == 15
    q = torch.randn(1, 5, 7, 2, 4)
    checks.check_args_against_input(q, (5, 7), (1, 1), (1, 1), (False, False))
    assert checks.is_self_attention(q, (5, 7), (False, False))
    assert not checks.is_self_attention(q, (5, 7), (True, False))
    for call, text in (
        (
            lambda: checks.check_all_args(2, 0, 1, 1, False),
            "Invalid value for `kernel_size`; expected an integer",
        ),
        (lambda: checks.check_all_args(2, True, 1, 1, False), "Invalid value for `kernel_size`"),
        (
            lambda: checks.check_all_args(2, 3, (1, 1, 1), 1, False),
            "Invalid value for `stride`; expected an integer or",
        ),
        (lambda: checks.check_all_args(2, 3, 1, "2", False), "Invalid value for `dilation`"),
        (lambda: checks.check_all_args(2, 3, 1, 1, 1), "Invalid value for `is_causal`; expected a boolean or tuple"),
        (
            lambda: checks.check_args_against_input(q, (5, 7), (1, 1), (2, 1), (False, False)),
            "The product of kernel size and dilation cannot be larger than input size along any dimension",
        ),
        (
            lambda: checks.check_args_against_input(q, (3, 3), (4, 1), (1, 1), (False, False)),
            "Stride cannot be larger than kernel size along any dimension",
        ),
    ):
        with pytest.raises(ArgumentError, match=text):
            call()
