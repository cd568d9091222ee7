"""Layers in one call of the native core: values and gradients against float64; who gets PyTorch's layers instead."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nbhd.backends import cpu, cpu_linear
from nbhd.backends.cpu_linear import DTYPES, Layer, Norm
from nbhd.errors import BackendError
from nbhd.nn import joined
from nbhd.nn.joined import join, may_join

pytestmark = pytest.mark.skipif(cpu.why_unusable() is not None, reason=f"no native core: {cpu.why_unusable()}")


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every machine gained by it."""
    monkeypatch.setattr(joined, "joined_layers_are_faster", lambda dtype, with_gradients: dtype in DTYPES)


class Case:
    """Random layers of some widths; without ``hidden`` up to three of the same input."""

    def __init__(
        self, rows: int, features: int, last: tuple[int, ...], hidden: int = 0, norm: bool = True, bias: bool = True,
        residual: str = "none", factor: float = 1.0,
    ) -> None:  # fmt: skip
        torch.manual_seed(rows + features)
        self.features, self.hidden, self.norm, self.factor, self.residual = features, hidden, norm, factor, residual

        def layer(out: int, width: int) -> list[Tensor | None]:
            return [torch.randn(out, width) / width**0.5, torch.randn(out) if bias else None]

        self.batch = torch.randn(rows, features) * 2 + 0.5
        self.tensors: list[Tensor | None] = [self.batch, torch.randn(rows, last[0]) if residual == "other" else None]
        self.tensors += [torch.randn(features), torch.randn(features)] if norm else [None, None]
        self.tensors += layer(hidden, features) if hidden else [None, None]
        for out in last:
            self.tensors += layer(out, hidden or features)
        self.d_outputs = [torch.randn(rows, out) for out in last]

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        return [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in self.tensors]

    def joined(self, tensors: list[Any]) -> tuple[Tensor, ...]:
        batch, residual, norm_weight, norm_bias, hidden_weight, hidden_bias, *last = tensors
        options: dict[str, Any] = {"factor": self.factor}
        if self.residual != "none":
            options["residual"] = batch if self.residual == "input" else residual
        outputs = join(
            batch, [Layer(None, *pair) for pair in zip(last[::2], last[1::2], strict=True)],
            hidden=Layer(None, hidden_weight, hidden_bias) if self.hidden else None,
            norm=Norm(norm_weight, norm_bias, 1e-5) if self.norm else None, **options,
        )  # fmt: skip
        assert outputs is not None
        return outputs

    def by_pytorch(self, tensors: list[Any]) -> list[Tensor]:
        batch, residual, norm_weight, norm_bias, hidden_weight, hidden_bias, *last = tensors
        x = functional.layer_norm(batch, (self.features,), norm_weight, norm_bias, 1e-5) if self.norm else batch
        if self.hidden:
            x = functional.gelu(functional.linear(x, hidden_weight, hidden_bias))
        outputs = [self.factor * functional.linear(x, *pair) for pair in zip(last[::2], last[1::2], strict=True)]
        added = {"none": None, "input": batch, "other": residual}[self.residual]
        return outputs if added is None else [output + added for output in outputs]

    def results(self, run: Callable, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Outputs and gradients."""
        leaves = self.leaves(dtype)
        outputs = list(run(leaves))
        present = [t for t in leaves if t is not None]
        found = torch.autograd.grad(outputs, present, [d.to(dtype) for d in self.d_outputs])
        return [*(output.detach() for output in outputs), *found]


CASES = {
    "mlp of NAT": Case(1568, 64, (64,), hidden=192, residual="input"),
    "mlp that is dropped at times": Case(392, 128, (128,), hidden=384, residual="input", factor=1.25),
    "query, key and value": Case(784, 64, (64, 64, 64)),
    "projection": Case(500, 96, (96,), norm=False, residual="other", factor=1.5),
    "without biases": Case(300, 40, (40, 40, 40), bias=False),
    "no multiple of anything": Case(131, 77, (35,), hidden=301),
    "many rows": Case(20_000, 20, (50,), hidden=36),
    "wide rows": Case(40, 1024, (1024,), norm=False),
    "rows in each other's way": Case(40, 2048, (64,), norm=False),
    "no norm": Case(64, 48, (33,), hidden=65, norm=False),
}


def rounded(case: Case, batch: torch.dtype, parameters: torch.dtype) -> Case:
    """The same of numbers that these types have; ``batch`` is that of the residual and of gradients of outputs too."""
    made = copy.copy(case)
    made.tensors = [
        None if t is None else t.to(batch if i < 2 else parameters).float() for i, t in enumerate(case.tensors)
    ]
    made.d_outputs = [t.to(batch).float() for t in case.d_outputs]
    return made


def compare(ours: list[Tensor], case: Case, times: float = 2) -> None:
    """Root mean square errors at most twice PyTorch's in the same dtype, or so small that they say nothing."""
    truth, theirs = case.results(case.by_pytorch, torch.float64), case.results(case.by_pytorch)
    for i, (found, exact, other) in enumerate(zip(ours, truth, theirs, strict=True)):
        size = exact.square().mean().sqrt()
        error, expected = ((x.double() - exact).square().mean().sqrt() / size for x in (found, other))
        assert error <= max(times * expected, 2e-7), (i, float(error), float(expected))


@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_pytorch_and_the_same_bits_with_any_threads(name: str) -> None:
    case, before, found = CASES[name], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(case.results(case.joined))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    compare(found[0], case)
    with torch.no_grad():  # nothing is kept, and the values are the same
        leaves = case.leaves()
        assert all(map(torch.equal, case.joined(leaves), found[0]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_exact_as_pytorch(name: str, dtype: torch.dtype) -> None:
    case = rounded(CASES[name], dtype, dtype)
    found = case.results(case.joined, dtype)
    assert {tensor.dtype for tensor in found} == {dtype}
    truth, theirs = case.results(case.by_pytorch, torch.float64), case.results(case.by_pytorch, dtype)
    for i, (ours, exact, other) in enumerate(zip(found, truth, theirs, strict=True)):
        error, expected = ((x.double() - exact).square().mean().sqrt() for x in (ours, other))
        assert error <= 1.05 * expected, (i, float(error), float(expected))  # not twice: what is between is not rounded
    with torch.no_grad():
        assert all(map(torch.equal, case.joined(case.leaves(dtype)), found))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("dtype", "batch"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16,) * 2],
    ids=str,
)
def test_under_autocast(name: str, dtype: torch.dtype, batch: torch.dtype) -> None:
    """Parameters of float32, and outputs of the input's dtype; PyTorch's are of autocast's, whatever they are of."""
    case = rounded(CASES[name], batch, torch.float32)

    def results(run: Callable, backward_too: bool = False) -> list[Tensor]:
        leaves = case.leaves()
        leaves[:2] = [None if t is None else t.detach().to(batch).requires_grad_() for t in leaves[:2]]
        present = [t for t in leaves if t is not None]
        with torch.autocast("cpu", dtype):
            if run == case.joined:
                assert may_join(leaves[0])  # type: ignore[arg-type]
            outputs = list(run(leaves))
            if backward_too:
                gradients = [g.to(o.dtype) for g, o in zip(case.d_outputs, outputs, strict=True)]
                return [*outputs, *torch.autograd.grad(outputs, present, gradients, create_graph=True)]
        gradients = [g.to(o.dtype) for g, o in zip(case.d_outputs, outputs, strict=True)]
        return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, present, gradients)]

    truth, theirs, found = case.results(case.by_pytorch, torch.float64), results(case.by_pytorch), results(case.joined)
    n = len(case.d_outputs)
    assert {output.dtype for output in found[:n]} == {batch}
    assert [tensor.dtype for tensor in found[n:]] == [tensor.dtype for tensor in theirs[n:]]
    for i, (ours, exact, other) in enumerate(zip(found, truth, theirs, strict=True)):
        error, expected = ((x.double() - exact).square().mean().sqrt() for x in (ours, other))
        assert error <= 1.05 * expected, (i, float(error), float(expected))
    # by PyTorch's operators, which autocast must not reach there
    for ours, again in zip(found, results(case.joined, backward_too=True), strict=True):
        torch.testing.assert_close(ours, again, rtol=2e-2, atol=float(ours.abs().max()) * 1e-2)


