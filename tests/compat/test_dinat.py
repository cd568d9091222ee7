"""transformers' own DiNAT, unmodified, on the stand-in."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from nbhd.compat.natten import dinat, install
from nbhd.errors import ArgumentError
from tests.fixtures import nat_reference, natten_functional

MODULE = "transformers.models.dinat.modeling_dinat"
CASE = next(case for case in nat_reference.CASES if case.name == "dilated")


@pytest.fixture
def modeling():
    """transformers' module, imported afresh with the stand-in in place."""
    before = sys.modules.pop(MODULE, None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The DiNAT of this transformers release cannot run")
        assert install()
        module = importlib.import_module(MODULE)
    yield module
    del sys.modules[MODULE]
    if before is not None:
        sys.modules[MODULE] = before


def build(model_class, seed=8, **config):
    from transformers import DinatConfig

    model = model_class(DinatConfig(**config)).double().eval()
    nat_reference.fill_weights(model, seed)
    return model


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


def test_outputs_are_those_of_transformers_4_40_2(modeling):
    """Recorded with a right natten; the second map and the last are smaller than window times dilation."""
    with safe_open(Path(nat_reference.__file__).parent / "nat_4_40_2" / "dilated.safetensors", "pt") as file:
        recorded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    pixels, labels = nat_reference.make_inputs(CASE)
    config = {"layer_scale_init_value": 0.0, **CASE.config}
    model = build(modeling.DinatModel, CASE.seed, **config)
    out = model(pixels, output_hidden_states=True, output_attentions=True)
    close(out.last_hidden_state, recorded["model.last_hidden_state"])
    close(out.pooler_output, recorded["model.pooler_output"])
    for n, attention in enumerate(out.attentions):
        close(attention, recorded[f"model.attentions.{n}"])
    classifier = build(modeling.DinatForImageClassification, CASE.seed, **config)
    out = classifier(pixels, labels=labels)
    close(out.logits, next(recorded[name] for name in recorded if name.endswith("logits")))
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in classifier.parameters() if p.grad is not None)
    backbone = build(modeling.DinatBackbone, CASE.seed, out_features=["stage1", "stage3"], **config)
    maps = backbone(pixels).feature_maps
    assert [tuple(m.shape) for m in maps] == [(1, 8, 11, 19), (1, 32, 3, 5)]
    for n, found in enumerate(maps):
        close(found, recorded[f"backbone.feature_maps.{(1, 3)[n]}"])


AMBIGUOUS = {
    "map as wide as heads": dict(heads=[4, 8], image=(24, 16)),
    "map as high as heads": dict(heads=[6, 12], image=(24, 20)),
    "square, heads": dict(heads=[4, 8], image=(16, 16)),
    "one head": dict(heads=[1, 2], image=(20, 12)),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_layouts_that_look_alike(modeling, monkeypatch, name):
    """Compared with DiNAT's own code fed by plain PyTorch functions, each layer on its own."""
    heads, image = AMBIGUOUS[name]["heads"], AMBIGUOUS[name]["image"]
    model = build(
        modeling.DinatModel, embed_dim=24, depths=[2, 1], num_heads=heads, kernel_size=3, mlp_ratio=2.0,
        dilations=[[1, 1], [1]], layer_scale_init_value=0.0,
    )  # fmt: skip
    pixels = torch.randn(1, 3, *image, dtype=torch.float64)
    found = model(pixels).last_hidden_state

    def attend(self, hidden_states, output_attentions=False):
        parts = (self.query, self.key, self.value)
        split = [
            part(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).permute(0, 3, 1, 2, 4) for part in parts
        ]
        scores = natten_functional.natten2dqkrpb(split[0] / split[0].shape[-1] ** 0.5, split[1], self.rpb, 3, 1)
        out = natten_functional.natten2dav(scores.softmax(-1), split[2], 3, 1)
        return (out.permute(0, 2, 3, 1, 4).flatten(-2),)

    monkeypatch.setattr(modeling.NeighborhoodAttention, "forward", attend)
    close(found, model(pixels).last_hidden_state)


def imitation(layout, heads_axis_name="NeighborhoodAttention"):
    """A module that stands for a release whose attention hands its queries over in some layout."""
    module = ModuleType("imitation")

    class NeighborhoodAttention(torch.nn.Module):
        def __init__(self, config, dim, num_heads, kernel_size, dilation):
            super().__init__()
            self.num_attention_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
            self.rpb = torch.nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
            self.query, self.key, self.value = (torch.nn.Linear(dim, dim) for _ in range(3))
            self.dropout = torch.nn.Dropout(0.0)

        def forward(self, x, output_attentions=False):
            q, k, v = (
                layout(p(x).unflatten(-1, (self.num_attention_heads, -1))) for p in (self.query, self.key, self.value)
            )
            scores = module.natten2dqkrpb(q, k, self.rpb, self.kernel_size, self.dilation)
            out = module.natten2dav(scores.softmax(-1), v, self.kernel_size, self.dilation)
            return (out.permute(0, 2, 3, 1, 4).flatten(-2),)

    def stub(*args):
        raise AssertionError

    setattr(module, heads_axis_name, NeighborhoodAttention)
    module.natten2dqkrpb = module.natten2dav = stub
    return module


def broken(x):
    _batch, _length, _ = x.shape  # tokens in a row; given a map, too many values to unpack
    return x


LAYOUTS = {
    "heads first": (lambda x: x.permute(0, 3, 1, 2, 4), "heads first"),
    "swapped": (lambda x: x.transpose(1, 2), "swapped"),
    "broken": (broken, "broken"),
    "heads last": (lambda x: x, "unknown"),
    "heads second, turned": (lambda x: x.permute(0, 3, 2, 1, 4), "unknown"),
}


@pytest.mark.filterwarnings("ignore:The DiNAT of this")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_observed_and_the_unknown_refused(name):
    layout, expected = LAYOUTS[name]
    module = imitation(layout)
    assert dinat.settle(module) == expected
    attention = module.NeighborhoodAttention(None, 8, 2, 3, 1).double()
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    x = torch.nn.functional.pad(x, (0, 0, 0, 1))
    if expected == "unknown":
        with pytest.raises(ArgumentError, match=r"could not be made out.*NatConfig"):
            attention(x)
        return
    right = imitation(LAYOUTS["heads first"][0])
    dinat.settle(right)
    twin = right.NeighborhoodAttention(None, 8, 2, 3, 1).double()
    twin.load_state_dict(attention.state_dict())
    scale = 0.5 if expected == "broken" else 1.0  # the replacement divides by sqrt(dim), the twin does not
    with torch.no_grad():
        twin.query.weight *= scale
        twin.query.bias *= scale
    close(attention(x)[0], twin(x)[0])


def test_an_attention_by_another_name_is_refused():
    module = imitation(LAYOUTS["swapped"][0], "Attention")
    assert dinat.settle(module) == "unknown"
    assert dinat.settle(ModuleType("empty")) == "absent"


def test_drawing_random_numbers_is_undisturbed(modeling):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    dinat.settle(modeling)
    assert torch.equal(torch.rand(1), expected)
