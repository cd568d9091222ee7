"""The modules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

import nbhd
from nbhd.errors import ArgumentError
from nbhd.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
OPERATORS = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}


def by_hand(module, x):
    """The same layer written out: heads split in the order query, key, value."""
    batch, *spatial, channels = x.shape
    qkv = functional.linear(x, module.qkv.weight, module.qkv.bias)
    dim = channels // module.num_heads
    widths = [heads * dim for heads in (module.num_heads, module.num_kv_heads, module.num_kv_heads)]
    query, key, value = (part.reshape(batch, *spatial, -1, dim) for part in qkv.split(widths, -1))
    out = OPERATORS[len(spatial)](
        query, key, value, module.kernel_size, module.stride, module.dilation, module.is_causal, module.qk_scale,
        rel_pos_bias=module.rpb, backend="reference",
    )  # fmt: skip
    return module.proj(out.reshape(x.shape))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_projects_attends_projects(axes, rel_pos_bias):
    torch.manual_seed(0)
    module = MODULES[axes](
        12, 3, 3, stride=2, dilation=(2, 1, 1)[:axes], is_causal=(False, True, False)[:axes],
        rel_pos_bias=rel_pos_bias, qk_scale=0.7,
    )  # fmt: skip
    x = torch.randn(2, *(7, 5, 4)[:axes], 12)
    torch.testing.assert_close(module(x), by_hand(module, x))
    expected = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"} | ({"rpb"} if rel_pos_bias else set())
    assert set(module.state_dict()) == expected


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_heads(num_kv_heads):
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(24, 4, 3, rel_pos_bias=True, num_kv_heads=num_kv_heads)
    assert module.qkv.weight.shape == (24 + 2 * num_kv_heads * 6, 24)
    x = torch.randn(2, 5, 6, 24)
    ours = torch.autograd.grad(module(x).sin().sum(), [*module.parameters()])
    theirs = torch.autograd.grad(by_hand(module, x).sin().sum(), [*module.parameters()])
    torch.testing.assert_close(ours, theirs)
    module.attn_drop.p = 1e-9
    torch.testing.assert_close(module.train()(x), by_hand(module, x))


@pytest.mark.parametrize("num_kv_heads", [0, -1, 3, 8, 1.5, True, "2"])
def test_heads_that_cannot_be_shared_are_refused(num_kv_heads):
    with pytest.raises(ArgumentError, match="num_kv_heads must be a divisor of num_heads"):
        NeighborhoodAttention2D(24, 4, 3, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(("spatial", "padded"), [((2, 9), (6, 9)), ((8, 1), (8, 4)), ((1, 1), (6, 4))])
def test_a_map_smaller_than_the_window_is_padded_with_zeros_and_cropped(spatial, padded):
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(8, 2, (3, 4), dilation=(2, 1), rel_pos_bias=True)
    x = torch.randn(2, *spatial, 8)
    larger = torch.zeros(2, *padded, 8)
    larger[:, : spatial[0], : spatial[1]] = x
    torch.testing.assert_close(module(x), by_hand(module, larger)[:, : spatial[0], : spatial[1]])


def test_dropouts_are_active_in_training_only():
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5, proj_drop=0.0, rel_pos_bias=True)
    x = torch.randn(1, 6, 6, 8)
    torch.testing.assert_close(module.eval()(x), by_hand(module, x))
    module.train()
    first, second = module(x), module(x)
    assert not torch.allclose(first, second)
    # Dropout on the probabilities is unbiased: the mean over many draws comes to the output without it.
    mean = torch.stack([module(x) for _ in range(400)]).mean(0)
    assert (mean - by_hand(module, x)).abs().mean() < 0.05 * (first - by_hand(module, x)).abs().mean() * 2
    module = NeighborhoodAttention2D(8, 2, 3, proj_drop=1.0).train()
    assert not module(x).any()


def test_every_parameter_learns():
    module = NeighborhoodAttention3D(8, 2, 2, rel_pos_bias=True, attn_drop=0.1)
    module(torch.randn(1, 3, 3, 3, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_bias_table_is_drawn_as_published():
    module = NeighborhoodAttention2D(256, 64, 7, rel_pos_bias=True)
    assert module.rpb is not None
    assert abs(module.rpb.std().item() - 0.02) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(embed_dim=10, num_heads=4, kernel_size=3), "embed_dim must be a multiple of num_heads"),
        (dict(embed_dim=8, num_heads=2, kernel_size=(3, 3, 3)), "kernel_size must be one value or 2"),
        (dict(embed_dim=8, num_heads=2, kernel_size=0), "kernel_size must be at least 1"),
        (dict(embed_dim=8, num_heads=2, kernel_size=3, stride=4), "stride must be between 1 and kernel_size"),
        (dict(embed_dim=8, num_heads=2, kernel_size=3, attn_drop=1.5), "attn_drop must be a probability"),
        (dict(embed_dim=8, num_heads=2, kernel_size=3, is_causal=2), "is_causal must be a bool"),
        (dict(embed_dim=8, num_heads=2, kernel_size="3"), "kernel_size must be"),
        (dict(embed_dim=8, num_heads=2, kernel_size=True), "kernel_size must be an int or one per axis, got True"),
        (dict(embed_dim=8, num_heads=2, kernel_size=3.0), "kernel_size must be an int or one per axis, got 3.0"),
    ],
)
def test_wrong_parameters_are_refused_when_built(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        NeighborhoodAttention2D(**arguments)


@pytest.mark.parametrize("given", [np.int64(3), (np.int32(3), 3), [3, np.uint8(3)]])
@pytest.mark.parametrize("name", ["kernel_size", "stride", "dilation"])
def test_numpy_ints_are_ints(name, given):
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(8, 2, **{"kernel_size": 3, name: given}, is_causal=np.True_)
    assert getattr(module, name) == (3, 3)
    assert all(type(entry) is int for entry in getattr(module, name))
    x = torch.randn(1, 9, 10, 8)
    torch.testing.assert_close(module(x), by_hand(module, x))


def test_a_wrong_input_is_named():
    with pytest.raises(ArgumentError, match=r"input must be \[batch, X, Y, 8\], got \(1, 8, 6, 6\)"):
        NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 8, 6, 6))


def test_copies_saves_and_builds_on_meta():
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    twin = copy.deepcopy(module)
    x = torch.randn(1, 5, 5, 8)
    assert torch.equal(module(x), twin(x))
    with torch.device("meta"):
        empty = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(module(x), empty(x))
    assert "kernel_size=(3, 3)" in repr(module)