def test_dtypes_that_do_not_fit_are_left_to_pytorch() -> None:
    case, layers = CASES["no norm"], {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors: list[Any] = [None if t is None else t.to(dtype) for t in case.tensors]
        layers[dtype] = tensors[0], Layer(None, *tensors[4:6]), Layer(None, *tensors[6:8])
    wide, half = layers[torch.float32], layers[torch.bfloat16]
    assert join(half[0], half[2:], hidden=half[1]) is not None
    for batch, hidden, last in ((half[0], wide[1], wide[2]), (wide[0], half[1], half[2])):
        assert join(batch, [last], hidden=hidden) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert join(batch, [last], hidden=hidden) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert join(half[0], half[2:], hidden=wide[1]) is None
        assert may_join(wide[0]) and may_join(half[0]) and not may_join(layers[torch.float16][0])
        assert join(half[0], [half[2]], hidden=half[1], residual=wide[0][:, :33].contiguous()) is None


def test_layers_of_which_some_learn_are_left_to_pytorch() -> None:
    case = CASES["query, key and value"]
    leaves = case.leaves()
    last = [Layer(None, *pair) for pair in zip(leaves[6::2], leaves[7::2], strict=True)]  # type: ignore[arg-type]
    norm = Norm(leaves[2], leaves[3], 1e-5)
    assert join(case.batch, last, norm=norm) is not None
    leaves[9].requires_grad_(False)  # type: ignore[union-attr]
    assert join(case.batch, last, norm=norm) is None
    with torch.no_grad():
        assert join(case.batch, last, norm=norm) is not None
    for tensor in leaves:
        if tensor is not None:
            tensor.requires_grad_(False)
    assert join(case.batch, last, norm=norm) is not None
    assert join(case.batch.clone().requires_grad_(), last, norm=norm) is None


def test_an_input_that_wants_no_gradient() -> None:
    case = CASES["mlp of NAT"]
    expected = case.results(case.joined)
    leaves = case.leaves()
    leaves[0].requires_grad_(False)  # type: ignore[union-attr]
    output = case.joined(leaves)[0]
    found = torch.autograd.grad(output, [t for t in leaves[1:] if t is not None], case.d_outputs)
    assert all(map(torch.equal, found, expected[2:])) and torch.equal(output, expected[0])


def test_outputs_that_nobody_uses() -> None:
    case = CASES["query, key and value"]
    for used in ((0,), (1, 2)):
        leaves, others = case.leaves(), case.leaves(torch.float64)
        sum(case.joined(leaves)[i].square().sum() for i in used).backward()  # type: ignore[union-attr]
        sum(case.by_pytorch(others)[i].square().sum() for i in used).backward()  # type: ignore[union-attr]
        for a, b in zip(leaves, others, strict=True):
            if a is not None and b is not None:
                expected = torch.zeros_like(a) if b.grad is None else b.grad.float()
                torch.testing.assert_close(a.grad, expected, rtol=1e-4, atol=1e-3)


def gradients_of(case: Case, d_outputs: list[Tensor]) -> list[Tensor]:
    leaves = case.leaves()
    return list(torch.autograd.grad(case.joined(leaves), [t for t in leaves if t is not None], d_outputs))


def test_gradients_laid_out_in_any_way() -> None:
    case = CASES["query, key and value"]
    expected = gradients_of(case, case.d_outputs)
    turned = [d.t().contiguous().t() for d in case.d_outputs]
    negative = [torch.complex(d, -d).conj().imag for d in case.d_outputs]
    assert negative[0].is_neg()
    for d_outputs in (turned, negative):
        assert all(map(torch.equal, gradients_of(case, d_outputs), expected))
    ones = [d.new_ones(()).expand_as(d) for d in case.d_outputs]
    assert all(map(torch.equal, gradients_of(case, ones), gradients_of(case, [d.contiguous() for d in ones])))


@pytest.mark.parametrize("name", ["no norm", "no multiple of anything", "without biases", "projection"])
def test_second_derivatives(name: str) -> None:
    case = CASES[name]
    found = []
    for run, dtype in ((case.joined, torch.float32), (case.by_pytorch, torch.float64)):
        leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in case.tensors]
        present = [t for t in leaves if t is not None]
        loss = sum(output.square().mean() for output in run(leaves))
        first = torch.autograd.grad(loss, present, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), present))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_batches_of_gradients() -> None:
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    case = CASES["no norm"]
    leaves = case.leaves()
    output = case.joined(leaves)[0]
    d_outputs = torch.randn(3, *output.shape)
    present = [t for t in leaves if t is not None]
    together = torch.autograd.grad(output, present, d_outputs, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(output, present, d_outputs[i], retain_graph=True)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[i], rtol=1e-4, atol=1e-4)


