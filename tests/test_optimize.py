"""Models made for inference compute what they did, save as they did, and say what was done to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import nbhd
from nbhd import optimize
from nbhd.errors import ArgumentError
from nbhd.models import NatBackbone, NatConfig, NatForImageClassification, NatModel
from nbhd.models.nat import fused_attention
from nbhd.models.nat.layers import NatDropPath, NeighborhoodAttention

SETTINGS: dict[str, Any] = {
    "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 3, "dilations": [[1], [2]], "num_labels": 5,
    "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "drop_path_rate": 0.5,
}  # fmt: skip


def _model(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = kind(NatConfig(**{**SETTINGS, **options}))
    for name, parameter in model.named_parameters():
        if "bias" in name or "rpb" in name:
            nn.init.normal_(parameter)
    return model.eval()


class Around(nn.Module):
    """A model with a NAT inside, and dropout of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.backbone = _model(NatBackbone, out_features=["stage1", "stage2"], **options)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.backbone(pixels).feature_maps[-1]))


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    found = [output[key] for key in output]
    return [tensor for each in found for tensor in (each if isinstance(each, tuple) else (each,))]


KINDS = {
    "classifier": lambda **options: _model(NatForImageClassification, **options),
    "model": lambda **options: _model(NatModel, **options),
    "backbone": lambda **options: _model(NatBackbone, out_features=["stem", "stage2"], **options),
    "around": Around,
}


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_it_did(kind, qkv_bias):
    model = KINDS[kind](qkv_bias=qkv_bias).eval()
    before = copy.deepcopy(model)
    model.train()
    assert nbhd.optimize_for_inference(model, dtype=None) is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for size in ((2, 3, 40, 56), (1, 3, 9, 7)):  # maps smaller than the window, too
        pixels = torch.randn(size)
        for found, expected in zip(_tensors(model(pixels)), _tensors(before(pixels)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_one_product_gives_views_that_the_operator_takes_uncopied(monkeypatch):
    model = _model(NatModel)
    nbhd.optimize_for_inference(model, dtype=None)
    seen = []
    real = fused_attention.na2d
    monkeypatch.setattr(fused_attention, "na2d", lambda *a, **k: (seen.append(a[:3]), real(*a, **k))[1])
    model(torch.randn(1, 3, 40, 40))
    assert len(seen) == 2
    for query, key, value in seen:
        assert len({tensor.untyped_storage().data_ptr() for tensor in (query, key, value)}) == 1
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * (1 + 1 + 2)  # qkv, projection, two of the MLP
    assert not [module for module in model.modules() if isinstance(module, (nn.Dropout, NatDropPath))]


class Adapted(nn.Module):
    """As adapters are made: a layer beside another one, whose weight it shows as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.beside = base, nn.Linear(base.in_features, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.beside(x)


class OwnAttention(NeighborhoodAttention):
    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> Any:
        context, *probabilities = super().forward(hidden_states, output_attentions)
        return (2 * context, *probabilities)


def _adapt(attention: NeighborhoodAttention) -> None:
    attention.value = Adapted(attention.value)  # type: ignore[assignment]


def _hook_part(attention: NeighborhoodAttention) -> None:
    attention.value.register_forward_hook(lambda module, given, output: 100 * output)


def _hook(attention: NeighborhoodAttention) -> None:
    attention.register_forward_pre_hook(lambda module, given: (100 * given[0], *given[1:]))


def _subclass(attention: NeighborhoodAttention) -> None:
    attention.__class__ = OwnAttention


def _replace_forward(attention: NeighborhoodAttention) -> None:
    forward = attention.forward
    attention.forward = lambda x, *rest: forward(100 * x, *rest)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [_adapt, _hook_part, _hook, _subclass, _replace_forward])
def test_what_is_put_into_an_attention_is_kept(change):
    model, pixels = _model(NatForImageClassification), torch.randn(2, 3, 32, 40)
    plain = model(pixels).logits.detach()
    change(model.nat.encoder.levels[0].layers[0].attention.self)
    expected = model(pixels).logits.detach()
    assert not torch.allclose(expected, plain, atol=1e-3)
    optimize.optimize_for_inference(model, dtype=None)
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    step = model.inference_report["fused qkv"]
    assert step.done and step.reason.startswith("1 attentions make") and "; 1 are left as they are" in step.reason


def test_attentions_are_returned_as_before():
    model = _model(NatModel)
    before = copy.deepcopy(model)
    nbhd.optimize_for_inference(model, dtype=None)
    pixels = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        found, expected = (each(pixels, output_attentions=True).attentions for each in (model, before))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_what_is_around_a_nat_keeps_its_modules():
    model = Around()
    nbhd.optimize_for_inference(model, dtype=None)
    assert isinstance(model.dropout, nn.Dropout)


def test_state_dict_and_checkpoints_are_those_of_before(tmp_path):
    model = _model(NatForImageClassification)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nbhd.optimize_for_inference(model, dtype=None)
    state = model.state_dict()
    assert set(state) == set(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    loaded = NatForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], before[name]) for name in before)

    changed = {name: tensor + 1 for name, tensor in before.items()}
    model.load_state_dict(changed)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("given", [("query", "value"), ("key",), ()])
def test_parts_of_a_state_dict_load_as_before(given, assign):
    """What is not given stays as it is, and is reported under the names that state dicts have."""
    model = _model(NatForImageClassification)
    plain = copy.deepcopy(model)
    nbhd.optimize_for_inference(model, dtype=None)
    attention = "nat.encoder.levels.0.layers.0.attention.self."
    state = {name: tensor + 1 for name, tensor in plain.state_dict().items()}
    state = {
        name: tensor for name, tensor in state.items()
        if not name.startswith(attention) or name.endswith("rpb") or name.removeprefix(attention).split(".")[0] in given
    }  # fmt: skip
    found, expected = (each.load_state_dict(state, strict=False, assign=assign) for each in (model, plain))
    assert sorted(found.missing_keys) == sorted(expected.missing_keys) != []
    assert found.unexpected_keys == expected.unexpected_keys == []
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{attention}"):
        model.load_state_dict(state)


def test_misshapen_and_unknown_parts_are_named():
    model = nbhd.optimize_for_inference(_model(NatForImageClassification, qkv_bias=False), dtype=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    key = "nat.encoder.levels.0.layers.0.attention.self.key"
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}\.weight: .*\[8, 7\].*\[8, 8\]"):
        model.load_state_dict(before | {f"{key}.weight": torch.ones(8, 7)})
    assert model.load_state_dict(before | {f"{key}.bias": torch.ones(8)}, strict=False) == ([], [f"{key}.bias"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_twice_is_once():
    model = nbhd.optimize_for_inference(_model(NatModel), dtype=None)
    again = nbhd.optimize_for_inference(model, dtype=None)
    assert again.inference_report["fused qkv"] == optimize.Step("fused qkv", False, "fused already")


@pytest.mark.parametrize(("gain", "dtype"), [(1.9, torch.bfloat16), (0.01, torch.float32)])
def test_auto_takes_bfloat16_where_it_is_measured_to_be_faster(monkeypatch, gain, dtype):
    monkeypatch.setattr(optimize, "bfloat16_gain", lambda: gain)
    model = nbhd.optimize_for_inference(_model(NatForImageClassification))
    assert model.dtype == dtype
    step = model.inference_report["dtype"]
    assert step.done is (dtype == torch.bfloat16)
    assert "on this CPU" in step.reason


def test_every_parameter_is_converted_and_not_the_first_alone():
    model = Around()
    model.head.half(), model.backbone.embeddings.half()
    optimize.optimize_for_inference(model, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.inference_report["dtype"].reason == "float16 and float32 to float16"
    model = optimize.optimize_for_inference(model, dtype=torch.float16)
    assert model.inference_report["dtype"].reason == "it is float16 already"


class Wrapped(torch.Tensor):
    """As quantised weights are: a class of tensors that knows few functions."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.cat:
            raise NotImplementedError("no cat")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_other_classes_are_left_alone():
    model, pixels = _model(NatForImageClassification), torch.randn(2, 3, 32, 40)
    expected = model(pixels).logits.detach()
    key = model.nat.encoder.levels[0].layers[0].attention.self.key
    key.weight = nn.Parameter(key.weight.detach().as_subclass(Wrapped), requires_grad=False)
    optimize.optimize_for_inference(model, dtype=None)
    torch.testing.assert_close(model(pixels).logits.as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-5)
    assert "1 are left" in model.inference_report["fused qkv"].reason


def test_bfloat16_stays_close():
    model = _model(NatForImageClassification)
    before = copy.deepcopy(model)
    nbhd.optimize_for_inference(model, dtype=torch.bfloat16)
    pixels = torch.randn(2, 3, 40, 40)
    found, expected = model(pixels).logits, before(pixels).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    report = str(model.inference_report)
    assert "float32 to bfloat16" in report
    assert ("slower" in report) is (optimize.bfloat16_gain() < 1)
    assert optimize.bfloat16_gain() > 0


@pytest.mark.timeout(600)  # a C++ compiler at work
def test_it_compiles_to_one_graph():
    if not optimize._has_compiler():
        pytest.skip("there is no C++ compiler")
    model = _model(NatModel, depths=[1], num_heads=[1], dilations=[[1]])
    before = copy.deepcopy(model)
    nbhd.optimize_for_inference(model, dtype=None, compile=True)
    assert model.inference_report["compile"].done
    explained = torch._dynamo.explain(model.forward)(torch.randn(1, 3, 24, 24))
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0
    torch._dynamo.reset()
    pixels = torch.randn(1, 3, 24, 24)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(pixels).last_hidden_state, before(pixels).last_hidden_state, atol=1e-5, rtol=1e-4
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_compiling_for_a_cpu_leaves_the_layout_of_maps_alone(monkeypatch):
    """Inductor's own choice would have axis 1 innermost, as if maps were (B, C, H, W)."""
    seen = []
    monkeypatch.setattr(optimize, "_has_compiler", lambda: True)
    monkeypatch.setattr(NatModel, "compile", lambda self, **how: seen.append(how["options"]))
    nbhd.optimize_for_inference(_model(NatModel), dtype=None, compile=True)
    assert seen == [{"layout_optimization": False}]


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model = nbhd.optimize_for_inference(_model(NatModel), dtype=None, compile=True)
    step = model.inference_report["compile"]
    assert (step.done, "no C++ compiler" in step.reason) == (False, True)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "must be or contain a NAT"),
        ("nat", {}, r"must be a torch\.nn\.Module"),
        (nn.Linear(2, 2), {"dtype": "bfloat16"}, "dtype must be 'auto', None or a floating dtype"),
        (nn.Linear(2, 2), {"dtype": torch.int8}, "dtype must be"),
    ],
)
def test_wrong_calls(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        nbhd.optimize_for_inference(model, **options)
