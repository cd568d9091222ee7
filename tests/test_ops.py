"""The operator as PyTorch's machinery meets it: opcheck, compile, export, transforms, both modes of differentiation."""

from __future__ import annotations

import contextlib
import itertools
import warnings

import functorch.compile
import pytest
import torch
import torch._dynamo.testing
import torch.fx.experimental.proxy_tensor
import torch.utils.checkpoint
from torch import Tensor

import nbhd
from nbhd.functional import attention_scores
from tests.cases import NAMED

OPERATORS = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}
SETTINGS = ["1d-causal-stride-dilation-bias", "2d-not-square", "2d-wide-value", "2d-grouped-heads", "3d-causal-time"]


def arguments(name: str, dtype: torch.dtype = torch.float64, requires_grad: bool = True):
    case = NAMED[name]
    tensors = {n: t.requires_grad_(requires_grad) for n, t in case.tensors(dtype).items()}
    return case, tensors["query"], tensors["key"], tensors["value"], tensors.get("rel_pos_bias")


@pytest.mark.parametrize(
    ("name", "backend"),
    [("1d-causal-stride-dilation-bias", "auto"), ("2d-minimum", "auto"), ("2d-minimum", "reference"), ("3d", "auto")],
)
def test_opcheck(name, backend):
    case, query, key, value, bias = arguments(name)
    options = (*case.geometry, 0.5, backend)
    ops = torch.ops.nbhd
    out, lse = ops.na_forward(query, key, value, bias, *options)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    scores = ops.scores(query, key, bias, *options)
    weights = torch.softmax(scores, -1).detach().requires_grad_()
    no_scale = (*case.geometry, backend)
    calls = [
        (ops.na_forward.default, (query, key, value, bias, *options)),
        (ops.na_backward.default, (d_out, d_lse, query, key, value, bias, out.detach(), lse.detach(), *options)),
        (ops.scores.default, (query, key, bias, *options)),
        (ops.scores_backward.default, (torch.randn_like(scores), query, key, bias, *options)),
        (ops.weighted_sum.default, (weights, value, *no_scale)),
        (ops.weighted_sum_backward.default, (d_out, weights, value, *no_scale)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", SETTINGS)
def test_fakes_promise_what_comes(name):
    """Shape, dtype and strides of every op, with tensors that are not contiguous and a bias of another dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    case, query, key, value, bias = arguments(name, torch.float32, requires_grad=False)
    query = query.transpose(1, -2).contiguous().transpose(1, -2)
    bias = None if bias is None else bias.double()
    options = (*case.geometry, 0.5, "auto")
    real = [query, key, value, bias]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [None if t is None else mode.from_tensor(t) for t in real]

    def everything(query, key, value, bias):
        out, lse = torch.ops.nbhd.na_forward(query, key, value, bias, *options)
        gradients = torch.ops.nbhd.na_backward(out, None, query, key, value, bias, out, lse, *options)
        scores = torch.ops.nbhd.scores(query, key, bias, *options)
        return [out, lse, *gradients, scores, *torch.ops.nbhd.scores_backward(scores, query, key, bias, *options)]

    expected = everything(*real)
    with mode:
        promised = everything(*fake)
    for one, other in zip(promised, expected, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


class Layer(torch.nn.Module):
    def __init__(self, kernel_size: int = 3, dilation: int = 1) -> None:
        super().__init__()
        self.rpb = torch.nn.Parameter(torch.randn(2, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.kernel_size, self.dilation = kernel_size, dilation

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options = (self.kernel_size, 1, self.dilation)
        out, lse = nbhd.na2d(query, key, value, *options, rel_pos_bias=self.rpb, return_lse=True)
        weights = nbhd.attention_weights(query, key, *options, rel_pos_bias=self.rpb)
        return out, lse, nbhd.apply_attention_weights(weights, value, *options)


def maps(x: int, y: int, batch: int = 1) -> tuple[Tensor, ...]:
    torch.manual_seed(x * 100 + y)
    return tuple(torch.randn(batch, x, y, 2, 4, requires_grad=True) for _ in range(3))


def test_compiles_without_graph_breaks_and_recompiles_at_most_once_for_new_map_sizes():
    torch._dynamo.reset()
    layer = Layer()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for x, y in ((5, 6), (7, 6), (9, 11), (8, 13), (20, 3)):
        inputs = maps(x, y)
        for one, other in zip(compiled(*inputs), layer(*inputs), strict=True):
            torch.testing.assert_close(one, other)
        gradients = torch.autograd.grad(sum(t.sum() for t in compiled(*inputs)), (*inputs, layer.rpb))
        expected = torch.autograd.grad(sum(t.sum() for t in layer(*inputs)), (*inputs, layer.rpb))
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other)
    # One graph for the first size, one with symbols for the rest (a second where a length changes alone first).
    assert counter.frame_count <= 3


def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = Layer()
    inputs = maps(6, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the compiler says of this machine
        compiled = torch.compile(layer, fullgraph=True)(*inputs)
    for one, other in zip(compiled, layer(*inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_a_wrong_call_inside_a_compiled_function_still_says_why():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: nbhd.na2d(q, q, q, 9), backend="eager")
    with pytest.raises(Exception, match="axis X has 5 positions, but kernel_size 9"):
        compiled(torch.zeros(1, 5, 12, 1, 4))


def test_exports_with_every_length_dynamic():
    batch, x, y = (torch.export.Dim(n, min=m) for n, m in (("batch", 1), ("x", 6), ("y", 6)))
    shape = {0: batch, 1: x, 2: y}
    layer = Layer(dilation=2)
    with torch.no_grad():
        program = torch.export.export(layer, maps(7, 8, 2), dynamic_shapes=(shape, shape, shape))
        for size in ((6, 6, 1), (13, 9, 3)):
            inputs = maps(*size)
            for one, other in zip(program.module()(*inputs), layer(*inputs), strict=True):
                torch.testing.assert_close(one, other)


def test_traced_with_symbols_for_lengths():
    """By make_fx and by functorch's compiler, where nothing says that a compiler is at work."""

    def run(query, key, value):
        weights = nbhd.attention_weights(query, key, 3, dilation=2)
        return nbhd.na2d(query, key, value, 3), nbhd.apply_attention_weights(weights, value, 3, dilation=2)

    def tensors(side):
        return [torch.randn(2, side, side + 1, 2, 4, dtype=torch.float64) for _ in range(3)]

    graph = torch.fx.experimental.proxy_tensor.make_fx(run, tracing_mode="symbolic")(*tensors(7))
    compiled = functorch.compile.aot_function(run, functorch.compile.nop, dynamic=True)
    for given in (tensors(7), tensors(10)):
        expected = run(*given)
        torch.testing.assert_close(graph(*given), expected)
        leaves = [t.clone().requires_grad_() for t in given]
        made = compiled(*leaves)
        torch.testing.assert_close(made, expected)
        ours = torch.autograd.grad(made[0].sin().sum(), leaves)
        torch.testing.assert_close(ours, torch.autograd.grad(run(*leaves)[0].sin().sum(), leaves))


def test_torch_func_transforms():
    """vmap, grad, jacobians both ways and a Hessian, each against plain autograd or a loop."""
    case, query, key, value, bias = arguments("2d-minimum", requires_grad=False)

    def loss(query, key, value, bias):
        out, lse = nbhd.na2d(query, key, value, *case.geometry, rel_pos_bias=bias, return_lse=True)
        return out.square().sum() + lse.sum()

    inputs = [t.clone().requires_grad_() for t in (query, key, value, bias)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for one, other in zip(torch.func.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, bias), expected, strict=True):
        torch.testing.assert_close(one, other)

    stack = torch.stack([query, query * 2, -query])
    mapped = torch.vmap(lambda q: nbhd.na2d(q, key, value, *case.geometry, rel_pos_bias=bias))(stack)
    for one, q in zip(mapped, stack, strict=True):
        torch.testing.assert_close(one, nbhd.na2d(q, key, value, *case.geometry, rel_pos_bias=bias))

    def out(query):
        return nbhd.na2d(query, key, value, *case.geometry, rel_pos_bias=bias)

    torch.testing.assert_close(torch.func.jacrev(out)(query), torch.func.jacfwd(out)(query))

    def of_key(key):
        return loss(query, key, value, bias)

    torch.testing.assert_close(
        torch.func.hessian(of_key)(key), torch.autograd.functional.hessian(of_key, key, vectorize=False)
    )
    per_sample = torch.vmap(torch.func.grad(lambda q: out(q).sum()))(stack)
    for one, q in zip(per_sample, stack, strict=True):
        torch.testing.assert_close(one, torch.func.grad(lambda q: out(q).sum())(q))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_mode_differentiation(compiled):
    _case, query, key, value, _ = arguments("1d", requires_grad=False)
    tangent = torch.randn_like(key)
    torch._dynamo.reset()
    attend = torch.compile(nbhd.na1d, backend="eager") if compiled else nbhd.na1d
    attend(query, key, value, 3)  # and a graph of it is there
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(key, tangent)
        derivative = torch.autograd.forward_ad.unpack_dual(attend(query, dual, value, 3)).tangent
    step = 1e-6
    numeric = (nbhd.na1d(query, key + step * tangent, value, 3) - nbhd.na1d(query, key - step * tangent, value, 3)) / (
        2 * step
    )
    torch.testing.assert_close(derivative, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["fused", "lse", "scores", "sum", "layer"])
@pytest.mark.parametrize("outside", [True, False])
def test_forward_mode_through_the_backward(name, outside):
    """What comes after the attention is dual: the gradients have tangents, linear in those of their own gradient."""
    case, query, key, value, bias = arguments("2d-not-square")
    leaves = [t for t in (query, key, value, bias) if t is not None]
    geometry = case.geometry
    projected = torch.stack([query, key, value], -3).detach().flatten(-3).requires_grad_()

    def forward():
        if name in ("fused", "lse"):
            return nbhd.na2d(query, key, value, *geometry, rel_pos_bias=bias, return_lse=True)[name == "lse"]
        if name == "layer":
            return nbhd.na2d(*nbhd.split_qkv(projected, query.shape[-2]), *geometry)
        scores = attention_scores(query, key, *geometry, rel_pos_bias=bias)
        return scores if name == "scores" else nbhd.apply_attention_weights(scores, value, *geometry)

    wanted = [projected] if name == "layer" else leaves
    factor, tangent = torch.randn(2, *forward().shape, dtype=torch.float64)

    def gradients(out, weight):
        found = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
        return [g for g in found if g is not None]

    expected = gradients(forward(), tangent)
    before = forward() if outside else None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(factor, tangent)
        found = gradients(forward() if before is None else before, dual)
        unpacked = [torch.autograd.forward_ad.unpack_dual(g) for g in found]
    assert len(expected) == len(found) > 0
    for (primal, along), one, other in zip(unpacked, expected, gradients(forward(), factor), strict=True):
        torch.testing.assert_close(primal, other)
        torch.testing.assert_close(along, one)


def test_batches_of_gradients():
    """``is_grads_batched``, which jacobian and hessian take with ``vectorize``, of either result."""
    case, query, key, value, bias = arguments("2d-not-square")
    inputs = (query, key, value, bias)
    for which in (0, 1):
        result = nbhd.na2d(query, key, value, *case.geometry, rel_pos_bias=bias, return_lse=True)[which]
        batch = torch.randn(3, *result.shape, dtype=result.dtype)
        wanted = [torch.autograd.grad(result, inputs, g, retain_graph=True, allow_unused=True) for g in batch]
        found = torch.autograd.grad(result, inputs, batch, is_grads_batched=True, allow_unused=True)
        for each, one_by_one in zip(found, zip(*wanted, strict=True), strict=True):
            torch.testing.assert_close(each, torch.stack(one_by_one))
    small = query[:, :3, :4].detach().requires_grad_()

    def of_query(q):
        return nbhd.na2d(q, small, small, 3).sum(-1)

    jacobian = torch.autograd.functional.jacobian(of_query, small, vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(of_query, small))


def negated(tensor: Tensor) -> Tensor:
    """The same numbers as a view of their opposites, as of ``x.conj().imag``."""
    view = torch._neg_view(-tensor.detach())
    assert view.is_neg() and view.data_ptr() != tensor.data_ptr()
    return view


def nowhere_aligned(tensor: Tensor) -> Tensor:
    """The same numbers one byte further, as memory-mapped files have them."""
    raw = bytearray(tensor.numel() * tensor.element_size() + 1)
    copy = torch.frombuffer(raw, dtype=tensor.dtype, offset=1).view(tensor.shape)
    assert copy.data_ptr() % tensor.element_size()
    return copy.copy_(tensor.detach())


@pytest.mark.parametrize("view", [negated, nowhere_aligned])
def test_tensors_whose_memory_is_not_what_they_are(view):
    case, query, key, value, bias = arguments("2d-not-square", torch.float32)
    plain = (query, key, value, bias)
    odd = [view(t).requires_grad_() for t in plain]
    results = [
        nbhd.na2d(q, k, v, *case.geometry, rel_pos_bias=b, return_lse=True) for q, k, v, b in (plain, odd, plain)
    ]
    d_out, d_lse = (torch.randn_like(t) for t in results[0])
    expected = torch.autograd.grad(results[0], plain, (d_out, d_lse))
    found = torch.autograd.grad(results[1], odd, (view(d_out), view(d_lse)))
    also = torch.autograd.grad(results[2], plain, (view(d_out), view(d_lse)))  # odd gradients alone
    for one, other, third in zip(expected, found, also, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)
        torch.testing.assert_close(third, one, rtol=0, atol=0)
    weights = nbhd.attention_weights(query, key, *case.geometry)
    torch.testing.assert_close(nbhd.attention_weights(view(query), view(key), *case.geometry), weights)
    torch.testing.assert_close(
        nbhd.apply_attention_weights(view(weights), view(value), *case.geometry),
        nbhd.apply_attention_weights(weights, value, *case.geometry),
    )


def test_a_default_device_does_not_take_the_short_way_from_a_call():
    case, query, key, value, bias = arguments("2d-not-square", torch.float32)
    given = (query, key, value, bias)

    def call() -> list[Tensor]:
        out = nbhd.na2d(query, key, value, *case.geometry, rel_pos_bias=bias)
        return [out, *torch.autograd.grad(out.sin().sum(), given)]

    class Forward(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    wanted, odd = call(), nowhere_aligned(query)
    nbhd.functional._calls.clear()
    with torch.device("meta"):  # what torch.set_default_device leaves on the stack
        assert not nbhd.ops.is_watched(*given)
        found = call()
        assert len(nbhd.functional._calls) == 1
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
        with Forward():
            assert nbhd.ops.is_watched(*given)
        assert torch.equal(nbhd.na2d(odd, key, value, *case.geometry, rel_pos_bias=bias), wanted[0])


def test_zeros_that_have_no_memory():
    case, query, key, value, _ = arguments("2d-not-square", torch.float32)
    zeros = torch._efficientzerotensor(value.shape)
    assert zeros._is_zerotensor()
    assert nbhd.na2d(query, key, zeros, *case.geometry).abs().sum() == 0
    out = nbhd.na2d(query, key, value, *case.geometry)
    assert torch.autograd.grad(out, value, torch._efficientzerotensor(out.shape))[0].abs().sum() == 0


def test_only_the_log_sum_exp_in_use():
    case, query, key, value, bias = arguments("2d-not-square")
    _, lse = nbhd.na2d(query, key, value, *case.geometry, rel_pos_bias=bias, return_lse=True)
    d_query, d_key, d_bias = torch.autograd.grad(lse.sum(), (query, key, bias))
    torch.testing.assert_close(d_bias.sum((1, 2)), torch.full((2,), 40.0, dtype=torch.float64))  # 5 x 8 queries
    assert d_query.abs().sum() > 0 and d_key.abs().sum() > 0


def columns_first(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim < 4 else tensor.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t),
        (columns_first, lambda t: t),
        (lambda t: (t.double(), t.dtype), lambda kept: kept[0].to(kept[1])),
        (lambda t: t.numpy().tobytes(), None),
    ],
    ids=["dense", "columns-first", "double", "bytes"],
)
@pytest.mark.parametrize("layout", ["one-tensor", "heads-first"])
def test_what_autograd_keeps_may_come_back_laid_out_otherwise(pack, unpack, layout):
    """As with hooks that compress what is kept, or move it elsewhere for the time being."""
    case, query, key, value, bias = arguments("2d-not-square", torch.float32)
    given = torch.stack([query.detach(), key.detach(), value.detach()], -3 if layout == "one-tensor" else 1)
    given.requires_grad_()

    def call() -> Tensor:
        q, k, v = given.unbind(-3 if layout == "one-tensor" else 1)
        return nbhd.na2d(q, k, v, *case.geometry, rel_pos_bias=bias).sin().sum()

    def of_bytes(kept):
        raw, shape, dtype = kept
        return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)

    expected = torch.autograd.grad(call(), (given, bias))
    pack, unpack = (pack, unpack) if unpack else (lambda t: (t.numpy().tobytes(), t.shape, t.dtype), of_bytes)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t.detach()), unpack):
        loss = call()
    for one, other in zip(torch.autograd.grad(loss, (given, bias)), expected, strict=True):
        torch.testing.assert_close(one, other)