def through_a_file(tensor: Tensor) -> Any:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file


def from_a_file(file: Any) -> Tensor:
    file.seek(0)
    return torch.load(file)


def laid_out_otherwise(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0).expand(2, *tensor.shape).contiguous().movedim(0, -1)


@pytest.mark.parametrize(
    ("pack", "unpack"), [(through_a_file, from_a_file), (laid_out_otherwise, lambda t: t[..., 1])],
    ids=["files", "strides"],
)  # fmt: skip
def test_what_autograd_keeps_may_be_kept_elsewhere(pack: Callable, unpack: Callable) -> None:
    case = CASES["mlp that is dropped at times"]
    expected = case.results(case.joined)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = case.results(case.joined)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("change", [lambda t: t[:-1], Tensor.bfloat16, Tensor.double], ids=["shape", "less", "more"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("the sums of a hidden layer", (392, 384)), ("the moments of a norm", (392, 2)), ("the input", (392, 128))],
)
def test_what_autograd_keeps_may_not_come_back_as_something_else(
    name: str, shape: tuple[int, ...], change: Callable
) -> None:
    case = CASES["mlp that is dropped at times"]
    kept: list[Tensor] = []

    def unpack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return change(tensor) if tensor.shape == shape else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        outputs = case.joined(case.leaves())
    with pytest.raises(BackendError, match=f"{name} must be"):
        torch.autograd.backward(outputs, case.d_outputs)
    assert any(t.shape == shape for t in kept)


