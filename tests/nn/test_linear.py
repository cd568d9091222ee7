"""nbhd.nn.linear: the two ways to make a linear layer give the same, and each is taken where it should be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nbhd import _processor
from nbhd.models import NatConfig, NatForImageClassification
from nbhd.nn import joined, linear, sixteen_bits
from nbhd.nn.linear import Linear


@pytest.fixture
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(linear, "one_piece_is_faster", lambda: False)
    monkeypatch.setattr(sixteen_bits, "are_slow", lambda dtype: False)
    monkeypatch.setattr(joined, "joined_layers_are_faster", lambda dtype, with_gradients: False)
    monkeypatch.setattr(linear, "smallest_work", lambda: linear.SMALLEST_WORK)


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch, slow_mkl: None) -> list[tuple[int, ...]]:
    """The shapes of the maps that `linear` has made convolutions over."""
    seen: list[tuple[int, ...]] = []
    convolve = functional.conv2d

    def spy(maps: Tensor, *rest: Tensor | None) -> Tensor:
        seen.append(tuple(maps.shape))
        return convolve(maps, *rest)

    monkeypatch.setattr(functional, "conv2d", spy)
    return seen


def exact(input: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor) -> list[Tensor]:
    """The product and its gradients in float64, by einsum."""
    x, w, g = input.double().flatten(0, -2), weight.double(), gradient.double().flatten(0, -2)
    out = torch.einsum("ri,oi->ro", x, w) + (0 if bias is None else bias.double())
    grads = [torch.einsum("ro,oi->ri", g, w).view(input.shape), torch.einsum("ro,ri->oi", g, x)]
    return [out.view(gradient.shape), *grads, *([] if bias is None else [g.sum(0)])]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "out"),
    [((2, 40, 40, 64), 192), ((8, 7, 7, 256), 200), ((1, 4080, 48), 100), ((2, 3, 40, 10, 96), 80), ((2320, 100), 77)],
    ids=str,
)
def test_values_and_gradients(
    shape: tuple[int, ...], out: int, has_bias: bool, threads: int, convolutions: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    layer = Linear(shape[-1], out, bias=has_bias)
    batch = torch.randn(shape, requires_grad=True)
    gradient = torch.randn(*shape[:-1], out)
    output = layer(batch)
    rows = batch.numel() // shape[-1]
    assert len(convolutions) == 1 and convolutions[0][0] * convolutions[0][3] == rows
    assert (convolutions[0][0] == 1) == (threads == 2)
    assert output.shape == gradient.shape and output.is_contiguous()
    found = [output, *torch.autograd.grad(output, [batch, *layer.parameters()], gradient)]
    plain = functional.linear(batch, layer.weight, layer.bias)
    plain = [plain, *torch.autograd.grad(plain, [batch, *layer.parameters()], gradient)]
    for ours, theirs, truth in zip(found, plain, exact(batch, layer.weight, layer.bias, gradient), strict=True):
        slack = 3e-7 if truth.ndim == 1 else 1.5e-6  # a sum over the rows has to be as good as PyTorch's
        error = (ours - truth).abs().max()
        assert error <= 2 * (theirs - truth).abs().max() + slack * truth.abs().max()


def large(**options: object) -> tuple[Tensor, Linear]:
    return torch.randn(2, 40, 40, 64, **options), Linear(64, 192, **options)  # type: ignore[arg-type]


def test_second_derivatives(convolutions: list[tuple[int, ...]]) -> None:
    batch, layer = large()
    batch.requires_grad_()
    found = []
    for call in (layer, lambda x: functional.linear(x, layer.weight, layer.bias)):
        (first,) = torch.autograd.grad(call(batch).square().sum(), batch, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
    assert len(convolutions) == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4 * float(found[1].detach().abs().max()))


def test_function_transforms(convolutions: list[tuple[int, ...]]) -> None:
    """torch.func: one example's gradients by vmap, directional derivatives by jvp."""
    batch, layer = large()
    parameters = dict(layer.named_parameters())

    def loss(call: Callable[..., Tensor], values: dict[str, Tensor], example: Tensor) -> Tensor:
        return call(example, values["weight"], values["bias"]).square().mean()

    def each(call: Callable[..., Tensor]) -> dict[str, Tensor]:
        return torch.func.vmap(torch.func.grad(partial(loss, call)), in_dims=(None, 0))(parameters, batch)

    def along(call: Callable[..., Tensor]) -> Tensor:
        directions = ({name: torch.cos(value) for name, value in parameters.items()}, torch.sin(batch))
        return torch.func.jvp(partial(loss, call), (parameters, batch), directions)[1]

    for name, theirs in each(functional.linear).items():
        torch.testing.assert_close(each(linear.linear)[name], theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(along(linear.linear), along(functional.linear), rtol=1e-5, atol=1e-6)
    assert convolutions


@pytest.mark.parametrize(
    ("input", "layer"),
    [
        (torch.randn(4, 10, 10, 64), Linear(64, 192)),  # too little work
        (torch.randn(1, 7, 7, 512), Linear(512, 512)),  # too few rows
        (torch.randn(2, 40, 64, 40).transpose(2, 3), Linear(64, 192)),  # would take a copy
        large(dtype=torch.bfloat16),
        large(dtype=torch.float64),
        (torch.empty(2, 40, 40, 64, device="meta"), Linear(64, 192, device="meta")),
        (torch.randn(0, 40, 40, 64), Linear(64, 192)),
    ],
    ids=["little work", "few rows", "not contiguous", "bfloat16", "float64", "meta", "empty"],
)
def test_what_stays_linear(input: Tensor, layer: Linear, convolutions: list[tuple[int, ...]]) -> None:
    with torch.no_grad():
        assert layer(input).shape == (*input.shape[:-1], 192 if layer.out_features == 192 else 512)
    assert not convolutions


@pytest.mark.parametrize("shape", [(1,), (), (4, 40, 40, 192)], ids=str)
def test_a_bias_that_broadcasts(shape: tuple[int, ...], convolutions: list[tuple[int, ...]]) -> None:
    """As PyTorch's function takes it, at a size that is oneDNN's otherwise."""
    layer, batch = Linear(64, 192), torch.randn(4, 40, 40, 64)
    bias = torch.randn(shape).requires_grad_()
    for run in (linear.linear, torch.compile(linear.linear, backend="eager")):
        ours, theirs = (f(batch, layer.weight, bias) for f in (run, functional.linear))
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(made.square().sum(), bias)[0] for made in (ours, theirs)))
    assert not convolutions
    linear.linear(batch, layer.weight, layer.bias)
    assert convolutions


