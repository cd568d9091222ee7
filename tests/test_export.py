"""Exported operators and models compute what they were made from, at sizes they have not been traced with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import nbhd
from nbhd.backends import reference
from nbhd.errors import ArgumentError, BackendError, CheckpointError, MissingExtra
from nbhd.export import ExportedModel, check, export, formats, open_exported, operator, program, subject
from nbhd.geometry import Neighborhood
from nbhd.models import NatBackbone, NatConfig, NatForImageClassification, NatImageProcessor, NatModel
from tests.cases import NAMED, Case, cases, simple

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")

WINDOW = 3
SIZES = [(1, 56, 56), (3, 97, 41), (2, 9, 7), (1, 1, 1), (1, 40, 130)]  # batch, height, width


# ---- the operator in ordinary operations


def _check_operator(case: Case) -> None:
    tensors = case.tensors()
    scale = case.dim**-0.5 if case.scale is None else case.scale
    bias = tensors.get("rel_pos_bias")
    q, k, v = (tensors[name] for name in ("query", "key", "value"))
    neighborhood = Neighborhood(*case.geometry)
    expected = reference.attend(q, k, v, bias, neighborhood, scale)
    for found, wanted in zip(operator.attend(q, k, v, bias, *case.geometry, scale), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    scores = reference.scores(q, k, bias, neighborhood, scale)
    torch.testing.assert_close(operator.scores(q, k, bias, *case.geometry, scale), scores)
    weights = torch.softmax(scores, -1)
    summed = reference.weighted_sum(weights, v, neighborhood)
    torch.testing.assert_close(operator.weighted_sum(weights, v, *case.geometry), summed)


@pytest.mark.parametrize("name", NAMED)
def test_the_operator_written_out_is_the_operator(name):
    _check_operator(NAMED[name])


def test_long_windows_are_cut_into_pieces():
    _check_operator(simple((300,), 2 * operator.MOST_KEYS, heads=2, kv_heads=1, bias=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_are_scaled_in_float32(dtype):
    """As `scores` does it: a product rounded to 16 bits would tell the two apart."""
    query, key, value = (
        torch.randn(1, 6, 1, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)
    )
    geometry: Any = ((6,), (1,), (1,), (False,))
    _, lse = operator.attend(query, key, value, None, *geometry, 0.3)
    _, wide = operator.attend(query.float(), key.float(), value.float(), None, *geometry, 0.3)
    torch.testing.assert_close(lse, wide, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_operator_written_out_is_the_operator_anywhere(case):
    _check_operator(case)


# ---- the operator in ONNX and in torch.export

ALONE = {
    "line": simple((13,), 4, stride=2, dilation=2, causal=True, bias=True),
    "plane": simple((6, 9), (3, 4), stride=(2, 3), dilation=(2, 2), causal=(False, True), bias=True),
    "grouped": simple((5, 7), 3, heads=6, kv_heads=2, dim=2, dim_v=3),
    "volume": NAMED["3d-everything"],
}


class Attentions(torch.nn.Module):
    """Each setting of ``ALONE`` on inputs of its own: output and log-sum-exp; and the unfused pair."""

    def forward(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, case in ALONE.items():
            query, key, value, bias = (tensors.get(f"{name}_{part}") for part in ("q", "k", "v", "b"))
            call = getattr(nbhd, f"na{len(case.spatial)}d")
            found[f"{name}_out"], found[f"{name}_lse"] = call(
                query, key, value, *case.geometry, rel_pos_bias=bias, return_lse=True
            )
            if name == "plane":
                weights = nbhd.attention_weights(query, key, *case.geometry, rel_pos_bias=bias)
                found["weights"] = weights
                found["applied"] = nbhd.apply_attention_weights(weights, value, *case.geometry)
        return found


def _inputs(batch: int, larger: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(larger)
    made = {}
    for name, case in ALONE.items():
        spatial = [length + larger for length in case.spatial]
        shapes = {"q": (case.heads, case.dim), "k": (case.kv_heads, case.dim), "v": (case.kv_heads, case.dim_v)}
        for part, last in shapes.items():
            made[f"{name}_{part}"] = torch.randn(batch, *spatial, *last, generator=generator)
        if case.bias:
            made[f"{name}_b"] = torch.randn(case.heads, *(2 * k - 1 for k in case.kernel_size), generator=generator)
    return made


def _program() -> torch.export.ExportedProgram:
    inputs = _inputs(3, 4)
    auto = torch.export.Dim.AUTO
    dynamic = {
        name: None if name.endswith("_b") else dict.fromkeys(range(tensor.ndim - 2), auto)
        for name, tensor in inputs.items()
    }
    with torch.no_grad():
        return torch.export.export(Attentions(), (inputs,), dynamic_shapes=(dynamic,), strict=False)


def test_the_operator_in_onnx_at_any_size(tmp_path):
    """1D, 2D and 3D, dilated, strided, causal, grouped, with biases, and the unfused pair."""
    from nbhd.export.onnx_tensor import translations

    with formats.quiet():
        written = torch.onnx.export(
            _program(), (), dynamo=True, custom_translation_table=translations(), optimize=False, verbose=False
        )
    model = written.model_proto
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch, larger in ((3, 4), (1, 0), (2, 11)):
        inputs = _inputs(batch, larger)
        expected = Attentions()(inputs)
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, {name: inputs[name.removeprefix("tensors_")].numpy() for name in names})
        for value, wanted in zip(found, expected.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), wanted, atol=1e-5, rtol=1e-5)


def test_a_program_without_the_operators_of_nbhd_takes_any_size():
    """`lower` on dynamic sizes; what it leaves are PyTorch's own operations."""

    class Line(torch.nn.Module):
        def forward(self, query, key, value):
            return nbhd.na1d(query, key, value, 3, dilation=2, is_causal=True)

    def tensors(batch, length):
        return tuple(torch.randn(batch, length, 2, 4) for _ in range(3))

    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(Line(), tensors(3, 40), dynamic_shapes=(auto,) * 3, strict=False)
    program.lower(exported)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets and not [target for target in targets if "nbhd" in target]
    for shape in ((3, 40), (2, 7), (5, 101)):
        inputs = tensors(*shape)
        torch.testing.assert_close(exported.module()(*inputs), Line()(*inputs))


