"""The GPU's benchmarks on the processor: the same code on small maps and networks. What they say there is no speed."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import os
import time
from dataclasses import replace

import pytest
import torch
from benchmarks import (
    gpu_cases,
    gpu_check,
    gpu_children,
    gpu_graphs,
    gpu_layers,
    gpu_networks,
    gpu_numerics,
    gpu_peers,
    gpu_timing,
    gpu_tune,
    models,
)
from benchmarks.cases import Case
from benchmarks.gpu_children import Children, Job, Outcome
from benchmarks.peers import swin
from benchmarks.subject import NotHere

from nbhd.backends.triton import configurations
from tests.marks import needs_triton
from tests.processes import process

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: gpu_check is for it")


def small(case: Case) -> Case:
    return replace(gpu_cases.small(case), dtype="float32")


@pytest.fixture(autouse=True)
def dynamo():
    """What the benchmarks ask of Dynamo is for their own processes."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield


class Here(Children):
    """The same in this process, where a test has replaced something."""

    def run(self, jobs, *, until=math.inf, limit=math.inf, on_part=lambda found, doing: None):
        for index, job in enumerate(jobs):
            if time.monotonic() >= until:
                yield index, gpu_children.LATE
                continue
            try:
                value = job.function(*job.arguments, **({"tell": on_part} if job.tells else {}))
            except Exception as error:
                yield index, Outcome(error=gpu_children.why(error))
            else:
                yield index, Outcome(value)


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
    assert all(t.is_leaf and t.requires_grad for t in (*alone.inputs, *alone.parameters))
    query, *cut = alone.inputs  # keys and values arrive in windows
    padded = [-(-length // 3) * 3 for length in spatial]
    shift = 1 if min(spatial) > 3 else 0
    key, value = (
        torch.roll(swin._merge(t.reshape(-1, 3, 3, 8), 3, *padded), (shift, shift), (1, 2))[
            :, : spatial[0], : spatial[1]
        ]
        for t in cut
    )
    wanted = windows(query, key, value, *alone.parameters or [None], 3, 2)
    torch.testing.assert_close(alone.call(*alone.inputs), wanted)
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
        for key in ("graph_ms", "eager_ms", "peak_bytes", "first_call_seconds"):
            assert each[key].keys() == {"forward", "both"}
    for kind in ("graph", "eager"):
        assert found[kind]["ratios"]["swin-layer"]["both"] > 0
    peer = gpu_layers.prepare_swin(small(case), CPU)
    ours = gpu_layers.prepare_ours(small(case), CPU)
    # as many parameters of every kind: what is compared is what is between the projections
    assert sorted(t.numel() for t in peer.parameters) == sorted(t.numel() for t in ours.parameters)


def test_swins_layer_needs_squares():
    with pytest.raises(NotHere, match="two axes"):
        gpu_layers.prepare_swin(gpu_cases.CASES["gpu/ltx-69x64x96-w3x7x7"], CPU)


def test_cases_come_in_the_order_of_their_weight():
    names = list(gpu_cases.ALL)
    assert set(names) == set(gpu_cases.CASES) | set(gpu_cases.LAYERS)
    assert all("nat" in name and "bias" in name for name in names[:4]) and names[4:8] == list(gpu_cases.LAYERS)
    for case in gpu_cases.ALL.values():
        assert set(gpu_cases.contenders(case)) <= set(gpu_timing.PEERS)


# ---- cases


TINY = Case("tiny", (3, 4), heads=1, head_dim=8, kernel_size=(3, 3), batch=2)


def twin(case, device):
    return gpu_peers.prepare_reference(case, device)


def test_a_sample_goes_through_copies_and_keeps_every_result():
    """Else a small map stays in the L2 from call to call."""
    contender = gpu_peers.prepare_reference(TINY, CPU)
    sets = gpu_timing.copied(contender, 3)
    seen = []

    def call(*inputs):
        seen.append([t.data_ptr() for t in inputs])
        return contender.call(*inputs)

    watched = contender._replace(call=call)
    results = [gpu_timing.forward(watched, sets)(), [out for out, _ in gpu_timing.both(watched, sets)()]]
    assert len(seen) == 6 and len({place for places in seen for place in places}) == 3 * len(contender.inputs)
    for outs in results:
        assert len({out.data_ptr() for out in outs}) == 3 and all(torch.equal(out, outs[0]) for out in outs)
    gradients = [each for _, each in gpu_timing.both(contender, sets)()]
    assert len(gradients[0]) == len(contender.inputs) + len(contender.parameters)


def test_without_a_gpu_a_graph_is_the_call_itself():
    assert gpu_graphs.captured(test_without_a_gpu_a_graph_is_the_call_itself) is (
        test_without_a_gpu_a_graph_is_the_call_itself
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_is_recorded_on_the_stream_that_was_warmed_up(monkeypatch, fails):
    """The order of PyTorch's documentation, on a CUDA that only writes down what it is asked for."""
    said = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            said.append("replay")

    @contextlib.contextmanager
    def entered(what, stream):
        said.append(f"{what} {stream.name}")
        yield
        said.append(f"end of {what}")
        if fails and what == "graph":
            raise RuntimeError("invalidated")

    main = Stream("main")
    for name, value in {
        "is_available": lambda: True, "current_stream": lambda: main, "Stream": Stream, "CUDAGraph": Graph,
        "stream": lambda stream: entered("stream", stream), "graph": lambda graph, stream: entered("graph", stream),
        "set_stream": lambda stream: said.append(f"back to {stream.name}"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_children, "retire", lambda: said.append("retired"))
    gpu_graphs._side.cache_clear()
    before = [
        "side waits for main", "stream side", "call", "call", "end of stream", "main waits for side", "graph side",
        "call", "end of graph",
    ]  # fmt: skip
    try:
        if fails:
            with pytest.raises(RuntimeError, match="invalidated"):
                gpu_graphs.captured(lambda: said.append("call"), warm_up=2)
            assert said == [*before, "retired", "back to main"]
        else:
            replay = gpu_graphs.captured(lambda: said.append("call") or 5, warm_up=2)
            assert said == before and replay() == 5 and said == [*before, "replay"]
    finally:
        gpu_graphs._side.cache_clear()


def test_who_cannot_be_recorded_is_timed_eagerly_and_ratios_never_mix(monkeypatch):
    """The process is given up, so all begins anew, without the graph of this one."""
    monkeypatch.setitem(gpu_timing.PEERS, "twin", twin)
    monkeypatch.setitem(gpu_timing.PEERS, "nbhd", twin)
    twins, taken = [], []

    def captured(run):
        taken.append(run)
        if len(taken) == 3:  # ours forward and both, then the twin's
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return run

    monkeypatch.setattr(gpu_graphs, "captured", captured)
    found = gpu_children.study(Here(), gpu_timing.measure, TINY, ["nbhd", "twin"], CPU, save=twins.append)
    assert found["notes"] == {"twin as a graph": "RuntimeError: operation not permitted when stream is capturing"}
    assert found["contenders"]["twin"]["graph_ms"] == {} and found["graph"]["ratios"]["twin"] == {}
    assert (
        found["contenders"]["twin"]["eager_ms"].keys() == found["eager"]["ratios"]["twin"].keys() == {"forward", "both"}
    )
    assert found["graph"]["nbhd_ms"].keys() == {"forward", "both"} and twins[-1] is found


def test_who_fails_while_it_is_timed_is_left_out_alone(monkeypatch):
    calls = []

    def late(case, device):
        contender = twin(case, device)

        def call(*inputs):
            calls.append(1)
            if len(calls) > 20:
                raise RuntimeError("out of memory")
            return contender.call(*inputs)

        return contender._replace(call=call)

    monkeypatch.setitem(gpu_timing.PEERS, "nbhd", twin)
    monkeypatch.setitem(gpu_timing.PEERS, "late", late)
    found = gpu_timing.measure(TINY, ["nbhd", "late"], CPU, rounds=2)
    assert set(found["notes"].values()) == {"RuntimeError: out of memory"}
    assert all(note.startswith("late ") for note in found["notes"])
    assert len(found["contenders"]["nbhd"]["graph_ms"]["both"]) == 2


def test_who_has_no_room_for_its_inputs_is_left_out_alone(monkeypatch):
    copied, asked = gpu_timing.copied, []

    def second_fails(contender, count):
        asked.append(contender)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("no room")
        return copied(contender, count)

    monkeypatch.setattr(gpu_timing, "copied", second_fails)
    for name in ("nbhd", "large"):
        monkeypatch.setitem(gpu_timing.PEERS, name, twin)
    found = gpu_timing.measure(TINY, ["nbhd", "large"], CPU, rounds=1)
    assert set(found["contenders"]) == {"nbhd"} and found["notes"]["large"] == "OutOfMemoryError: no room"


def test_a_peer_that_disagrees_is_told_from_rounding(monkeypatch):
    def off(by):
        def prepare(case, device):
            contender = twin(case, device)
            return contender._replace(comparable=lambda out: out + by * out.flip(0))

        return prepare

    monkeypatch.setitem(gpu_timing.PEERS, "nbhd", twin)
    for by, agrees in ((1e-7, True), (0.1, False), (math.nan, False), (math.inf, False)):
        monkeypatch.setitem(gpu_timing.PEERS, "off", off(by))
        found = gpu_timing.measure(TINY, ["nbhd", "off"], CPU, rounds=1)
        assert found["contenders"]["off"]["difference_from_nbhd"]["agrees"] is agrees
        assert gpu_check._is_wrong("nbhd", found) is not agrees
        json.dumps(gpu_check.encoded(found), allow_nan=False)


def test_every_case_of_flex_attention_is_compiled(monkeypatch):
    """From its ninth variant on Dynamo would run the same function uncompiled."""
    compiled = []

    def compiler(module, inputs):
        compiled.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    for n in range(5):
        case = Case("flex", (4, 5 + n), heads=1, head_dim=16, kernel_size=(3, 3), has_bias=n % 2 == 0)
        contender = gpu_peers.prepare_flex(case, CPU)
        for is_enabled in (False, True):
            before = len(compiled)
            with torch.set_grad_enabled(is_enabled):
                contender.call(*(t.detach() for t in contender.inputs))  # on the processor it has no backward
            assert len(compiled) == before + 1, (n, is_enabled)
    assert torch._dynamo.config.fail_on_recompile_limit_hit


# ---- networks


@pytest.fixture
def tiny_networks(monkeypatch):
    monkeypatch.setattr(gpu_networks, "ROUNDS", 2)


def measure(until=math.inf, **options):
    return gpu_networks.measure(CPU, until, batch=1, side=224, is_small=True, compiler="eager", **options)


@pytest.mark.slow
def test_every_network_is_measured_as_it_is_and_compiled(tiny_networks):
    told = []
    found = measure(tell=lambda part, doing: told.append((doing, json.dumps(part))))
    assert not found["notes"]
    assert list(found["networks"]) == [
        *models.NETWORKS,
        *(f"{name} compiled" for name in ("nat-tiny", "swin-tiny", "convnext-tiny", "nat-base", "swin-base")),
    ]  # fmt: skip
    for entry in found["networks"].values():
        for key in ("first_call_seconds", "peak_bytes", "ms", "images_per_second"):
            assert entry[key].keys() == {"inference", "training"}
        assert all(len(samples) == 2 for samples in entry["ms"].values())
    # there is a sample of each before the next one is compiled, which may be what there is no more time for
    assert all(
        json.loads(part)["networks"]["nat-tiny compiled"]["images_per_second"]["inference"] > 0
        for doing, part in told
        if doing == "swin-tiny compiled inference"
    )


def test_networks_memory_is_its_own(tiny_networks):
    """Where a call holds nothing (the processor's memory is not seen), the peak is weights, and AdamW's two states."""
    found = measure(names="*-tiny", forms=(False,))["networks"]
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
    found = measure(until=time.monotonic() + 50, names="swin-tiny")
    assert found["networks"].keys() == {"swin-tiny"}
    assert found["notes"] == {f"swin-tiny compiled {how}": "no time left" for how in ("inference", "training")}


def test_a_network_that_fails_is_named_and_the_others_run(tiny_networks, monkeypatch):
    def broken(is_small):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(models.NETWORKS, "swin-tiny", broken)
    found = measure(names="*n*-tiny", forms=(False,))
    assert found["networks"].keys() == {"nat-tiny", "convnext-tiny"}
    assert found["notes"]["swin-tiny inference"] == "RuntimeError: out of memory"
    left_out = measure(
        names="convnext-tiny", forms=(False,), without={"convnext-tiny training": "it ended its process"}
    )
    assert left_out["notes"] == {"convnext-tiny training": "it ended its process"}
    assert left_out["networks"]["convnext-tiny"]["ms"].keys() == {"inference"}


# ---- processes


def test_what_a_job_does_to_its_process_is_its_own_affair():
    jobs = [
        Job(math.sqrt, (4.0,)), Job(os.abort, ()), Job(operator.truediv, (1, 0)), Job(time.sleep, (600,)),
        Job(os._exit, (3,)), Job(math.sqrt, (9.0,)),
    ]  # fmt: skip
    with Children(2) as children:
        found = dict(children.run(jobs, limit=10))
    assert found[0] == Outcome(2.0) and found[5] == Outcome(3.0)
    assert found[1] == Outcome(error="its process ended with status -6", has_ended=True)
    assert found[2] == Outcome(error="ZeroDivisionError: division by zero")
    assert found[3] == Outcome(error="it took longer than 10 seconds and was ended")
    assert found[4] == Outcome(error="its process ended with status 3", has_ended=True)


def test_a_process_does_many_jobs_until_it_retires():
    with Children() as children:
        jobs = [Job(os.getpid, ()), Job(os.getpid, ()), Job(gpu_children.retire, ()), Job(os.getpid, ())]
        (_, first), (_, second), (_, third), (_, fourth) = children.run(jobs)
    assert first.value == second.value != fourth.value
    assert third == Outcome(has_ended=True)
    with pytest.raises(ProcessLookupError):
        os.kill(fourth.value, 0)


def test_what_has_not_ended_in_time_is_ended():
    with Children() as children:
        jobs = [Job(time.sleep, (600,)), Job(math.sqrt, (4.0,))]
        found = dict(children.run(jobs, until=time.monotonic() + 3))
    assert found == {0: gpu_children.LATE, 1: gpu_children.LATE}


def steps(deadly, without, tell):
    """Tells its steps; one of them ends the process, one does not come back."""
    found = {"notes": dict(without), "done": []}
    for step in range(4):
        if str(step) in without:
            continue
        tell(found, str(step))
        if step == deadly:
            os._exit(7)
        if step == 3:
            time.sleep(600)
        found["done"].append(step)
    return found


@pytest.mark.slow
def test_a_study_goes_on_without_what_ended_its_process():
    saved = []
    with Children() as children:
        found = gpu_children.study(children, steps, 1, limit=10, save=saved.append)
    assert found == {
        "notes": {"1": "its process ended with status 7", "3": "it took longer than 10 seconds and was ended"},
        "done": [0, 2],
    }  # fmt: skip
    assert saved[-1] == found and len(saved) > 1


def test_a_study_without_time_keeps_what_it_has():
    def half(without, tell):
        tell({"notes": {}, "done": [1]}, "two")
        raise RuntimeError("over")

    class Late(Here):
        def run(self, jobs, **options):
            for index, _ in super().run(jobs, **options):
                yield index, gpu_children.LATE

    found = gpu_children.study(Late(), half)
    assert found == {"notes": {"two": "no time left"}, "done": [1]}


# ---- the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """gpu_check on the processor, with small cases, invented numerics and networks: arguments to status and JSON."""
    chosen = {name: small(gpu_cases.ALL[name]) for name in ("gpu/nat-7x7-b128-bias", "gpu/layer-14x14-b128-bias")}
    monkeypatch.setattr(gpu_cases, "ALL", chosen)
    monkeypatch.setattr(gpu_cases, "contenders", lambda case: [*case.peers] if "layer" in case.name else ["reference"])
    monkeypatch.setattr(gpu_check.backend, "why_unusable", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_check, "machine", lambda device: {"gpu": "none"})
    monkeypatch.setattr(gpu_check, "Children", Here)
    real = gpu_timing.measure
    real_cold = gpu_timing.cold
    monkeypatch.setattr(
        gpu_timing,
        "measure",
        lambda case, names, _, without, tell: real(case, names, CPU, without, rounds=1, tell=tell),
    )
    monkeypatch.setattr(gpu_timing, "cold", lambda case, name, _: real_cold(case, name, CPU))
    monkeypatch.setattr(gpu_timing, "copy_rate", lambda _: 1.0)

    class Command:
        numerics = (
            {"name": "nat", "passed": True, "errors": {"out": [1.0, 2.0, 1.0, 2.0]}},
            {"name": "late", "passed": None, "skipped": "no time"},
        )
        notes = {"nat-tiny compiled training": "no time left", "swin-base training": "OutOfMemoryError"}  # noqa: RUF012
        asked = None

        def check(self, device, **options):
            type(self).asked = options
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            yield from self.numerics

        def networks(self, device, until, names, forms, without, tell):
            self.names, self.forms = names, forms
            entry = {"images_per_second": {"inference": 1.0}, "peak_bytes": {"inference": 1}}
            return {"networks": {"a": entry}, "notes": self.notes}

        def __call__(self, *arguments):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            status = gpu_check.main([*arguments, "--output", str(tmp_path / "r.json")])
            return status, json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))

    found = Command()
    monkeypatch.setattr(gpu_check.gpu_numerics, "check", found.check)
    monkeypatch.setattr(gpu_networks, "measure", found.networks)
    return found


def test_the_command_goes_through_all_its_parts(command):
    status, whole = command()
    assert status == 0
    assert list(whole["cases"]) == list(gpu_cases.ALL) and whole["networks"]["networks"].keys() == {"a"}
    assert whole["cold_first_calls"]["seconds"].keys() == {"forward", "both"}
    assert whole["machine"]["copy_bytes_per_second"] == 1.0
    assert command.asked["names"] == () and command.names == "*" and command.forms == (False, True)
    status, alone = command("--networks", "swin*", "--compiled")
    assert status == 0 and "cases" not in alone
    assert command.asked["names"] == gpu_numerics.NETWORKS and command.names == "swin*" and command.forms == (True,)
    status, some = command("--case", "*layer*")
    assert status == 0 and list(some["cases"]) == ["gpu/layer-14x14-b128-bias"] and "networks" not in some


def test_wrong_numerics_end_the_command_unless_told_otherwise(command):
    command.numerics = ({"name": "nat", "passed": False, "errors": {"out": [math.inf, math.nan, 1.0, 1.0]}},)
    status, found = command()
    assert status == 1 and "cases" not in found and "networks" not in found
    assert found["numerics"][0]["errors"]["out"] == ["inf", "nan", 1.0, 1.0]
    status, found = command("--anyway")
    assert status == 1 and "cases" in found and "networks" in found
    command.numerics = ({"name": "nat", "passed": None, "skipped": "no time"},)
    status, found = command()  # nothing is known to be wrong, and nothing to be right
    assert status == 1 and "cases" in found


def test_ours_failing_is_a_failure_and_the_others_are_still_measured(command, monkeypatch):
    def broken(case, device):
        raise RuntimeError("illegal instruction")

    monkeypatch.setitem(gpu_timing.PEERS, "nbhd-layer", broken)
    status, found = command()
    case = found["cases"]["gpu/layer-14x14-b128-bias"]
    assert status == 1 and case["notes"] == {"nbhd-layer": "RuntimeError: illegal instruction"}
    assert case["contenders"].keys() == {"swin-layer", "swin-layer-eager"} and "networks" in found
    monkeypatch.undo()


def test_a_peer_failing_is_no_failure_but_our_network_is(command, monkeypatch):
    def broken(case, device):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(gpu_timing.PEERS, "swin-layer", broken)
    assert command()[0] == 0
    command.notes = {"nat-tiny training": "RuntimeError: no such instruction"}
    assert command()[0] == 1


def test_a_part_that_breaks_off_leaves_what_there_is_and_the_next_its_turn(command, monkeypatch):
    real = gpu_timing.measure

    def breaks(case, names, device, without, tell):
        if "layer" in case.name:
            monkeypatch.setattr(gpu_check, "_summary", lambda each: 1 / 0)
        return real(case, names, device, without, tell=tell)

    monkeypatch.setattr(gpu_timing, "measure", breaks)
    status, found = command()
    assert status == 1 and found["cases_error"] == "ZeroDivisionError: division by zero"
    assert list(found["cases"]) == list(gpu_cases.ALL) and "networks" in found


def test_a_json_that_cannot_be_written_is_known_before_anything_is_measured(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check.main(["--output", str(tmp_path / "no" / "r.json")]) == 2
    assert command.asked is None and "does not exist" in capsys.readouterr().err


def test_two_runs_of_a_day_have_two_files():
    one, two = (gpu_check.datetime(2026, 1, 2, 3, 4, second) for second in (5, 6))
    assert gpu_check.result_path("gpu-a", one).name == "gpu-a-2026-01-02-030405.json"
    assert gpu_check.result_path("gpu-a", one) != gpu_check.result_path("gpu-a", two)


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


def failing(setting, dtype, form, device):
    if form == "unfused":
        os.abort()
    if setting.name == "plane":
        raise RuntimeError("no such instruction\nin line 3")
    return {"passed": True, "errors": {}, "first_call_seconds": 0.0}


@pytest.mark.slow
def test_numerics_survive_processes_that_die_and_kernels_that_fail(monkeypatch):
    """What fails is wrong, what ends its process is tried once more, and the others are still checked."""
    monkeypatch.setattr(gpu_numerics, "_one", failing)
    found = {each.pop("name"): each for each in gpu_numerics.check(CPU, quick=True, workers=2)}
    assert found == {
        "plane bfloat16 fused": {"passed": False, "error": "RuntimeError: no such instruction"},
        "plane bfloat16 unfused": {"passed": False, "error": "its process ended with status -6"},
        "sequence-walked float32 fused": {"passed": True, "errors": {}, "first_call_seconds": 0.0},
        "sequence-walked float32 unfused": {"passed": False, "error": "its process ended with status -6"},
    }
    late = list(gpu_numerics.check(CPU, quick=True, until=time.monotonic() - 1))
    assert len(late) == 4 and all(each["passed"] is None and each["skipped"] for each in late)
    assert not list(gpu_numerics.check(CPU, names=("nothing",), quick=True))


def test_numbers_that_are_none_are_infinitely_far():
    truth, unused = torch.ones(4), torch.zeros(4, dtype=torch.bool)
    for value in (math.nan, math.inf, -math.inf):
        assert gpu_numerics._deviation(torch.tensor([1.0, value, 1.0, 1.0]), truth, unused) == (math.inf, math.inf)


def test_layouts_hold_the_same_values():
    setting = gpu_numerics.Setting("nat", (3, 4), (3, 3), heads=2, kv_heads=2, dim=8, dim_v=8)
    plain = gpu_numerics._arguments(setting, torch.float32, CPU)
    found = {form: gpu_numerics._laid_out(form, plain) for form in ("fused", *gpu_numerics.MORE[:4])}
    for form, arguments in found.items():
        for one, other in zip(plain[:4], arguments[:4], strict=True):
            assert torch.equal(one, other), form
    query, key, *_ = found["fused-qkv"]
    assert key.data_ptr() - query.data_ptr() == 16 * 4 and query.stride(2) == 48
    assert all(t.stride(-2) == 3 * 4 * 8 for t in (*found["heads-first"][:3], found["heads-first"][4]))
    assert found["expanded-gradient"][4].stride(0) == 0 and found["no-lse-gradient"][5] is None


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_form_of_a_call_is_checked():
    """Under Triton's interpreter: each form passes, and does what its name says."""
    code = """
import json, torch
from benchmarks import gpu_numerics
from nbhd.backends.triton import launches
images, real = set(), launches.Map.images
launches.Map.images = lambda self, programs: (images.add(real(self, programs)), real(self, programs))[1]
parts, constants = set(), launches.Map.constants
def noted(self, row, tile, **more):
    parts.add(more.get("PARTS", 1))
    return constants(self, row, tile, **more)
launches.Map.constants = noted
setting = gpu_numerics.Setting("nat", (3, 4), (3, 3), heads=1, kv_heads=1, dim=8, dim_v=8)
plain = gpu_numerics._arguments(setting._replace(batch=5), torch.float32, torch.device("cpu"))
gpu_numerics._fused(gpu_numerics.triton, plain)  # the same layout, and what is remembered of it
for form in (*gpu_numerics.IMAGES, *gpu_numerics.MORE):
    images.clear(), parts.clear()
    found = gpu_numerics._one(setting, "float32", form, "cpu")
    seen = sorted(images) if "images" in form else sorted(parts) if form == "fused-qkv" else None
    print(json.dumps([form, found["passed"], found.get("unequal"), seen]))
real_attend, nbhd = gpu_numerics.nbhd.na2d, gpu_numerics.nbhd
calls = []
def other(*given, **options):
    calls.append(1)
    return real_attend(*given, **options) * (1 + 1e-6 * (len(calls) == 1))
nbhd.na2d = other
print(json.dumps(["other", gpu_numerics._one(setting, "float32", "compiled", "cpu")["unequal"]]))
"""
    found = [json.loads(line) for line in process("-c", code, interpret=True).splitlines()]
    assert found[:-1] == [
        ["two-images", True, None, [2]],
        ["five-images", True, None, [5]],
        ["fused-qkv", True, None, [1, 3]],  # gradients in one tensor
        *([form, True, None, None] for form in gpu_numerics.MORE[1:4]),
        *([form, True, [], None] for form in ("graph", "compiled")),
    ]  # fmt: skip
    assert "out" in found[-1][1]


def test_what_gpu_check_says_it_checks_is_among_its_calls():
    found = [(setting.name, dtype, form) for setting, dtype, form in gpu_numerics.jobs_of()]
    assert len(set(found)) == len(found)
    once = {name for name, _, form in found if form == "five-images"}
    assert {"nat", "nat-no-bias", "window-is-map", "window-5-d64"} <= once
    for dtype in ("float32", "bfloat16"):
        assert {form for name, of, form in found if name == "nat" and of == dtype} == {
            "fused", "unfused", *gpu_numerics.IMAGES, *gpu_numerics.MORE
        }  # fmt: skip
    forms = [form for *_, form in found]  # what has kernels of its own is compiled first
    assert forms[: forms.count("fused")] == ["fused"] * forms.count("fused")
    assert len(gpu_numerics.jobs_of(quick=True)) == 4


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_numerics_in_several_processes():
    code = """
import torch
from benchmarks import gpu_numerics
if __name__ == "__main__":
    for each in gpu_numerics.check(torch.device("cpu"), names=("plane",), quick=True, workers=2):
        print(each["name"], each["passed"], sorted(each))
"""
    # as they come: whichever of the two processes is done first
    assert sorted(process("-c", code, interpret=True).splitlines()) == [
        f"plane bfloat16 {form} True ['errors', 'first_call_seconds', 'name', 'passed']"
        for form in ("fused", "unfused")
    ]


# ---- tuning


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tuning_times_every_row_with_all_that_it_entails():
    """Under Triton's interpreter, where all rows run: each has a time, a walk's with its bias gradient."""
    code = """
import json, types, torch
import triton.language as tl
from triton.runtime import interpreter
interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: types.SimpleNamespace(restore=lambda: None)
from benchmarks import gpu_timing, gpu_tune
from benchmarks.cases import Case
from nbhd.backends.triton import attention
gpu_tune.ROUNDS = 1
gpu_timing.copies = lambda moved, device: 1
tables, real = [], attention.BackwardPlan.table_launches
def counted(self, row, tile):
    tables.append(row.id)
    yield from real(self, row, tile)
attention.BackwardPlan.table_launches = counted
case = Case("tiny", (2, 3), heads=1, head_dim=16, kernel_size=(2, 3), dtype="bfloat16")
first = gpu_tune.tune(case, torch.device("cpu"), {})
count = len(tables)
key, row = first["kernels"]["forward"]["key"], next(iter(first["kernels"]["forward"]["ms"]))
failed = {f"{key} {row}": "too large"}
second = gpu_tune.tune(case, torch.device("cpu"), failed, {"key as graphs": "no"})
print(json.dumps([first, second, count, row]))
"""
    first, second, tables, row = json.loads(process("-c", code, interpret=True))
    assert list(first["kernels"]) == list(gpu_tune.KINDS) and not first["notes"]
    for kind, each in first["kernels"].items():
        assert each["key"].split()[0] == kind and each["timed"] == "graph" and each["is_whole"] and not each["notes"]
        assert len(each["ms"]) > 1 and all(ms > 0 for ms in each["ms"].values())
    assert len(first["kernels"]["forward"]["ms"]) > 3
    ids = first["kernels"]["query"]["ms"]
    walks = [each.id for each in configurations.rows() if each.kernel == "query_loop" and each.id in ids]
    assert walks and tables >= 3 * (len(walks) + len(first["kernels"]["table"]["ms"]))
    assert second["kernels"]["forward"]["notes"] == {row: "too large"}
    assert row not in second["kernels"]["forward"]["ms"]
    assert second["kernels"]["key"]["timed"] == "eager" and second["notes"] == {"key as graphs": "no"}


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_compiled_ahead_is_what_runs(tmp_path):
    """On a driver that knows the GPU and has none: afterwards the same launches on tensors compile nothing."""
    code = f"""
import os
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path)!r}
import torch, triton
from pathlib import Path
from triton.runtime import driver
from benchmarks import gpu_code, gpu_tune
from benchmarks.cases import Case
gpu, target = gpu_code.TARGETS["sm_90"]
class Driver:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: gpu
driver.set_active(Driver())
case = Case("tiny", (9, 10), heads=2, head_dim=32, kernel_size=(7, 7), batch=2, dtype="bfloat16")
for kind in ("forward", "query", "table"):
    plan = next(p for p in gpu_tune.plans(case, torch.device("meta"), target) if p.kind == kind)
    gpu_tune.compile_row(case, kind, plan.rows()[0][0].id, target)
    before = sum(1 for _ in Path({str(tmp_path)!r}).rglob("*.cubin"))
    plan = next(p for p in gpu_tune.plans(case, torch.device("cpu"), target) if p.kind == kind)
    for launch in plan.launches(*plan.rows()[0]):
        gpu_code.compiled(launch, gpu)
    print(kind, before > 0, sum(1 for _ in Path({str(tmp_path)!r}).rglob("*.cubin")) - before)
"""
    assert process("-c", code, interpret=False).splitlines() == [
        f"{kind} True 0" for kind in ("forward", "query", "table")
    ]


@needs_triton
def test_every_case_has_rows_for_every_kernel():
    """On an H200, as it is planned there; the plans are made without memory."""
    from nbhd.backends.triton.launches import Target

    for case in gpu_cases.CASES.values():
        found = {plan.kind: plan for plan in gpu_tune.plans(case, torch.device("meta"), Target("hopper", 227 << 10))}
        assert {"forward", "query", "key"} <= set(found) <= set(gpu_tune.KINDS)
        assert all(plan.rows() for plan in found.values())


def times_of(*maps):
    """Maps of one key: row -> ms, or None for a map that is not whole."""
    return {
        "key": {
            str(i): {
                "ms": {"c": 0.001} if ms is None else ms,
                "notes": {},
                "timed": "graph",
                "is_whole": ms is not None,
            }
            for i, ms in enumerate(maps)
        }
    }


def test_a_row_is_chosen_over_all_maps_of_its_code():
    # the last map alone says b; relative to the fastest a loses a tenth on one map, b half on two
    assert gpu_tune.choices(times_of({"a": 1.0, "b": 1.5}, {"a": 10.0, "b": 15.0}, {"a": 0.11, "b": 0.1})) == {
        "key": "a"
    }
    # one that does not run everywhere stands behind those that do
    assert gpu_tune.choices(times_of({"a": 1.0, "b": 1.5}, {"b": 1.0})) == {"key": "b"}
    assert gpu_tune.choices(times_of({"a": 1.0, "b": 1.5}, None)) == {"key": "a"}
    assert gpu_tune.choices(times_of({}, {})) == gpu_tune.choices({}) == {}


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """gpu_tune on the processor with invented times: arguments to status, JSON and table."""
    if gpu_check.backend.why_unusable() is not None:
        pytest.skip("needs Triton")
    from nbhd.backends.triton import launches

    row = configurations.rows()[0].id
    kept = {"ms": {row: 1.0}, "notes": {}, "timed": "graph", "is_whole": True}

    def tune(case, device, failed, without, tell):
        found = {"kernels": {"forward": {"key": "forward 16 32 x", **kept}}, "notes": {}}
        tell(found, "query a")
        found["kernels"]["query"] = {"key": "query 16 32 x", "ms": {}, "notes": {}, "timed": "graph", "is_whole": True}
        tell(found, "key b")
        if "nat" in case.name:
            raise RuntimeError("illegal access")
        return found

    monkeypatch.setattr(gpu_tune, "tune", tune)
    monkeypatch.setattr(gpu_tune, "Children", Here)
    monkeypatch.setattr(gpu_tune, "machine", lambda device: {"gpu": "none"})
    monkeypatch.setattr(gpu_tune, "compile_ahead", lambda chosen, target, until: {})
    monkeypatch.setattr(gpu_tune.backend, "why_unusable", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *given, real=torch.empty, **_: real(*given))
    monkeypatch.setattr(
        "nbhd.backends.triton.launches.target_of", lambda tensor: launches.Target("hopper", 1, "a device")
    )

    def run(*arguments):
        files = tmp_path / "t.json", tmp_path / "table.json"
        status = gpu_tune.main([*arguments, "--output", str(files[0]), "--table", str(files[1])])
        return status, *(json.loads(file.read_text(encoding="utf-8")) for file in files), row

    return run


def test_what_was_tuned_is_kept_piece_by_piece(tuning, monkeypatch):
    before = configurations.PATH.read_bytes()
    status, found, table, row = tuning()
    assert status == 0 and configurations.PATH.read_bytes() == before  # without --write
    # a case that fails twice at the same place leaves what it had; a kernel that no row runs leaves the rest alone
    assert list(found["times"]["forward 16 32 x"]) == list(gpu_cases.CASES)
    assert found["choices"] == {"forward 16 32 x": row}
    assert {name for name in found["notes"] if "nat" in name} == {
        f"{name} key b" for name in gpu_cases.CASES if "nat" in name
    }  # fmt: skip
    original = json.loads(before)
    assert table["rows"] == original["rows"] and table["measured"]["a device"] == found["choices"]
    status, found, *_ = tuning("--minutes", "1e-9")
    assert status == 1 and not found["times"]


def test_the_table_is_written_on_the_way(tuning, monkeypatch):
    """Not at the end alone: a machine may be taken away."""
    written = []
    real = gpu_tune.keep
    monkeypatch.setattr(gpu_tune, "keep", lambda picked, *to: (written.append(dict(picked)), real(picked, *to)))
    tuning("--case", "gpu/flux*")
    assert len(written) > 2 and not written[0] and written[1] == written[-1] != {}


def test_tuning_refuses_what_it_cannot_do(tuning, monkeypatch, tmp_path, capsys):
    for arguments, message in (
        (["--minutes", "nan"], "positive"),
        (["--case", "vgg*"], "matches nothing"),
        (["--table", str(tmp_path / "no" / "t.json"), "--output", str(tmp_path / "t.json")], "does not exist"),
    ):
        assert gpu_tune.main(arguments) == 2
        assert message in capsys.readouterr().err