def test_modes_around_the_backward_alone_see_it() -> None:
    case = CASES["mlp of NAT"]
    expected = case.results(case.joined)
    leaves = case.leaves()
    outputs = case.joined(leaves)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(outputs, case.d_outputs)
    assert counter.get_total_flops() >= 2 * 2 * 1568 * 64 * 192 * 2
    found = [*outputs, *(t.grad for t in leaves if t is not None)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))  # type: ignore[union-attr]


def test_sums_of_many_numbers_that_are_not_around_zero() -> None:
    """A bias's gradient is as exact as PyTorch's sum, whatever the weight's size leaves of slices."""
    case = Case(60_000, 24, (512,), norm=False)
    case.d_outputs = [d + 1 for d in case.d_outputs]
    compare(case.results(case.joined), case)


@pytest.mark.parametrize("rows", [256, 2000])
def test_gradients_without_end(rows: int) -> None:
    case = Case(rows, 24, (40,), norm=False)
    case.d_outputs[0][0, 0] = float("inf")
    case.d_outputs[0][1, 1] = float("-inf")
    case.d_outputs[0][:2, 2] = 3e38
    ours, theirs = case.results(case.joined)[-1], case.results(case.by_pytorch)[-1]
    assert torch.equal(ours[:3], theirs[:3]) and ours[3:].isfinite().all()


@pytest.mark.parametrize(("features", "mean", "deviation"), [(1536, 1e5, 0.1), (96, 1e4, 0.01), (7, 1e5, 0.1)])
def test_norms_of_numbers_far_from_zero(features: int, mean: float, deviation: float) -> None:
    batch = torch.randn(64, features) * deviation + mean
    weight = torch.eye(features)
    outputs = join(batch, [Layer(None, weight, None)], norm=Norm(None, None, 1e-5))
    assert outputs is not None
    truth = functional.layer_norm(batch.double(), (features,))
    error = (outputs[0] - truth).square().mean().sqrt()
    assert error <= 2 * (functional.layer_norm(batch, (features,)) - truth).square().mean().sqrt()


@pytest.mark.parametrize("number", [0.1, 100.3, 12345.678, 1e6 + 1 / 3, 2e38])
@pytest.mark.parametrize("features", [7, 768])
def test_norms_of_equal_numbers_are_nothing(number: float, features: int) -> None:
    weight = torch.eye(features)
    outputs = join(torch.full((64, features), number), [Layer(None, weight, None)], norm=Norm(None, None, 1e-5))
    assert outputs is not None and not outputs[0].any()