CHANGES = {
    "bfloat16": lambda t: t.bfloat16(),
    "double": lambda t: t.double(),
    "half-the-map": lambda t: t[:, : t.shape[1] // 2],
    "one-channel": lambda t: t[..., :1],
    "one-head": lambda t: t[..., :1, :],
}
KEPT = {  # the function, and how many tensors it keeps
    "fused": (lambda q, k, v, b: nbhd.na2d(q, k, v, 3, rel_pos_bias=b), 6),
    "scores": (lambda q, k, v, b: attention_scores(q, k, 3, rel_pos_bias=b), 3),
    "sum": (lambda q, k, v, b: nbhd.apply_attention_weights(q[..., :9], v, 3), 2),
}


@pytest.mark.parametrize("through_op", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", KEPT)
def test_what_autograd_keeps_must_not_come_back_as_something_else(name, change, through_op):
    """Each tensor in turn: an error, or the right gradients where what has changed does not matter."""
    call, count = KEPT[name]

    def loss(hooked: int) -> Tensor:
        number = itertools.count()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: change(t.detach()) if next(number) == hooked else t, lambda t: t
        ):
            watch = torch.profiler.profile() if through_op else contextlib.nullcontext()
            with watch:
                out = call(*given)
        assert next(number) >= count
        return out.sum()

    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 8, 8, 2, 16)] * 3 + [(2, 5, 5)]
    given = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    expected = torch.autograd.grad(loss(-1), given, allow_unused=True)
    refused = 0
    for hooked in range(count):
        result = loss(hooked)
        try:
            found = torch.autograd.grad(result, given, allow_unused=True)
        except RuntimeError as error:
            assert "autograd keeps" in str(error) or "invalid gradient" in str(error)  # ours, or PyTorch's own check
            refused += 1
            continue
        for one, other in zip(found, expected, strict=True):
            if one is not None:
                torch.testing.assert_close(one, other, atol=0.1, rtol=0.05)  # a bias, or lse, may be rounded
    assert refused >= min(2, count - 1)


def test_activation_checkpointing_and_deepcopy():
    layer = nbhd.nn.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(2, 5, 6, 8, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    saved = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(saved.sum(), x)[0], plain)