PEAK = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
q = numpy.ones((1, 512, 512, 1, 32), numpy.float32)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmHWM")
session.run(None, {"query": q, "key": q, "value": q})
print((status("VmHWM") - before) / q.nbytes)
"""


def test_a_large_map_is_not_gathered_for_every_offset(tmp_path):
    """Peak memory beyond the inputs in copies of the key, of 49 + 49 that gathering would take; about 10."""
    if sys.platform != "linux":
        pytest.skip("peak memory is read from Linux's /proc")
    from nbhd.export.onnx_tensor import translations

    class Plane(torch.nn.Module):
        def forward(self, query, key, value):
            return nbhd.na2d(query, key, value, 7)

    auto = dict.fromkeys((0, 1, 2), torch.export.Dim.AUTO)
    maps = tuple(torch.randn(2, 40, 36, 1, 32) for _ in range(3))
    with formats.quiet(), torch.no_grad():
        written = torch.onnx.export(
            torch.export.export(Plane(), maps, dynamic_shapes=(auto,) * 3, strict=False), (),
            dynamo=True, custom_translation_table=translations(), optimize=False, verbose=False,
        )  # fmt: skip
    path = tmp_path / "plane.onnx"
    path.write_bytes(written.model_proto.SerializeToString())
    run = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert 2 < float(run.stdout) < 16, run.stdout


# ---- models


def _network(**options: Any) -> NatForImageClassification:
    torch.manual_seed(0)
    settings = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": WINDOW, "dilations": [[1], [2]]}
    model = NatForImageClassification(NatConfig(**{**settings, "num_labels": 10, **options})).eval()
    for layer in (layer for level in model.nat.encoder.levels for layer in level.layers):
        torch.nn.init.normal_(layer.attention.self.rpb)
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture(scope="module")
def network() -> NatForImageClassification:
    """A DiNAT of two layers, the second one dilated."""
    return _network()


@pytest.fixture(scope="module")
def processor() -> NatImageProcessor:
    return NatImageProcessor(size={"shortest_edge": 64}, crop_size=56)


@pytest.fixture(scope="module")
def onnx_file(network, processor, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "nat.onnx"
    export(network, path, processor=processor)
    return path


@torch.inference_mode()
def _check_sizes(exported: ExportedModel, network: Any, sizes=SIZES) -> None:
    for batch, height, width in sizes:
        pixels = torch.randn(batch, 3, height, width)
        expected = network(pixels).logits
        torch.testing.assert_close(exported(pixels).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_classifier_in_onnx_at_any_size(onnx_file, network):
    _check_sizes(open_exported(onnx_file), network)


def test_the_onnx_file_is_standard_and_describes_itself(onnx_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    (pixels,) = model.graph.input
    axes = [axis.dim_param or axis.dim_value for axis in pixels.type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    (facts,) = (json.loads(entry.value) for entry in model.metadata_props if entry.key == "nbhd")
    assert facts["labels"] == [f"LABEL_{i}" for i in range(10)]
    assert facts["image_size"] == [56, 56]
    assert facts["preprocessing"]["size"] == {"shortest_edge": 64}
    assert facts["task"] == "image-classification"


def test_int8_files_stay_close(onnx_file, network, processor):
    """Weights alone, and activations from examples too; the graphs hold integers and standard operators."""
    from nbhd.export.quantize import quantize

    generator = np.random.default_rng(0)
    images = [generator.standard_normal((1, 3, 56, 56)).astype(np.float32) for _ in range(4)]
    facts = subject.facts_of(network, processor)
    pixels = torch.from_numpy(generator.standard_normal((2, 3, 56, 56)).astype(np.float32))
    with torch.inference_mode():
        expected = network(pixels).logits
    source = onnx.load(onnx_file)
    for examples, kind in ((None, "MatMulInteger"), (images, "DequantizeLinear")):
        model = quantize(source, facts, examples)
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count(kind) >= 2 * 6 + 1  # query, key, value, projection, two of the MLP; the classifier
        assert {node.domain for node in model.graph.node} == {""}
        session = onnxruntime.InferenceSession(model.SerializeToString())
        found = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
        assert not torch.equal(found, expected)
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.95
    with pytest.raises(ArgumentError, match="at least one image"):
        quantize(source, facts, [])


def test_a_backbone_in_onnx(tmp_path):
    torch.manual_seed(0)
    config = NatConfig(
        embed_dim=8, depths=[1, 1], num_heads=[1, 2], kernel_size=WINDOW, out_features=["stem", "stage2"]
    )
    backbone = NatBackbone(config).eval()
    facts = export(backbone, tmp_path / "maps.onnx")
    assert (facts.task, facts.outputs) == ("backbone", ["stem", "stage2"])
    exported = open_exported(tmp_path / "maps.onnx")
    for batch, height, width in ((1, 97, 41), (2, 9, 7)):
        pixels = torch.randn(batch, 3, height, width)
        with torch.inference_mode():
            expected = backbone(pixels).feature_maps
        found = exported(pixels)
        torch.testing.assert_close(found.stem, expected[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.stage2, expected[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("kind", ["nat", "vit"])
def test_the_outputs_are_those_the_model_returns(kind, pooling, tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    vit = ViTConfig(**small, image_size=32, patch_size=8)
    nat = NatConfig(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3)
    model: Any = {"nat": NatModel, "vit": ViTModel}[kind]({"nat": nat, "vit": vit}[kind], add_pooling_layer=pooling)
    facts = export(model, tmp_path / "features.pt2", "torch-export", size=32)
    assert facts.outputs == ["last_hidden_state", "pooler_output"][: 1 + pooling]
    pixels = torch.randn(2, 3, 32, 32)
    exported = open_exported(tmp_path / "features.pt2")(pixels)
    with torch.inference_mode():
        found = model(pixels)
    for name in facts.outputs:
        torch.testing.assert_close(getattr(exported, name), found[name], atol=2e-5, rtol=1e-4)


def test_models_of_other_tasks_are_named():
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    nat = NatConfig(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3)
    head = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=nat, hidden_size=8, use_auxiliary_head=False))
    with pytest.raises(ArgumentError, match="got a UperNetForSemanticSegmentation that returns logits"):
        subject.facts_of(head)


@pytest.mark.parametrize(
    ("labels", "problem", "multi_label", "opened"),
    [
        (1, "regression", False, "regression"),
        (1, None, True, "multi_label_classification"),
        (2, "multi_label_classification", True, "multi_label_classification"),
        (2, None, False, None),
    ],
)
def test_what_the_logits_are_travels_along(labels, problem, multi_label, opened):
    facts = subject.facts_of(_network(num_labels=labels, problem_type=problem))
    assert facts.multi_label is multi_label
    read = subject.Facts.from_json(facts.to_json())
    assert ExportedModel("onnx", read, lambda pixels: []).config.problem_type == opened


# ---- the comparison with the model


def test_a_file_is_compared_with_its_model():
    network = _network()
    facts = subject.facts_of(network)

    def difference(change: Any, *batches: Any) -> float:
        with torch.inference_mode():
            return check.largest_difference(
                network, lambda pixels: SimpleNamespace(logits=change(network(pixels).logits)), facts, *batches
            )

    assert difference(lambda logits: logits) == 0
    assert difference(lambda logits: 1.5 * logits) == pytest.approx(0.5)
    assert difference(lambda logits: 1.5 * logits, [torch.ones(1, 3, 20, 30).tril()]) == pytest.approx(0.5)
    for value in (float("nan"), float("inf")):
        assert difference(lambda logits, value=value: logits.index_fill(-1, torch.tensor([3]), value)) == float("inf")
    with pytest.raises(BackendError, match=r"the file's logits has the shape \(1,\), the model's \(1, 10\)"):
        difference(lambda logits: logits[:, 0])
    network.classifier.bias.data[2] = float("nan")
    with pytest.raises(CheckpointError, match="the model's own logits is NaN or infinite"):
        difference(lambda logits: logits)


FRESH = """
import sys, torch
{first}
program = torch.export.load(sys.argv[1]).module()
pixels, expected = torch.load(sys.argv[2])
for one, wanted in zip(pixels, expected):
    torch.testing.assert_close(program(one), wanted, atol=2e-5, rtol=1e-4)