def test_next_to_nothing_is_nothing() -> None:
    """Gradients that GELU's slope makes smaller than a float's normal numbers would take a hundred times as long."""
    sums = torch.tensor([[-13.0, 1.0] * 16] * 40)
    weight, bias = torch.nn.Parameter(torch.eye(32)), torch.nn.Parameter(torch.zeros(32))
    leaf = sums.clone().requires_grad_()
    outputs = join(leaf, [Layer(None, weight, bias)], hidden=Layer(None, weight, bias))
    assert outputs is not None
    outputs[0].backward(torch.full_like(outputs[0], 1e-3))
    assert not leaf.grad[:, ::2].any() and leaf.grad[:, 1::2].all()  # type: ignore[index]


def test_a_weight_that_changes_before_the_backward_is_noticed() -> None:
    case = CASES["projection"]
    leaves = case.leaves()
    outputs = case.joined(leaves)
    with torch.no_grad():
        leaves[6].mul_(2)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, case.d_outputs)


def test_checkpoints_are_told() -> None:
    """Of those that keep nothing and compare; the others compute under no_grad first, and may join both times."""
    case, seen = CASES["mlp of NAT"], []
    expected = case.results(case.joined)
    for reentrant in (False, True):
        leaves = case.leaves()

        def run(*tensors: Tensor) -> Tensor:
            seen.append(may_join(tensors[0]))
            return case.joined(list(tensors))[0]

        output = checkpoint(run, *leaves, use_reentrant=reentrant)
        output.backward(case.d_outputs[0])
        found = [output, *(t.grad for t in leaves if t is not None)]
        assert all(map(torch.equal, found, expected))
    assert seen == [False, False, True, True]