def test_prime_number_of_rows(threads: int, convolutions: list[tuple[int, ...]]) -> None:
    """With one thread there is no way to cut them into images; then it is MKL's."""
    layer, batch = Linear(64, 192), torch.randn(2003, 64)
    torch.testing.assert_close(layer(batch), functional.linear(batch, layer.weight, layer.bias))
    assert len(convolutions) == threads - 1


def test_switches(monkeypatch: pytest.MonkeyPatch, convolutions: list[tuple[int, ...]]) -> None:
    batch, layer = large()
    with torch.autocast("cpu"):
        assert layer(batch).dtype == torch.bfloat16
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        layer(batch)
    assert not convolutions
    layer(batch)
    assert len(convolutions) == 1


class Labelled(Tensor):
    """A tensor of another class, as sharded and quantised ones are."""


def test_other_tensor_classes(convolutions: list[tuple[int, ...]]) -> None:
    batch, layer = large()
    layer(batch.as_subclass(Labelled))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Labelled))
    layer(batch)
    assert not convolutions


def test_exported_and_traced_graphs_have_the_plain_operator(slow_mkl: None) -> None:
    batch, layer = large()
    for strict in (False, True):
        exported = torch.export.export(layer, (batch,), strict=strict).graph
        targets = [str(node.target) for node in exported.nodes if node.op == "call_function"]
        assert targets == ["aten.linear.default"]
    assert "aten::linear" in str(torch.jit.trace(layer, batch).inlined_graph)


def test_exported_nat_has_the_plain_operator(slow_mkl: None) -> None:
    model = NatForImageClassification(NatConfig.from_variant("nat_mini", num_labels=3, depths=[1, 1, 1, 1])).eval()
    graph = torch.export.export(model, (torch.randn(1, 3, 224, 224),), strict=False).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets.count("aten.linear.default") == 4 * 6 + 1
    assert not [target for target in targets if target.startswith("nbhd.linear")]


knows_exports = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="this torch cannot tell that a graph is being exported"
)


def compiled_with_targets(call: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[list[str]]]:
    """Compiled without a code generator, and what the graphs that were made call."""
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(call, backend=keep, fullgraph=True), graphs


