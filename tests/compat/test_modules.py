"""Modules: argument orders, state dicts, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbhd.compat.natten import v0_14, v0_14_4, v0_15, v0_17, v0_20, v0_21, v0_21_1
from nbhd.errors import ArgumentError

LETTERS = {1: (9,), 2: (5, 7), 3: (3, 4, 5)}


def by_hand(module, x, kernel_size, dilation, axes, scale=None):
    """The forward of 0.14, written with its own functions: padding, projections, bias, softmax, projection."""
    spatial = x.shape[1:-1]
    padding = [max(0, k * d - n) for n, k, d in zip(spatial, kernel_size, dilation, strict=True)]
    padded = torch.nn.functional.pad(x, (0, 0, *(p for extra in reversed(padding) for p in (0, extra))))
    qkv = module.qkv(padded).reshape(*padded.shape[:-1], 3, module.num_heads, -1)
    q, k, v = qkv.movedim(-3, 0).movedim(-2, 2)  # heads first
    q = q * (module.head_dim**-0.5 if scale is None else scale)
    scores = getattr(v0_17.functional, f"na{axes}d_qk")(q, k, kernel_size, dilation, rpb=module.rpb)
    out = getattr(v0_17.functional, f"na{axes}d_av")(scores.softmax(-1), v, kernel_size, dilation)
    out = out.movedim(1, -2).flatten(-2)
    for axis, n in enumerate(spatial, 1):
        out = out.narrow(axis, 0, n)
    return module.proj(out)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("size", ["as large", "smaller"])
def test_the_eras_to_0_15_pad_maps_smaller_than_the_window(axes, size):
    name = f"NeighborhoodAttention{axes}D"
    x = torch.randn(2, *LETTERS[axes], 8)
    dilation = 3 if size == "smaller" else 1  # 3 * 3 positions where the map has 5 or 7
    made = [
        getattr(v0_14_4, name)(8, 3, 2, dilation=dilation),  # window, heads
        getattr(v0_14, name)(8, 2, 3, dilation),  # heads, window
        getattr(v0_15, name)(8, 2, 3, dilation),
    ]
    for module in made:
        assert list(module.state_dict()) == ["rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
        assert module.rpb.shape == (2, *(5,) * axes)
        expected = by_hand(module, x, (3,) * axes, (dilation,) * axes, axes)
        assert torch.allclose(module(x), expected, atol=1e-5)
        module.load_state_dict(made[0].state_dict())


def test_three_axes_of_0_15():
    module = v0_15.NeighborhoodAttention3D(8, 2, 3, 5, 1, 2)
    assert (module.kernel_size_d, module.kernel_size) == (5, 3)
    assert (module.dilation_d, module.dilation) == (2, 1)
    assert (module.window_size_d, module.window_size) == (10, 3)
    x = torch.randn(1, 4, 5, 3, 8)  # the depth padded to 10
    assert torch.allclose(module(x), by_hand(module, x, (5, 3, 3), (2, 1, 1), 3), atol=1e-5)


def test_dilation_of_0_14_4_may_follow_the_map():
    module = v0_14_4.NeighborhoodAttention2D(8, 3, 2, dilation="auto")
    for size, dilation in (((9, 12), 3), ((4, 7), 1), ((2, 2), 1)):
        x = torch.randn(1, *size, 8)
        assert torch.allclose(module(x), by_hand(module, x, (3, 3), (dilation, dilation), 2), atol=1e-5)
    with pytest.warns(DeprecationWarning, match="NeighborhoodAttention2D"):
        assert isinstance(v0_14_4.NeighborhoodAttention(8, 3, 2), v0_14_4.NeighborhoodAttention2D)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_dilation_that_follows_the_map_is_traced():
    module = v0_14_4.NeighborhoodAttention2D(8, 3, 2, dilation="auto")
    x = torch.randn(1, 9, 7, 8)
    assert torch.allclose(torch.jit.trace(module, (x,))(x), module(x), atol=1e-6)
    assert module.dilation is None and module.window_size is None


@pytest.mark.parametrize("axes", [1, 2])
def test_up_to_0_15_window_and_dilation_are_ints(axes):
    name = f"NeighborhoodAttention{axes}D"
    x = torch.randn(1, *LETTERS[axes], 8)
    for module in (
        getattr(v0_14_4, name)(8, 3, 2, dilation=2),
        getattr(v0_14, name)(8, 2, 3, 2),
        getattr(v0_15, name)(8, 2, 3, 2),
    ):
        assert (module.kernel_size, module.dilation, module.window_size) == (3, 2, 6)
        module.dilation = 1
        assert torch.allclose(module(x), by_hand(module, x, (3,) * axes, (1,) * axes, axes), atol=1e-5)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), module(x), atol=1e-6)
    uneven = v0_14.NeighborhoodAttention2D(8, 2, (3, 5), 2)  # which NATTEN did not have
    assert (uneven.kernel_size, uneven.dilation, uneven.window_size) == ((3, 5), 2, (6, 10))


#: Keywords of the authors' detection and segmentation code, with what each era calls the bias.
NONE = {
    "0.14.4": (v0_14_4, {}),
    "0.14.6": (v0_14, {"bias": True}),
    "0.15.1": (v0_15, {"bias": True}),
    "0.17.5": (v0_17, {"rel_pos_bias": True, "is_causal": None}),
    "0.20.1": (v0_20, {"rel_pos_bias": True, "is_causal": None, "stride": None}),
    "0.21.7": (v0_21, {"rel_pos_bias": True, "is_causal": None, "stride": None}),
}


@pytest.mark.parametrize("version", NONE)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_none_is_the_default(version, axes):
    era, extra = NONE[version]
    if axes == 3 and era in (v0_14_4, v0_14):
        return  # three axes came with 0.15
    module = getattr(era, f"NeighborhoodAttention{axes}D")(
        dim=8, kernel_size=3, dilation=None, num_heads=2, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0,
        **extra,
    )  # fmt: skip
    x = torch.randn(1, *LETTERS[axes], 8)
    assert torch.allclose(module(x), by_hand(module, x, (3,) * axes, (1,) * axes, axes), atol=1e-5)


@pytest.mark.parametrize("era", [v0_14, v0_15, v0_17, v0_20, v0_21])
def test_numpy_ints(era):
    module = era.NeighborhoodAttention2D(8, 2, np.int64(3), dilation=np.int32(2))
    x = torch.randn(1, 7, 6, 8)
    assert torch.allclose(module(x), by_hand(module, x, (3, 3), (2, 2), 2), atol=1e-5)


@pytest.mark.parametrize("era", [v0_14, v0_17, v0_21])
def test_scale_can_be_set(era):
    module = era.NeighborhoodAttention1D(8, 2, 3)
    x = torch.randn(1, 9, 8)
    module.scale = 2.0
    assert module.scale == 2.0
    assert torch.allclose(module(x), by_hand(module, x, (3,), (1,), 1, 2.0), atol=1e-5)


def test_the_fourth_argument_is_the_dilation_in_0_17_and_the_stride_after():
    x = torch.randn(1, 8, 8, 8)
    before = v0_17.NeighborhoodAttention2D(8, 2, 3, 2)
    assert (before.dilation, before.stride) == ((2, 2), (1, 1))
    assert torch.allclose(before(x), by_hand(before, x, (3, 3), (2, 2), 2), atol=1e-5)
    for era in (v0_20, v0_21_1, v0_21):
        after = era.NeighborhoodAttention2D(8, 2, 3, 2)
        assert (after.dilation, after.stride) == ((1, 1), (2, 2))
        assert list(after.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
        q, k, v = after.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
        assert torch.allclose(after(x), after.proj(v0_21.na2d(q, k, v, 3, 2).flatten(-2)), atol=1e-5)


def test_bias_of_0_17_by_its_name_and_off_by_default():
    assert v0_17.NeighborhoodAttention1D(8, 2, 3).rpb is None
    module = v0_17.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True, qk_scale=0.2)
    x = torch.randn(1, 9, 8)
    assert module.scale == 0.2
    assert torch.allclose(module(x), by_hand(module, x, (3,), (1,), 1, 0.2), atol=1e-5)
    assert not torch.allclose(v0_17.NeighborhoodAttention1D(8, 2, 3, qk_scale=0.0)(x), module(x))


def test_attention_dropout_is_applied():
    module = v0_17.NeighborhoodAttention1D(8, 2, 3, attn_drop=1.0)
    x = torch.randn(1, 9, 8)
    assert torch.allclose(module(x), module.proj.bias.expand(1, 9, 8))
    module.eval()
    assert not torch.allclose(module(x), module.proj.bias.expand(1, 9, 8))


@pytest.mark.parametrize("era", [v0_17, v0_21])
def test_later_eras_refuse_small_maps_unless_padding_is_asked_for(era):
    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(ArgumentError, match=r"(?s)NeighborhoodAttention2D of .*X has 2, the window spans 3.*0.15"):
        era.NeighborhoodAttention2D(8, 2, 3)(x)
    module = era.NeighborhoodAttention2D(8, 2, 3, pad_small_inputs=True)
    assert torch.allclose(module(x), by_hand(module, x, (3, 3), (1, 1), 2), atol=1e-5)


def test_code_that_asks_for_a_context_gets_its_bias_in_the_newest_era():
    """Callers choose ``rel_pos_bias`` where natten has a context and ``bias`` where not."""
    keywords = dict(
        dim=8, kernel_size=3, dilation=1, num_heads=2, qkv_bias=True, qk_scale=None, attn_drop=0.1, proj_drop=0.0
    )
    for era in (v0_14, v0_15, v0_17, v0_20, v0_21):
        name = "rel_pos_bias" if hasattr(era, "context") else "bias"
        assert hasattr(era, "context") == (era not in (v0_14, v0_15))
        assert era.NeighborhoodAttention2D(**keywords, **{name: True}).rpb is not None


def test_generic_module():
    from nbhd.compat.natten.v0_21.modules import NeighborhoodAttentionGeneric

    module = NeighborhoodAttentionGeneric(3, 8, 2, (3, 3, 5), is_causal=(True, False, False))
    assert module(torch.randn(1, 4, 5, 6, 8)).shape == (1, 4, 5, 6, 8)
    assert isinstance(v0_21.NeighborhoodAttention2D(8, 2, 3), NeighborhoodAttentionGeneric)


WRONG = {
    "rank": (
        lambda m: m(torch.zeros(1, 5, 8)),
        r"\[batch, X, Y, 8\], channels last. It expected a rank-4 input tensor",
    ),
    "channels": (lambda m: m(torch.zeros(1, 5, 5, 6)), "Expected embedding dimension 8, got"),
    "kind": (lambda m: m([1]), "Got list"),
    "heads": (lambda m: v0_21.NeighborhoodAttention2D(8, 3, 3), "embed_dim must be a multiple of num_heads"),
    "stride": (lambda m: v0_21.NeighborhoodAttention2D(8, 2, 3, 4), "stride must be between 1 and kernel_size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises(ArgumentError, match=message):
        call(v0_21.NeighborhoodAttention2D(8, 2, 3))


def test_wrong_keywords_are_type_errors():
    for call in (
        lambda: v0_21.NeighborhoodAttention2D(8, 2),
        lambda: v0_21.NeighborhoodAttention2D(8, 2, 3, dim=8),
        lambda: v0_21.NeighborhoodAttention2D(8, 2, 3, bias=True),
        lambda: v0_17.NeighborhoodAttention2D(8, 2, 3, bias=True),
    ):
        with pytest.raises(TypeError):
            call()
