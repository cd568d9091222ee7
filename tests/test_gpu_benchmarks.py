"""The GPU's benchmarks on the processor: the same code on small maps and networks. What they say there is no speed."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from benchmarks import gpu_cases, gpu_check, gpu_layers, gpu_networks, gpu_numerics, gpu_peers, gpu_timing, models
from benchmarks.cases import Case
from benchmarks.subject import NotHere

from nbhd.backends.triton import configurations
from tests.processes import process

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: gpu_check is for it")


def small(case: Case) -> Case:
    return replace(gpu_cases.small(case), dtype="float32")


# ---- layers


def windows(query, key, value, bias, window, heads):
    """Swin's shifted windows as dense attention: two positions see each other in a window of what the roll made."""
    spatial = query.shape[1:3]
    padded = [-(-length // window) * window for length in spatial]
    shift = window // 2 if min(spatial) > window else 0
    place, group = [], []
    for length in padded:
        i = (torch.arange(length) - shift) % length
        place.append(i)
        group.append(i // window * 10 + (i >= length - shift).long() * (shift > 0))
    (x, y), (gx, gy) = (torch.meshgrid(*pair, indexing="ij") for pair in (place, group))
    groups = (gx * 1000 + gy).flatten()
    q, k, v = (
        torch.nn.functional.pad(t, (0, 0, 0, padded[1] - spatial[1], 0, padded[0] - spatial[0]))
        .flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
        for t in (query, key, value)
    )  # fmt: skip
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        dx, dy = (c.flatten()[:, None] - c.flatten() + window - 1 for c in (x, y))
        same = groups[:, None] == groups
        scores = scores + bias.T[:, torch.where(same, dx * (2 * window - 1) + dy, 0)]
    scores = scores.masked_fill(groups[:, None] != groups, -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(1, padded)
    return out[:, : spatial[0], : spatial[1]]


@pytest.mark.parametrize("spatial", [(6, 6), (6, 7), (3, 3), (5, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_swins_windows_are_the_definition(spatial, has_bias):
    """The operator's peer, and the layers: by SDPA and by hand."""
    case = Case("swin", spatial, heads=2, head_dim=4, kernel_size=(3, 3), batch=2, has_bias=has_bias)
    alone = gpu_peers.prepare_swin(case, CPU)
    query, key, value, *bias = alone.leaves
    torch.testing.assert_close(alone.call(), windows(query, key, value, bias[0] if bias else None, 3, 2))
    for is_eager in (False, True):
        torch.manual_seed(0)
        layer = gpu_layers.SwinLayer(8, case.heads, 3, *spatial, has_bias=has_bias, is_eager=is_eager)
        x = torch.randn(2, *spatial, 8, requires_grad=True)
        # zeros around the map are projected too, as Swin does it
        rows, columns = (n - m for n, m in zip(layer.padded, spatial, strict=True))
        q, k, v = layer.qkv(torch.nn.functional.pad(x, (0, 0, 0, columns, 0, rows))).chunk(3, -1)
        wanted = layer.proj(windows(q, k, v, layer.table, 3, 2)[:, : spatial[0], : spatial[1]])
        found = layer(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        leaves = [x, *layer.parameters()]
        for mine, other in zip(*(torch.autograd.grad(o.sin().sum(), leaves) for o in (found, wanted)), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [*gpu_cases.LAYERS.values()], ids=lambda case: case.name)
def test_layers_are_measured_against_swins(case):
    found = gpu_timing.measure(small(case), gpu_cases.contenders(case), CPU, rounds=1)
    assert found["first"] == "nbhd-layer" and not found["notes"]
    assert found["contenders"].keys() == {"nbhd-layer", "swin-layer", "swin-layer-eager"}
    for each in found["contenders"].values():
        assert each["ms"].keys() == each["peak_bytes"].keys() == {"forward", "both"}
    assert found["ratios"]["swin-layer"]["both"] > 0
    swin = gpu_layers.prepare_swin(small(case), CPU)
    ours = gpu_layers.prepare_ours(small(case), CPU)
    # as many parameters of every kind: what is compared is what is between the projections
    assert sorted(t.numel() for t in swin.leaves) == sorted(t.numel() for t in ours.leaves)


def test_swins_layer_needs_squares():
    with pytest.raises(NotHere, match="two axes"):
        gpu_layers.prepare_swin(gpu_cases.CASES["gpu/ltx-69x64x96-w3x7x7"], CPU)


def test_cases_come_in_the_order_of_their_weight():
    names = list(gpu_cases.ALL)
    assert set(names) == set(gpu_cases.CASES) | set(gpu_cases.LAYERS)
    assert all("nat" in name and "bias" in name for name in names[:4]) and names[4:8] == list(gpu_cases.LAYERS)
    for case in gpu_cases.ALL.values():
        assert set(gpu_cases.contenders(case)) <= set(gpu_timing.PEERS)


# ---- networks


@pytest.fixture
def tiny_networks(monkeypatch):
    monkeypatch.setattr(gpu_networks, "ROUNDS", 2)


def measure(until=math.inf, **options):
    return gpu_networks.measure(
        CPU, until, batch=2, side=224, is_small=True, compiler="eager", **options
    )  # fmt: skip


@pytest.mark.slow
def test_every_network_is_measured_as_it_is_and_compiled(tiny_networks):
    saved = []
    found = measure(save=lambda part: saved.append(json.dumps(part)))
    assert not found["notes"]
    assert list(found["networks"]) == [
        *models.NETWORKS,
        *(f"{name} compiled" for name in ("nat-tiny", "swin-tiny", "convnext-tiny", "nat-base", "swin-base")),
    ]  # fmt: skip
    for entry in found["networks"].values():
        for key in ("first_call_seconds", "peak_bytes", "ms", "images_per_second"):
            assert entry[key].keys() == {"inference", "training"}
        assert all(len(samples) == 2 for samples in entry["ms"].values())
    assert len(saved) == 2 and "compiled" not in saved[0] and json.loads(saved[1]) == found


def test_networks_memory_is_its_own(tiny_networks):
    """Where a call holds nothing (the processor's memory is not seen), the peak is weights, and AdamW's two states."""
    found = measure(names="*-tiny", with_compile=False)["networks"]
    for name in ("nat-tiny", "swin-tiny", "convnext-tiny"):
        network = models.NETWORKS[name](True)
        weights = sum(p.numel() * 4 for p in network.parameters())
        buffers = sum(b.untyped_storage().nbytes() for b in network.buffers())
        steps = 4 * sum(1 for _ in network.parameters())
        peaks = found[name]["peak_bytes"]
        assert peaks["inference"] == weights + buffers
        assert peaks["training"] == pytest.approx(3 * weights + buffers + steps, rel=1e-3)


def test_a_step_leaves_no_gradients_and_trains(tiny_networks):
    network = gpu_networks.Network("nat-tiny", CPU, 2, 64, is_small=True)
    before = [p.detach().clone() for p in network.network.parameters()]
    run = network.run("training", network.network)
    losses = [float(run()) for _ in range(2)]
    assert all(map(math.isfinite, losses))
    assert all(p.grad is None for p in network.network.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, network.network.parameters(), strict=True))
    logits = network.run("inference", network.network)()
    assert logits.shape == (2, models.LABELS) and not network.network.training


def test_the_base_networks_are_the_published_ones():
    with torch.device("meta"):
        swin, nat = models.NETWORKS["swin-base"](False), models.NETWORKS["nat-base"](False)
    # Swin-B has 88 million parameters (Liu et al. 2021, table 1), NAT-Base 90 (Hassani et al. 2023, table 1)
    assert sum(p.numel() for p in swin.parameters()) == pytest.approx(87.8e6, rel=1e-3)
    assert sum(p.numel() for p in nat.parameters()) == 89_769_652


def test_what_there_is_no_time_for_is_named(tiny_networks):
    found = measure(until=time.monotonic() - 1, names="nat-*")
    assert not found["networks"]
    assert set(found["notes"].values()) == {"no time left"}
    assert len(found["notes"]) == 8  # two networks, two ways, as they are and compiled
    # compiling begins only where there is time for what it is expected to take
    found = measure(until=time.monotonic() + 30, names="swin-tiny")
    assert found["networks"].keys() == {"swin-tiny"}
    assert found["notes"] == {f"swin-tiny compiled {how}": "no time left" for how in ("inference", "training")}


def test_a_network_that_fails_is_named_and_the_others_run(tiny_networks, monkeypatch):
    def broken(is_small):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(models.NETWORKS, "swin-tiny", broken)
    found = measure(names="*n*-tiny", with_compile=False)
    assert found["networks"].keys() == {"nat-tiny", "convnext-tiny"}
    assert found["notes"]["swin-tiny inference"] == "RuntimeError: out of memory"


# ---- the command


def test_the_command_goes_through_all_its_parts(tmp_path, monkeypatch):
    """On the processor, with small cases: numerics, cases, layers, networks, and a JSON after each part."""
    chosen = {name: small(gpu_cases.ALL[name]) for name in ("gpu/nat-7x7-b128-bias", "gpu/layer-14x14-b128-bias")}
    monkeypatch.setattr(gpu_cases, "ALL", chosen)
    monkeypatch.setattr(gpu_cases, "contenders", lambda case: [*case.peers] if "layer" in case.name else ["reference"])
    monkeypatch.setattr(gpu_check.backend, "why_unusable", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_check, "machine", lambda device: {"gpu": "none"})
    numerics = [{"name": "nat", "passed": True, "errors": {}}, {"name": "late", "passed": None, "skipped": "no time"}]

    def check(device, *, names, quick, until, workers):
        asked.append(names)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        yield from numerics

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(gpu_check.gpu_numerics, "check", check)
    measured = {"networks": {"a": {"images_per_second": {"inference": 1.0}, "peak_bytes": {"inference": 1}}}}
    calls = []

    def networks(device, until, **options):
        calls.append(options)
        return {**measured, "notes": {"b compiled training": "no time left"}}

    monkeypatch.setattr(gpu_networks, "measure", networks)
    monkeypatch.setattr(gpu_timing, "ROUNDS", 1)
    real = gpu_timing.measure
    monkeypatch.setattr(gpu_timing, "measure", lambda case, names, device: real(case, names, CPU, 1))

    def run(*arguments):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert gpu_check.main([*arguments, "--output", str(tmp_path / "r.json")]) == 0
        return json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))

    whole = run()
    assert whole["cases"].keys() == chosen.keys() and whole["networks"]["networks"] == measured["networks"]
    assert asked[-1] == () and calls[-1]["with_eager"] and calls[-1]["names"] == "*"
    alone = run("--networks", "swin*", "--compiled")
    assert "cases" not in alone and alone["networks"]["networks"] == measured["networks"]
    assert asked[-1] == gpu_numerics.NETWORKS and not calls[-1]["with_eager"] and calls[-1]["names"] == "swin*"
    some = run("--case", "*layer*")
    assert list(some["cases"]) == ["gpu/layer-14x14-b128-bias"] and "networks" not in some
    numerics[0]["passed"] = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check.main(["--output", str(tmp_path / "w.json")]) == 1
    assert json.loads((tmp_path / "w.json").read_text(encoding="utf-8")).keys() >= {"numerics", "seconds"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compiled"], "--networks"),
        (["--networks", "vgg*"], "matches nothing"),
        (["--case", "vgg*"], "matches nothing"),
        (["--minutes", "0"], "positive"),
    ],
)
def test_wrong_calls_end_with_2_and_a_reason(arguments, message, capsys):
    assert gpu_check.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_numerics_survive_processes_that_die_and_kernels_that_fail(monkeypatch):
    """The same results from several processes as from one; what raises is wrong, and the others are still checked."""
    jobs = ("plane", "sequence-walked")

    def failing(setting, dtype, form, device):
        if setting.name == "plane":
            raise RuntimeError("no such instruction\nin line 3")
        return {"passed": True, "errors": {}, "first_call_seconds": 0.0}

    monkeypatch.setattr(gpu_numerics, "_one", failing)
    for workers in (1, 2):  # spawned processes cannot find the function above, so all of it falls back to this one
        found = list(gpu_numerics.check(CPU, quick=True, workers=workers))
        assert [each["name"].split()[0] for each in found] == [n for n in jobs for _ in range(2)]
        assert [each["passed"] for each in found] == [False, False, True, True]
        assert found[0]["error"] == "RuntimeError: no such instruction"
    late = list(gpu_numerics.check(CPU, quick=True, until=time.monotonic() - 1))
    assert all(each["passed"] is None and each["skipped"] for each in late)
    assert not list(gpu_numerics.check(CPU, names=("nothing",), quick=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_numerics_in_several_processes():
    if gpu_check.backend.why_unusable() is not None:
        pytest.skip("needs Triton")
    code = """
import torch
from benchmarks import gpu_numerics
if __name__ == "__main__":
    for each in gpu_numerics.check(torch.device("cpu"), names=("plane",), quick=True, workers=2):
        print(each["name"], each["passed"], sorted(each))
"""
    assert process("-c", code, interpret=True).splitlines() == [
        f"plane bfloat16 {form} True ['errors', 'first_call_seconds', 'name', 'passed']"
        for form in ("fused", "unfused")
    ]


# ---- tuning


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tuning_times_every_row_with_all_that_it_entails():
    """Under Triton's interpreter, where all rows run: each has a time, a walk's with its bias gradient."""
    if gpu_check.backend.why_unusable() is not None:
        pytest.skip("needs Triton")
    code = """
import json, types, torch
import triton.language as tl
from triton.runtime import interpreter
interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: types.SimpleNamespace(restore=lambda: None)
from benchmarks import gpu_tune
from benchmarks.cases import Case
from nbhd.backends.triton import attention
gpu_tune.ROUNDS = 1
tables, real = [], attention.BackwardPlan.table_launches
def counted(self, row, tile):
    tables.append(row.id)
    yield from real(self, row, tile)
attention.BackwardPlan.table_launches = counted
case = Case("tiny", (3, 4), heads=1, head_dim=16, kernel_size=(3, 3), dtype="bfloat16")
print(json.dumps([gpu_tune.tune(case, torch.device("cpu")), len(tables)]))
"""
    found, tables = json.loads(process("-c", code, interpret=True))
    assert [key.split()[0] for key in found] == ["forward", "query", "key"]
    for each in found.values():
        assert len(each) > 3 and all(isinstance(ms, float) for ms in each.values())
    walks = [row.id for row in configurations.rows() if row.kernel == "query_loop" and row.id in found[list(found)[1]]]
    assert walks and tables >= 3 * len(walks)
