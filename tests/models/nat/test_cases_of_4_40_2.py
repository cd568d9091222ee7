"""The cases of transformers 4.40.2's own test file of NAT, under their names and with their sizes.

What that file inherits (common tests of models, configurations, backbones and pipelines) runs from today's transformers
with ``make test-hf``.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import nn

from nbhd.models import NatBackbone, NatConfig, NatForImageClassification, NatImageProcessor, NatModel

SETTINGS: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "num_channels": 3, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [2, 4, 8],
    "kernel_size": 3, "mlp_ratio": 2.0, "qkv_bias": True, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.1, "hidden_act": "gelu", "patch_norm": True,
    "layer_norm_eps": 1e-5, "initializer_range": 0.02, "num_labels": 10, "out_features": ["stage1", "stage2"],
    "out_indices": [1, 2],
}  # fmt: skip
every_model = pytest.mark.parametrize("model_class", [NatModel, NatForImageClassification, NatBackbone])


def pixels(channels: int = 3) -> torch.Tensor:
    return torch.rand(13, channels, 64, 64, generator=torch.Generator().manual_seed(0))


def build(model_class: Any, **changes: Any) -> Any:
    return model_class(NatConfig(**(SETTINGS | changes))).eval()


def test_config(tmp_path: Path) -> None:
    config = NatConfig(embed_dim=37, image_size=64)
    assert (config.image_size, config.hidden_size, config.num_hidden_layers) == (64, 296, 4)
    config.save_pretrained(tmp_path)
    again = NatConfig.from_pretrained(tmp_path)
    assert {k: v for k, v in again.to_dict().items() if "version" not in k} == {
        k: v for k, v in config.to_dict().items() if "version" not in k
    }


def test_model() -> None:
    out = build(NatModel)(pixels())
    assert out.last_hidden_state.shape == (13, 4, 4, 64)  # 64 / (4 * 2**2), 16 * 2**2
    assert out.pooler_output.shape == (13, 64)


def test_for_image_classification() -> None:
    labels = torch.arange(13) % 10
    out = build(NatForImageClassification)(pixels(), labels=labels)
    assert out.logits.shape == (13, 10)
    assert out.loss.ndim == 0
    grey = build(NatForImageClassification, num_channels=1)(pixels(1))
    assert grey.logits.shape == (13, 10)


def test_backbone() -> None:
    model = build(NatBackbone, hidden_dropout_prob=0.0)
    maps = model(pixels()).feature_maps
    assert [tuple(m.shape) for m in maps] == [(13, 16, 16, 16), (13, 32, 8, 8)]
    assert model.channels == [16, 32]
    model = build(NatBackbone, out_features=None, out_indices=None)
    (last,) = model(pixels()).feature_maps
    assert last.shape == (13, 64, 4, 4)
    assert model.channels == [64]


@every_model
def test_inputs_embeds(model_class: Any) -> None:
    assert "inputs_embeds" not in inspect.signature(model_class.forward).parameters


@every_model
def test_feed_forward_chunking(model_class: Any) -> None:
    """The setting is accepted and changes nothing, as in 4.40.2."""
    model, other = build(model_class), build(model_class, chunk_size_feed_forward=5)
    other.load_state_dict(model.state_dict())
    for a, b in zip(flat(model(pixels())), flat(other(pixels())), strict=True):
        assert torch.equal(a, b)


@every_model
def test_model_common_attributes(model_class: Any) -> None:
    model = build(model_class)
    assert isinstance(model.get_input_embeddings(), nn.Module)
    output = model.get_output_embeddings()
    assert output is None or isinstance(output, nn.Linear)


@every_model
def test_attention_outputs(model_class: Any) -> None:
    shapes = [tuple(a.shape) for a in build(model_class)(pixels(), output_attentions=True).attentions]
    assert shapes == [(13, 2, 16, 16, 9), (13, 4, 8, 8, 9), (13, 8, 4, 4, 9)]


@pytest.mark.parametrize("from_config", [False, True])
@every_model
def test_hidden_states_output(model_class: Any, from_config: bool) -> None:
    if from_config:
        out = build(model_class, output_hidden_states=True)(pixels())
    else:
        out = build(model_class)(pixels(), output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert out.hidden_states[0].shape == (13, 16, 16, 16)
    if model_class is not NatBackbone:
        assert len(out.reshaped_hidden_states) == 4
        assert out.reshaped_hidden_states[1].shape == (13, 32, 8, 8)


@pytest.mark.parametrize("deviation", [0.0, 1e-10])
@every_model
def test_initialization(model_class: Any, deviation: float) -> None:
    """With (next to) no initial deviation every weight outside the embeddings is 0, or 1 in a norm."""
    model = build(model_class, initializer_range=deviation)
    for name, parameter in model.named_parameters():
        if "embeddings" not in name:
            assert round(parameter.mean().item(), 8) in (0.0, 1.0), name


def nat_mini() -> str:
    folder = os.environ.get("NBHD_NAT_MINI")
    if not folder:
        pytest.skip("NBHD_NAT_MINI does not name a folder with shi-labs/nat-mini-in1k-224, which is on the hub")
    return folder


def test_model_from_pretrained() -> None:
    assert NatModel.from_pretrained(nat_mini()).config.depths == [3, 4, 6, 5]


def test_inference_image_classification_head() -> None:
    """The two cats of COCO val2017 39769, and the logits that file expects of the published weights."""
    model = NatForImageClassification.from_pretrained(nat_mini())
    picture = os.environ.get("NBHD_COCO_39769")
    if not picture:
        pytest.skip("NBHD_COCO_39769 does not name the picture 000000039769.jpg of COCO val2017")
    inputs = NatImageProcessor.from_pretrained(nat_mini())(PIL.Image.open(picture), return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.shape == (1, 1000)
    torch.testing.assert_close(logits[0, :3], torch.tensor([0.3805, -0.8676, -0.3912]), atol=1e-4, rtol=0)


def flat(outputs: Any) -> list[torch.Tensor]:
    return [t for value in outputs.values() for t in (value if isinstance(value, tuple) else (value,))]
