"""Query, key and value as parts of one tensor, and their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nbhd
from nbhd.errors import ArgumentError
from nbhd.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from nbhd.qkv import are_parts, split_qkv
from tests.marks import needs_library

HEADS, DIM = 2, 8
OPERATORS = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}


def by_views(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)


def projected(*spatial: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *spatial, 3 * HEADS * DIM, generator=generator, dtype=torch.float64).to(dtype)


def gradient(split: Callable, qkv: Tensor, use: Callable, heads: int = HEADS) -> tuple[Tensor, list[Tensor], Tensor]:
    """Of a projection ``qkv``, of its three parts, and the output."""
    projection = qkv.detach().requires_grad_() * 1
    parts = split(projection, heads)
    found: list[Tensor] = []
    whole: list[Tensor] = []
    projection.register_hook(whole.append)
    for part in parts:
        part.register_hook(found.append)
    out = use(*parts)
    out.backward(torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape))
    return whole[0], found, out


def test_parts_are_views() -> None:
    qkv = projected(5, 6)
    for ours, other in zip(split_qkv(qkv, HEADS), by_views(qkv, HEADS), strict=True):
        assert ours.data_ptr() == other.data_ptr() and ours.stride() == other.stride()
        assert torch.equal(ours, other)
    assert are_parts(*split_qkv(qkv, HEADS))


def test_what_parts_are() -> None:
    qkv, other = projected(5, 6), projected(5, 6)
    parts = split_qkv(qkv, HEADS)
    for order in itertools.product(range(3), repeat=3):
        assert are_parts(*(parts[i] for i in order)) == (order == (0, 1, 2))
    query, key, value = split_qkv(other, HEADS)
    for mixed in ((query, *parts[1:]), (parts[0], key, parts[2]), (*parts[:2], value)):
        assert not are_parts(*mixed)
    assert not are_parts(*(part.contiguous() for part in parts))
    assert not are_parts(*(part[..., :-1] for part in parts))
    assert not are_parts(*(part[..., :1, :] for part in parts))
    assert are_parts(*(part[:, 1:, ::2] for part in parts)) is False
    assert are_parts(*(part[:, 1:] for part in parts))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_library), "reference"])
def test_grouped_heads_are_parts_too(kv_heads: int, backend: str) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 6, (4 + 2 * kv_heads) * DIM)

    def by_slices(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        parts = qkv.split([heads * DIM for heads in (num_heads, kv_heads, kv_heads)], -1)
        return tuple(part.unflatten(-1, (-1, DIM)) for part in parts)

    def by_us(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        return split_qkv(qkv, num_heads, kv_heads)

    def use(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nbhd.na2d(query, key, value, 3, backend=backend)

    ours, parts, out = gradient(by_us, qkv, use, heads=4)
    other, _, same_out = gradient(by_slices, qkv, use, heads=4)
    assert torch.equal(out, same_out) and torch.equal(ours, other)
    assert are_parts(*parts) == (backend == "cpu")


@pytest.mark.parametrize("unused", range(3))
def test_a_part_of_grouped_heads_that_nobody_uses_has_no_gradient(unused: int) -> None:
    qkv = torch.randn(2, 5, 6, (4 + 2 * 2) * DIM, requires_grad=True)
    used = [part for i, part in enumerate(split_qkv(qkv, 4, 2)) if i != unused]
    torch.stack([part.sin().sum() for part in used]).sum().backward()
    expected = qkv.detach().cos()
    expected.split([4 * DIM, 2 * DIM, 2 * DIM], -1)[unused].zero_()
    assert torch.equal(qkv.grad, expected)


@pytest.mark.parametrize(("channels", "kv_heads"), [(47, 1), (56, 0), (56, -1)])
def test_grouped_heads_that_do_not_divide_are_refused(channels: int, kv_heads: int) -> None:
    with pytest.raises(ArgumentError, match=r"2 \* num_kv_heads\) \* dim channels.*num_kv_heads"):
        split_qkv(torch.randn(1, 4, channels), 4, kv_heads)


@pytest.mark.parametrize(("channels", "heads"), [(48, 5), (50, 2), (48, 0)])
def test_what_does_not_divide_is_refused(channels: int, heads: int) -> None:
    with pytest.raises(ArgumentError, match="3 \\* num_heads \\* dim channels"):
        split_qkv(torch.randn(1, 4, channels), heads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spatial", [(40,), (9, 20), (4, 5, 6)])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_library), "reference"])
def test_the_gradient_is_that_of_views(spatial: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    bias = torch.randn(HEADS, *(5 for _ in spatial), dtype=dtype)

    def use(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return OPERATORS[len(spatial)](query, key, value, 3, rel_pos_bias=bias, backend=backend)

    qkv = projected(*spatial, dtype=dtype)
    ours, parts, out = gradient(split_qkv, qkv, use)
    other, apart, same_out = gradient(by_views, qkv, use)
    assert torch.equal(out, same_out) and torch.equal(ours, other)
    for one, two in zip(parts, apart, strict=True):
        assert torch.equal(one, two)
    # what all of this is for: nothing was copied
    assert are_parts(*parts) == (backend == "cpu")
    assert (ours.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()) == (backend == "cpu")


USES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "query-twice": lambda q, k, v: nbhd.na2d(q, k, v, 3) + q,
    "other-order": lambda q, k, v: nbhd.na2d(v, k, q, 3),
    "one-for-two": lambda q, k, v: nbhd.na2d(q, k, k, 3) + v,
    "key-scaled": lambda q, k, v: nbhd.na2d(q, 2 * k, v, 3),
    "no-value": lambda q, k, v: q * k,
    "query-alone": lambda q, k, v: q.exp(),
    "two-calls": lambda q, k, v: nbhd.na2d(q, k, v, 3) + nbhd.na2d(q, k, v, 5),
    "part-of-the-batch": lambda q, k, v: nbhd.na2d(q[:1], k[:1], v[:1], 3),
    "rows": lambda q, k, v: nbhd.na2d(q[:, 1:], k[:, 1:], v[:, 1:], 3),
    "windows-and-pair": lambda q, k, v: nbhd.apply_attention_weights(nbhd.attention_weights(q, k, 3), v, 3),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gradients_that_are_not_parts_of_one_tensor(use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    qkv = projected(6, 7, dtype=torch.float64)
    ours, _, out = gradient(split_qkv, qkv, use)
    other, _, same_out = gradient(by_views, qkv, use)
    assert torch.equal(out, same_out)
    torch.testing.assert_close(ours, other, atol=1e-12, rtol=1e-12)


def test_no_gradient_is_asked_for() -> None:
    assert not any(part.requires_grad for part in split_qkv(projected(6, 7), HEADS))


@pytest.mark.parametrize("layout", ["columns-first", "some-channels"])
def test_projections_that_lie_otherwise(layout: str) -> None:
    qkv = projected(6, 7)
    if layout == "columns-first":
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        qkv = torch.cat([qkv, qkv[..., :5]], -1)[..., :-5]

    def use(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nbhd.na2d(query, key, value, 3)

    def of_a_leaf(split: Callable) -> Tensor:
        leaf = qkv.detach().requires_grad_()
        assert leaf.stride() == qkv.stride()
        use(*split(leaf, HEADS)).sin().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(of_a_leaf(split_qkv), of_a_leaf(by_views))


def test_hooks_may_change_a_gradient() -> None:
    def use(split: Callable) -> Tensor:
        qkv = projected(6, 7).requires_grad_()
        query, key, value = split(qkv, HEADS)
        key.register_hook(lambda found: 2 * found)
        value.retain_grad()
        nbhd.na2d(query, key, value, 3).sin().sum().backward()
        assert value.grad is not None and qkv.grad is not None
        value.grad.zero_()  # the hook's result is no part of the others' tensor: the whole was copied
        return qkv.grad

    torch.testing.assert_close(use(split_qkv), use(by_views))


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.flatten().view_as(t)], ids=["leaf", "view of a leaf"])
def test_a_kept_gradient_stays_as_it_is(view: Callable[[Tensor], Tensor]) -> None:
    """A leaf's gradient is added to in place, so it must share no memory with what a hook was given."""
    qkv, kept = projected(6, 7).requires_grad_(), []
    query, key, value = split_qkv(view(qkv), HEADS)
    query.register_hook(kept.append)
    nbhd.na2d(query, key, value, 3).sum().backward()
    before = kept[0].clone()
    nbhd.na2d(*split_qkv(view(qkv), HEADS), 3).sum().backward()
    assert torch.equal(kept[0], before)