def test_tensors_at_odd_bytes() -> None:
    """As they lie in memory-mapped files."""
    case = CASES["no norm"]
    expected = case.results(case.joined)
    for i, tensor in enumerate(case.tensors):
        if tensor is None:
            continue
        odd = torch.frombuffer(bytearray(b"x" + tensor.numpy().tobytes()), dtype=torch.float32, offset=1)
        assert odd.data_ptr() % 4
        leaves = case.leaves()
        leaves[i] = odd.view(tensor.shape).requires_grad_()
        outputs = case.joined(leaves)
        found = torch.autograd.grad(outputs, [t for t in leaves if t is not None], case.d_outputs)
        for a, b in zip((*outputs, *found), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_numbers_that_are_none() -> None:
    case = CASES["mlp of NAT"]
    leaves = case.leaves()
    with torch.no_grad():
        leaves[0][7, 3] = float("nan")  # type: ignore[index]
        leaves[0][9, 3] = float("inf")  # type: ignore[index]
    output = case.joined(leaves)[0]
    assert output.isnan().any(-1).nonzero().flatten().tolist() == [7, 9]
    d_batch = torch.autograd.grad(output, leaves[0], torch.ones_like(output))[0]  # type: ignore[arg-type]
    assert d_batch.isnan().any(-1).nonzero().flatten().tolist() == [7, 9]


class Labelled(Tensor):
    pass


def plain(rows: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(rows, 8, dtype=dtype)


@pytest.mark.parametrize(
    "input",
    [
        plain(joined.FEWEST_ROWS - 1), plain(0), torch.zeros(64, 0), plain(dtype=torch.float64),
        plain(dtype=torch.complex64), torch.zeros(8, 64).t(), plain().to("meta"), plain().as_subclass(Labelled),
        TwoTensor(plain(), plain()), torch.complex(plain(), plain()).conj().imag,
    ],
    ids=lambda t: f"{type(t).__name__}-{t.device.type}-{tuple(t.shape)}-{t.dtype}",
)  # fmt: skip
def test_inputs_that_are_left_to_pytorch(input: Tensor) -> None:
    assert may_join(plain())
    assert not may_join(input)


def test_situations_that_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watching(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    batch = plain()
    for context in (FlopCounterMode(display=False), Watching()):
        with context:
            assert not may_join(batch)
    with torch.device("cpu"), torch.inference_mode():  # says nothing but where new tensors go
        assert may_join(batch)
    torch._C._set_mkldnn_enabled(False)
    try:
        assert not may_join(batch)
    finally:
        torch._C._set_mkldnn_enabled(True)
    seen: list[bool] = []
    torch.func.vmap(lambda t: (seen.append(may_join(t)), t)[1])(batch)
    torch.func.grad(lambda t: (seen.append(may_join(t)), t.sum())[1])(batch)
    torch.jit.trace(lambda t: (seen.append(may_join(t)), t + 1)[1], batch, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        seen.append(may_join(batch))
    assert seen and not any(seen)
    assert not torch.compile(lambda t: t + may_join(t), backend="eager", fullgraph=True)(batch).any()
    monkeypatch.setattr(joined, "joined_layers_are_faster", lambda dtype, with_gradients: False)
    assert not may_join(batch)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double(), lambda t: t.as_subclass(Labelled), lambda t: t.t().contiguous().t(),
        lambda t: t[:, :-1].contiguous(), lambda t: t.to("meta"), lambda t: t[0], lambda t: t[:0], Tensor.to_sparse_csr,
    ],
    ids=["dtype", "class", "strides", "shape", "device", "axes", "none", "layout"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("which", [4, 6])
def test_weights_that_are_left_to_pytorch(change: Callable, which: int) -> None:
    case = CASES["no multiple of anything"]
    tensors: list[Any] = list(case.tensors)
    tensors[which] = change(tensors[which])
    hidden, last = Layer(None, *tensors[4:6]), Layer(None, *tensors[6:8])
    assert join(tensors[0], [last], hidden=hidden) is None
    assert join(tensors[0], [last, last], norm=Norm(tensors[3], tensors[6], 1e-5)) is None


def test_the_machine_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    real = joined.joined_layers_are_faster.__wrapped__
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    monkeypatch.setattr(joined, "are_slow", lambda dtype: dtype == float16)
    monkeypatch.setattr(cpu_linear, "product_dtype", cpu_linear.product_dtype.__wrapped__)
    for maker, is_zen_4, capability, isa, expected, with_gradients in (
        ("GenuineIntel", False, "AVX512", "avx512", {float32, float16}, {float32, float16}),
        ("GenuineIntel", False, "AVX512", "avx2", {float16}, {float16}),
        ("GenuineIntel", False, "AVX2", "avx512", {float16}, {float16}),
        ("AuthenticAMD", True, "AVX512", "avx512bf16", {float32, bfloat16, float16}, {float32, bfloat16, float16}),
        ("AuthenticAMD", True, "AVX512", "avx512", {float32, float16}, {float32, float16}),
        ("AuthenticAMD", False, "AVX512", "avx512bf16", {float16}, {float16}),
        ("AuthenticAMD", False, "AVX2", "avx2", {float32, float16}, {float32, float16}),
        ("GenuineIntel", False, "AVX2", "avx2", {float32, float16}, {float16}),
        (None, False, "AVX2", "avx2", {float16}, {float16}),
        (None, False, "AVX512", "avx512", {float16}, {float16}),
        ("GenuineIntel", False, "DEFAULT", "baseline", set(), set()), (None, False, "NEON", "neon", set(), set()),
    ):  # fmt: skip
        monkeypatch.setattr(joined, "maker", lambda maker=maker: maker)
        monkeypatch.setattr(joined, "is_zen_4", lambda is_zen_4=is_zen_4: is_zen_4)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(cpu.loaded_library(), "isa", isa)
        for gradients, dtypes in ((False, expected), (True, with_gradients)):
            assert {dtype for dtype in (*DTYPES, torch.float64) if real(dtype, gradients)} == dtypes
    monkeypatch.setattr(cpu, "why_unusable", lambda: "there is none")
    assert not real(float32, False)


def test_less_is_kept_for_the_backward() -> None:
    """The input and what GELU is taken of; PyTorch's layers keep the norm's output and GELU's too."""
    case = CASES["mlp of NAT"]
    kept = []
    for run in (case.joined, case.by_pytorch):
        numbers = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel() if not isinstance(tensor, nn.Parameter) and len(tensor) == 1568 else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(case.leaves())
        kept.append(numbers)
    assert kept[0] == 1568 * (64 + 192 + 2)
    assert kept[1] >= 1568 * (64 + 64 + 192 + 192)


def test_calls_that_the_core_refuses() -> None:
    """Which would be a mistake of ours, and not one to be silent about."""
    case = CASES["query, key and value"]
    last = [Layer(None, *pair) for pair in zip(case.tensors[6::2], case.tensors[7::2], strict=True)]  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="refused"):
        cpu_linear.run(case.batch, last, None, None, None, case.batch, torch.float32, keeps=False)