print("nbhd" in sys.modules)
"""


@pytest.mark.parametrize("standalone", [False, True], ids=["calls-nbhd", "standalone"])
def test_a_program_of_torch_export_in_a_fresh_process(standalone, network, processor, tmp_path):
    """The one takes any size after ``import nbhd``, the other runs where there is no nbhd."""
    path = tmp_path / "nat.pt2"
    size = (56, 56) if standalone else None
    facts = export(network, path, "torch-export", processor=processor, size=size, standalone=standalone)
    assert facts.needs_nbhd is not standalone
    sizes = [(batch, 56, 56) for batch in (1, 3)] if standalone else SIZES
    pixels = [torch.randn(batch, 3, height, width) for batch, height, width in sizes]
    with torch.inference_mode():
        torch.save((pixels, [network(one).logits for one in pixels]), tmp_path / "expected.pt")
    first = "sys.modules['transformers'] = None" if standalone else "import nbhd"
    command = [sys.executable, "-c", FRESH.format(first=first), path, tmp_path / "expected.pt"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.split()[-1:] == [str(not standalone)], run.stderr


def test_models_that_return_tuples(tmp_path):
    model, pixels = _network(return_dict=False), torch.randn(1, 3, 56, 56)
    export(model, tmp_path / "nat.pt2", "torch-export", size=(56, 56), standalone=True)
    with torch.inference_mode():
        found = open_exported(tmp_path / "nat.pt2")(pixels).logits
        torch.testing.assert_close(found, model(pixels)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a C++ compiler at work
def test_a_compiled_package_takes_any_batch(network, processor, tmp_path):
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler")
    facts = export(network, tmp_path / "nat.pt2", "aoti", processor=processor)
    assert facts.fixed_size == [56, 56]
    exported = open_exported(tmp_path / "nat.pt2")
    assert (exported.kind, exported.facts) == ("aoti", facts)
    _check_sizes(exported, network, [(1, 56, 56), (5, 56, 56)])


def test_without_a_compiler_it_says_so(network, processor, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendError, match=r"no compiler here.*Install one"):
        export(network, tmp_path / "nat.pt2", "aoti", processor=processor)
    assert not (tmp_path / "nat.pt2").exists()


# ---- wrong calls and files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, "to must be one of onnx, torch-export, aoti"),
        ({"to": "torch-export", "int8": True}, "int8 is for ONNX"),
        ({"calibration": []}, "calibration is for int8"),
        ({"to": "aoti"}, "compiles for one image size"),
        ({"size": (224.0, 224)}, r"size must be pixels, as 224 or \(224, 320\).*got \(224\.0, 224\)"),
        ({"size": (224, 224, 3)}, "size must be pixels"),
        ({"size": 0}, "size must be pixels"),
        ({"size": "large"}, "size must be pixels"),
    ],
)
def test_options_that_do_not_fit(network, tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        export(network, tmp_path / "nat.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_only_float32_models_are_exported(tmp_path):
    with pytest.raises(ArgumentError, match=r"must be float32 on the CPU, got torch\.bfloat16"):
        export(_network().to(torch.bfloat16), tmp_path / "nat.onnx")


def test_a_missing_extra_is_named(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"nbhd\[export\]"):
        export(network, tmp_path / "nat.onnx")


def test_files_that_are_no_exported_models(tmp_path, onnx_file):
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"nothing" * 100)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(onnx_file.read_bytes()[:5000])
    foreign = onnx.load(onnx_file)
    del foreign.metadata_props[:]
    nameless = tmp_path / "nameless.onnx"
    nameless.write_bytes(foreign.SerializeToString())
    for path, message in ((garbage, "not an exported model"), (cut, "not an exported model"),
                          (nameless, "not written by `nbhd export`")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            open_exported(path)


def test_facts_of_a_later_version_are_refused():
    text = subject.Facts(task="backbone", outputs=["stage1"], format=subject.FORMAT + 1).to_json()
    with pytest.raises(ArgumentError, match="Update nbhd"):
        subject.Facts.from_json(text)
    with pytest.raises(ArgumentError, match="damaged"):
        subject.Facts.from_json('{"format": 1, "colour": 2}')


# ---- the page

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")


def test_the_snippets_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "snippets"}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), 1):
        exec(compile(code, f"export.md, snippet {number}", "exec"), names)
        if number == 1:  # a later one turns the model to bfloat16 where that is faster
            expected = names["model"](names["pixels"]).logits.detach()
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(names["program"].module()(*names["maps"]), names["Attention"]()(*names["maps"]))


def test_the_commands_of_the_page_have_the_options_they_use():
    from tests.commands import nbhd as command

    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        for line in block.splitlines():
            _, tool, name, *words = line.partition("#")[0].split()
            assert tool == "nbhd"
            text = command(name, "--help").stdout
            assert [word for word in words if word.startswith("-") and word not in text] == []
