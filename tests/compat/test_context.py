"""Switches, queries and helpers that callers import beside the operators."""

from __future__ import annotations

import warnings

import pytest
import torch

from nbhd.compat.natten import v0_15, v0_17, v0_20, v0_21, v0_21_1
from nbhd.compat.natten.core import checks
from nbhd.compat.natten.core.kinds import KernelSchedule
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
@pytest.mark.parametrize("switch", [dict(mode=False), dict(kv_parallel=False), dict(mode=False, kv_parallel=True)])
def test_use_fused_na_of_0_17_also_switches_kv_parallelism_off(switch):
    v0_17.use_fused_na()
    assert v0_17.is_kv_parallelism_in_fused_na_enabled()
    v0_17.use_fused_na(**switch)
    assert not v0_17.is_kv_parallelism_in_fused_na_enabled()
    assert v0_17.is_fused_na_enabled() == switch.get("mode", True)


@pytest.mark.filterwarnings("ignore:NATTEN's")
@pytest.mark.parametrize("force", [False, True])
def test_flex_attention_of_0_17_is_fused(force):
    (v0_17.force_flex_attention if force else v0_17.use_flex_attention)()
    assert v0_17.is_fused_na_enabled() and v0_17.is_kv_parallelism_in_fused_na_enabled()
    assert v0_17.context.should_use_flex_attention()
    assert v0_17.context.should_force_flex_attention() == force
    v0_17.use_fused_na(False)
    assert not v0_17.context.should_use_flex_attention() and not v0_17.context.should_force_flex_attention()


@pytest.mark.filterwarnings("ignore:NATTEN's")
def test_fused_attention_of_0_17_is_not_deterministic():
    v0_17.use_deterministic_algorithms()
    for switch in (v0_17.use_fused_na, v0_17.use_flex_attention):
        with pytest.raises(RuntimeError, match="deterministic"):
            switch()
        assert not v0_17.is_fused_na_enabled()
    v0_17.use_fused_na(kv_parallel=False)
    assert v0_17.is_fused_na_enabled()
    for wrong in (dict(mode=1, kv_parallel=False), dict(mode=False, kv_parallel=1), dict(use_flex_attention=1)):
        with pytest.raises(ValueError, match="Expected `bool`, got int"):
            v0_17.use_fused_na(**wrong)


@pytest.mark.filterwarnings("ignore:NATTEN's")
@pytest.mark.parametrize("era", [v0_17, v0_20, v0_21])
def test_the_memory_preference_is_a_member(era):
    preference = era.context.MemoryUsagePreference
    for name in ("Strict", "Unrestricted", "Default"):
        era.set_memory_usage_preference(name.lower())
        assert era.get_memory_usage_preference() is preference[name]
        assert era.get_memory_usage_preference() == name.lower()


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


@pytest.mark.parametrize("beside", [False, True])
def test_a_causal_sequence_with_its_whole_window_is_self_attention_since_0_21_5(beside):
    from nbhd.compat.natten.v0_21 import checks as newest

    sequence, grid = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 7, 2, 4)
    assert newest.is_self_attention(sequence, (5,), (True,), beside) == (not beside)
    assert newest.is_self_attention(sequence, (5,), (True,))
    assert newest.is_self_attention(sequence, (5,), (False,), has_additional_attention=beside)
    assert not newest.is_self_attention(sequence, (4,), (True,), beside)
    assert newest.is_self_attention(grid, (5, 7), (False, False), beside)
    assert not newest.is_self_attention(grid, (5, 7), (True, False), beside)
    assert not checks.is_self_attention(sequence, (5,), (True,))  # before


@pytest.mark.parametrize("given", [None, "non", "coop", "pp"])
def test_kernel_schedules(given):
    names = {"non": "NonPersistent", "coop": "WarpSpecializedCooperative", "pp": "WarpSpecializedPingpong"}
    found = checks.check_kernel_schedule(given)
    assert found is (None if given is None else KernelSchedule[names[given]])
    assert checks.check_kernel_schedule(found) is found
    with pytest.raises(ArgumentError, match="Kernel schedule fast is invalid"):
        checks.check_kernel_schedule("fast")


Q = torch.randn(2, 5, 7, 4, 8)
TOKENS = Q.flatten(1, 2)
MISFITS = {
    "rank": (checks.na_tensor_checks, (TOKENS[0], TOKENS[0], TOKENS[0]), {}, "Expected 4-D, 5-D, or 6-D tensors"),
    "ranks": (checks.na_tensor_checks, (Q, Q, TOKENS), {}, "must have the same rank"),
    "map": (checks.na_tensor_checks, (Q, Q[:, 1:], Q), {}, "to match in their token layouts"),
    "dim": (checks.na_tensor_checks, (Q, Q[..., 1:], Q), {}, "Q and K head dims must match"),
    "batch": (checks.fmha_tensor_checks, (TOKENS, TOKENS[:1], TOKENS), {}, "must match in batch size"),
    "dtype": (checks.fmha_tensor_checks, (TOKENS, TOKENS.half(), TOKENS), {}, "same data type"),
    "fmha rank": (checks.fmha_tensor_checks, (Q, Q, Q), {}, "Expected 4-D tensors as inputs to FMHA"),
    "tokens": (checks.fmha_tensor_checks, (TOKENS, TOKENS, TOKENS[:, 1:]), {}, "match in sequence length"),
    "heads": (checks.na_tensor_checks, (Q, Q[..., :3, :], Q[..., :3, :]), {}, "must evenly divide query heads"),
    "kv heads": (checks.na_tensor_checks, (Q, Q[..., :2, :], Q), {}, "must always have the same number of heads"),
    "grouped": (
        checks.na_tensor_checks, (Q, Q[..., :2, :], Q[..., :2, :]), {"supports_gqa_mqa": False}, "GQA/MQA",
    ),
    "value dim": (
        checks.na_tensor_checks, (Q, Q, Q[..., 1:]), {"must_match_head_dims": True, "backend_name": "flex"},
        "flex does not support different head dims",
    ),
    "sparse": (checks.na_tensor_checks, (Q.to_sparse(), Q, Q), {}, "does not support sparse tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit(name):
    check, tensors, options, message = MISFITS[name]
    with pytest.raises(NotImplementedError if name == "sparse" else ArgumentError, match=message):
        check(*tensors, **options)
    assert not check(*tensors, **options, raise_error=False)


def test_tensors_that_fit():
    assert checks.na_tensor_checks(Q, Q[..., :2, :], Q[..., :2, 1:])
    assert checks.fmha_tensor_checks(TOKENS, TOKENS[:, 1:, :2], TOKENS[:, 1:, :2, 1:])