@knows_exports
def test_compiled_graphs_choose_when_they_run(convolutions: list[tuple[int, ...]]) -> None:
    _, layer = large()
    plain, plain_graphs = compiled_with_targets(nn.Linear(64, 192))
    shapes = [(2, 40, 40, 64), (3, 41, 43, 64), (2, 5, 6, 64), (4, 44, 50, 64)]
    for shape in shapes:
        plain(torch.randn(shape))
    assert len(plain_graphs) == 2
    compiled, graphs = compiled_with_targets(layer)
    for shape in shapes:
        batch = torch.randn(shape, requires_grad=True)
        gradient = torch.randn(*shape[:-1], 192)
        inputs = [batch, *layer.parameters()]
        seen = len(convolutions)
        output = compiled(batch)
        assert (len(convolutions) > seen) == (shape[1] > 5)
        wanted = functional.linear(batch, layer.weight, layer.bias)
        torch.testing.assert_close(output, wanted)
        found = torch.autograd.grad(output, inputs, gradient)
        for ours, theirs in zip(found, torch.autograd.grad(wanted, inputs, gradient), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert graphs == [["nbhd.linear"]] * len(plain_graphs)


def test_compiled_graphs_elsewhere_have_the_plain_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, layer = large()
    double = Linear(64, 192, dtype=torch.float64)
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: False)
    compiled, fast_mkl = compiled_with_targets(layer)
    compiled(batch)
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: True)
    compiled, float64 = compiled_with_targets(double)
    compiled(batch.double())
    compiled, autocast = compiled_with_targets(layer)
    with torch.autocast("cpu"):
        compiled(batch)
    compiled, vmap = compiled_with_targets(lambda x: torch.func.vmap(layer)(x))
    torch.testing.assert_close(compiled(batch), layer(batch))
    for graphs in (fast_mkl, float64, autocast, vmap):
        assert len(graphs) == 1 and not [target for target in graphs[0] if "nbhd" in target]


@pytest.mark.parametrize("rows", [5, 2003])
def test_operators_of_compiled_graphs(rows: int, threads: int, slow_mkl: None) -> None:
    """What PyTorch asks of an operator: schema, fakes, autograd; and derivatives of both orders."""
    x, w, b = torch.randn(rows, 64, requires_grad=True), torch.randn(100, 64, requires_grad=True), torch.randn(100)
    torch.library.opcheck(torch.ops.nbhd.linear.default, (x, w, b))
    torch.library.opcheck(torch.ops.nbhd.linear.default, (x, w, None))
    torch.library.opcheck(torch.ops.nbhd.linear_d_weight.default, (torch.randn(rows, 100), x), rtol=1e-4, atol=1e-3)
    small = [t.detach().double().requires_grad_() for t in (x[:3].view(3, 1, 64)[..., :4], w[:2, :4], b[:2])]
    assert torch.autograd.gradcheck(torch.ops.nbhd.linear, small)
    assert torch.autograd.gradgradcheck(torch.ops.nbhd.linear, small)


def test_compiling_asks_nothing_of_the_machine() -> None:
    """As it is, with the rule's cache, which a compiler warns of: warnings are errors here."""
    batch, layer = large()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), functional.linear(batch, layer.weight, layer.bias))


def test_a_hook_and_a_replacement_are_called(convolutions: list[tuple[int, ...]]) -> None:
    """NAT's layers are modules like any other: adapters take their place."""
    model = NatForImageClassification(NatConfig.from_variant("nat_mini", num_labels=3, depths=[1, 1, 1, 1])).eval()
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert len(calls) == 4 * 6 + 1 and convolutions
    adapter = nn.Identity()
    model.nat.encoder.levels[0].layers[0].attention.output.dense = adapter
    assert model(torch.randn(1, 3, 224, 224)).logits.shape == (1, 3)