def test_no_image_at_all() -> None:
    qkv = projected(6, 7, batch=0).requires_grad_()
    nbhd.na2d(*split_qkv(qkv, HEADS), 3).sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape
    layer = NeighborhoodAttention2D(HEADS * DIM, HEADS, 3)
    layer(torch.randn(0, 6, 7, HEADS * DIM)).sum().backward()
    assert layer.qkv.weight.grad is not None and not layer.qkv.weight.grad.any()


@needs_library
def test_one_gradient_alone_takes_no_more_room() -> None:
    query, key, value = split_qkv(projected(6, 7).requires_grad_() * 1, HEADS)
    (found,) = torch.autograd.grad(nbhd.na2d(query, key.detach(), value.detach(), 3).sum(), query)
    assert found.is_contiguous() and found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_the_same_gradient_each_time() -> None:
    qkv = projected(6, 7).requires_grad_()
    loss = nbhd.na2d(*split_qkv(qkv, HEADS), 3).sin().sum()
    first, second = (torch.autograd.grad(loss, qkv, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_gradients_of_gradients_and_transforms() -> None:
    qkv = projected(3, 4, dtype=torch.float64, batch=1).requires_grad_()

    def call(qkv: Tensor) -> Tensor:
        return nbhd.na2d(*split_qkv(qkv, HEADS), 3)

    assert torch.autograd.gradcheck(call, (qkv,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (qkv,))
    # whose own gradients are parts of one tensor, with a history each
    assert torch.autograd.gradgradcheck(lambda x: torch.stack(split_qkv(x, HEADS), -3).sin(), (qkv,))
    wanted = torch.autograd.grad(call(qkv).sin().sum(), qkv)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: call(x).sin().sum())(qkv.detach()), wanted)
    many = torch.stack([qkv.detach(), 2 * qkv.detach()])
    torch.testing.assert_close(torch.vmap(call)(many)[0], call(qkv).detach())
    tangent = torch.randn_like(qkv)
    along = torch.func.jvp(call, (qkv.detach(),), (tangent,))[1]
    torch.testing.assert_close(along.sum(), torch.autograd.grad(call(qkv).sum(), qkv)[0].mul(tangent).sum())


def test_compiles_as_views() -> None:
    module = NeighborhoodAttention2D(HEADS * DIM, HEADS, 3, rel_pos_bias=True)
    x = torch.randn(2, 6, 7, HEADS * DIM)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(module(x).sin().sum(), list(module.parameters()))
    found = torch.autograd.grad(compiled(x).sin().sum(), list(module.parameters()))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)


@needs_library
@pytest.mark.parametrize(
    ("layer", "spatial"),
    [(NeighborhoodAttention1D, (40,)), (NeighborhoodAttention2D, (9, 20)), (NeighborhoodAttention3D, (4, 5, 6))],
)
def test_layers_copy_no_gradient(
    layer: type[nn.Module], spatial: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer(HEADS * DIM, HEADS, 3)  # type: ignore[call-arg]

    def copy(*_: object) -> Tensor:
        raise AssertionError("the gradients were copied into one tensor")

    monkeypatch.setattr(torch, "stack", copy)
    module(torch.randn(2, *spatial, HEADS * DIM)).sum().backward()
    assert module.qkv.weight.grad.abs().sum() > 0  # type: ignore[union-attr, operator]