def test_nat_gives_the_same(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    torch.manual_seed(0)
    config = NatConfig.from_variant("nat_mini", num_labels=5, depths=[1, 1, 1, 1])
    model = NatForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 224, 224)
    monkeypatch.setattr(sixteen_bits, "are_slow", lambda dtype: False)
    monkeypatch.setattr(joined, "joined_layers_are_faster", lambda dtype, with_gradients: False)
    monkeypatch.setattr(linear, "smallest_work", lambda: linear.SMALLEST_WORK)
    found = []
    for slow in (False, True):
        monkeypatch.setattr(linear, "mkl_is_slow", lambda slow=slow: slow)
        model.zero_grad()
        logits = model(pixels).logits
        logits.square().sum().backward()
        found.append([logits, *(p.grad.clone() for p in model.parameters())])
    largest = max(float(theirs.detach().abs().max()) for theirs in found[0][1:])
    for ours, theirs in zip(*found, strict=True):
        # A key's bias changes nothing, and its gradient is what rounding leaves.
        scale = max(float(theirs.detach().abs().max()), 1e-3 * largest)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
        (None, "DEFAULT", False),
    ],
)
def test_where_mkl_is_slow(monkeypatch: pytest.MonkeyPatch, maker: str | None, capability: str, expected: bool) -> None:
    monkeypatch.setattr(linear, "maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert linear.mkl_is_slow.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert linear.mkl_is_slow.__wrapped__() is False


@pytest.mark.parametrize(
    ("maker", "family", "expected"),
    [
        ("AuthenticAMD", 25, linear.SMALLEST_WORK_ON_ZEN_4),
        ("AuthenticAMD", 26, linear.SMALLEST_WORK),
        ("AuthenticAMD", None, linear.SMALLEST_WORK),
        ("HygonGenuine", 25, linear.SMALLEST_WORK),
    ],
)
def test_how_much_work_is_enough(
    monkeypatch: pytest.MonkeyPatch, maker: str, family: int | None, expected: int
) -> None:  # fmt: skip
    monkeypatch.setattr(_processor, "maker", lambda: maker)
    monkeypatch.setattr(_processor, "family", lambda: family)
    assert linear.smallest_work.__wrapped__() == expected


def test_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"vendor_id": "AuthenticAMD", "model name": "AMD EPYC", "cpu family": "25"}
    monkeypatch.setattr(_processor, "_linux", fields.get)
    assert (_processor.maker(), _processor.name(), _processor.family()) == ("AuthenticAMD", "AMD EPYC", 25)
    fields.clear()
    monkeypatch.setattr(_processor.platform, "system", lambda: "Windows")
    monkeypatch.setattr(_processor.platform, "processor", lambda: "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD")
    assert (_processor.maker(), _processor.family()) == ("AuthenticAMD", 26)
    monkeypatch.setattr(_processor.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(_processor.platform, "processor", lambda: "arm")
    assert (_processor.maker(), _processor.name(), _processor.family()) == (None, "arm", None)


# ---- a product, its bias and GELU in one piece


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], str]]:
    """The shapes and activations of what `linear` and `linear_gelu` have had oneDNN make in one piece."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    seen: list[tuple[tuple[int, ...], str]] = []
    make = linear.in_one_piece

    def spy(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        seen.append((tuple(input.shape), activation))
        return make(input, weight, bias, activation)

    monkeypatch.setattr(linear, "in_one_piece", spy)
    monkeypatch.setattr(linear, "one_piece_is_faster", lambda: True)
    monkeypatch.setattr(joined, "joined_layers_are_faster", lambda dtype, with_gradients: False)
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: False)
    monkeypatch.setattr(linear, "smallest_work", lambda: linear.SMALLEST_WORK)
    return seen


#: Of MKL's error what oneDNN's may be at most. Its kernels differ by processor; on those where it is not the faster and
#: not taken, it adds up longer chains.
OF_MKL = 2 if linear.one_piece_is_faster() else 4


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 40, 40, 64), (3, 50, 25, 100), (33, 4700)], ids=str)
def test_one_piece_is_as_exact(
    shape: tuple[int, ...], has_bias: bool, threads: int, pieces: list[tuple[tuple[int, ...], str]]
) -> None:
    torch.manual_seed(0)
    batch, weight = torch.randn(shape), torch.randn(208, shape[-1])
    bias = torch.randn(208) if has_bias else None
    plain = exact(batch, weight, bias, torch.zeros(*shape[:-1], 208))[0]
    for ours, theirs, truth in (
        (linear.linear(batch, weight, bias), functional.linear(batch, weight, bias), plain),
        (linear.linear_gelu(batch, weight, bias), functional.gelu(functional.linear(batch, weight, bias)),
         functional.gelu(plain)),
    ):  # fmt: skip
        assert ours.shape == theirs.shape and ours.is_contiguous()
        assert (ours - truth).abs().max() <= OF_MKL * (theirs - truth).abs().max()
    # without a bias there is nothing to add, and MKL's product is as good
    assert pieces == ([(shape, "none")] if has_bias else []) + [(shape, "gelu")]


@pytest.mark.parametrize("what", ["gradient", "rows", "layout", "dtype", "switch", "vmap", "watched", "other machine"])
def test_what_is_not_made_in_one_piece(
    what: str, pieces: list[tuple[tuple[int, ...], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    batch, weight, bias = torch.randn(4096, 64), torch.randn(64, 64), torch.randn(64)
    if what == "gradient":
        weight.requires_grad_()
    elif what == "rows":
        batch, weight = torch.randn(31, 8192), torch.randn(64, 8192)
    elif what == "layout":
        batch = torch.randn(64, 4096).t()
    elif what == "dtype":
        batch, weight, bias = batch.double(), weight.double(), bias.double()
    elif what == "switch":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    elif what == "other machine":
        monkeypatch.setattr(linear, "one_piece_is_faster", lambda: False)
    expected = functional.gelu(functional.linear(batch, weight, bias))
    if what == "vmap":
        ours = torch.vmap(lambda x: linear.linear_gelu(x, weight, bias))(torch.stack([batch, batch]))[1]
    elif what == "watched":
        with FlopCounterMode(display=False) as counter:
            ours = linear.linear_gelu(batch, weight, bias)
        assert counter.get_total_flops() == 2 * 4096 * 64 * 64
    else:
        ours = linear.linear_gelu(batch, weight, bias)
    torch.testing.assert_close(ours, expected)
    assert pieces == []
    if what == "gradient":  # with nobody to ask for one there is none
        with torch.no_grad():
            torch.testing.assert_close(linear.linear_gelu(batch, weight, bias), expected)
        assert pieces == [((4096, 64), "gelu")]


def test_nat_joins_its_gelu(pieces: list[tuple[tuple[int, ...], str]]) -> None:
    torch.manual_seed(0)
    config = NatConfig.from_variant("nat_mini", num_labels=5, depths=[1, 1, 1, 1])
    model, pixels = NatForImageClassification(config).eval(), torch.randn(2, 3, 224, 224)
    expected = model(pixels).logits.detach()
    assert pieces == []
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert [activation for _, activation in pieces].count("gelu") == 4
    assert [activation for _, activation in pieces].count("none") == 4  # the outputs; query, key and value are small


def test_nat_shows_what_is_before_its_gelu(pieces: list[tuple[tuple[int, ...], str]]) -> None:
    """To hooks, to a forward put in the place of a layer's, and to an adapter."""
    config = NatConfig.from_variant("nat_mini", num_labels=5, depths=[1, 1, 1, 1])
    model, pixels = NatForImageClassification(config).eval(), torch.randn(2, 3, 224, 224)
    first = model.nat.encoder.levels[0].layers[0].intermediate
    seen: list[Tensor] = []

    def gelus() -> int:
        pieces.clear()
        with torch.no_grad():
            model(pixels)
        return [activation for _, activation in pieces].count("gelu")

    assert gelus() == 4
    for module in (first.dense, first.intermediate_act_fn):
        handle = module.register_forward_hook(lambda _module, inputs, output: seen.append(output))
        assert gelus() == 3
        handle.remove()
    assert float(seen[0].min()) < -0.2 < float(seen[1].min())  # GELU never goes below
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert gelus() == 0
    everywhere.remove()
    plain = first.dense.forward
    first.dense.forward = lambda batch: seen.append(batch) or plain(batch)  # type: ignore[func-returns-value]
    assert gelus() == 3 and len(seen) == 3
    del first.dense.forward
    own, first.dense.__class__ = first.dense.__class__, type("Own", (Linear,), {"forward": nn.Linear.forward})
    assert gelus() == 3
    first.dense.__class__ = own
    assert gelus() == 4
    first.dense = nn.Sequential(first.dense)
    assert gelus() == 3


@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [("GenuineIntel", "AVX512", True), ("GenuineIntel", "AVX2", False), ("AuthenticAMD", "AVX512", False)],
)
def test_where_one_piece_is_faster(
    monkeypatch: pytest.MonkeyPatch, maker: str, capability: str, expected: bool
) -> None:  # fmt: skip
    monkeypatch.setattr(linear, "maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear.one_piece_is_faster.__wrapped__() is (expected and torch.backends.mkldnn.is_available())
