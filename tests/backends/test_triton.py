"""The GPU kernels without a GPU: under Triton's interpreter against the reference in float64, and ahead of time.

Each group of ``triton_runs`` runs in a process of its own, where the kernels are interpreted on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import gpu_bounds, gpu_compile, pages

from nbhd import backends, na2d
from nbhd.backends import Call, triton
from nbhd.backends.triton import boxes, configurations
from nbhd.errors import BackendError
from nbhd.geometry import Neighborhood
from tests.marks import needs_triton
from tests.processes import process

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def group(name: str) -> dict[str, dict]:
    lines = process("-W", "error", "-m", "tests.backends.triton_runs", name, interpret=True).splitlines()
    found = [json.loads(line) for line in lines]
    assert found
    return {each.pop("name"): each for each in found}


def check_errors(name: str, errors: dict[str, list[float]], dtype: torch.dtype) -> None:
    """No worse than twice plain PyTorch in the same dtype, or a few roundings where that is exact."""
    unit = torch.finfo(dtype).eps
    assert errors
    for which, (rms, most, plain_rms, plain_most) in errors.items():
        # eight: with one key a window a gradient is a difference of equal numbers, which plain PyTorch has exact
        assert rms <= 2 * plain_rms + (8 if dtype == torch.float32 else 4) * unit, (name, which)
        assert most <= 4 * plain_most + 16 * unit, (name, which)


#: The whole sweep takes two minutes of a quiet core.
everything = pytest.param(
    "everything", marks=pytest.mark.skipif(os.environ.get("NBHD_TRITON") != "all", reason="NBHD_TRITON=all runs it")
)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["fused", "unfused", "short", "overflow", everything])
def test_results_and_every_gradient_match_the_reference(name):
    for case, found in group(name).items():
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(case.rpartition("-")[2], torch.float32)
        check_errors(case, found["errors"], dtype)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_row_of_the_table_is_right():
    found = group("rows")
    for row in configurations.rows():
        check_errors(row.id, found[row.id]["errors"], torch.float16 if row.bits == 16 else torch.float32)


def check_same(found, count):
    assert len(found) == count
    for name, each in found.items():
        assert all(each["same"]), name


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_strides_images_slabs_and_wide_offsets():
    found = group("layouts")
    for name, limit in (("slabs", 1), ("chunks", 1 << 12)):
        each = found.pop(name)
        check_errors(name, each["errors"], torch.float32)
        # one box with its heads is the least: 2 heads of a slab of 64, or of a table of 8 x 8
        assert each["tables"] > 1 and each["largest"] <= max(limit, 4 * 2 * 64)
    plans = found.pop("plans")["found"]
    assert plans.pop("first") == 3 and plans.pop("again") == 0  # forward, query, key
    # what only the backward sees leaves the forward's plan as it is
    assert plans == {"odd": 3, "scale": 3, "no-bias": 3, "no-lse": 2, "dtype": 3, "expanded": 2, "one-tensor": 3}
    check_same(found, 10)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_images_and_heads_may_lie_further_apart_than_32_bits_reach():
    found = dict(group("apart"))
    forms = {form for forms in configurations.FORMS.values() for form in forms}
    assert set(found.pop("kernels")["found"]) == forms | {"pad_table"}
    check_same(found, 8)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_autograd_compile_and_no_waiting_for_the_device():
    found = group("framework")
    seen = set(found["operations"]["seen"])
    waiting = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "_to_cpu"}
    assert not {name for name in seen if name.split(".")[1] in waiting}
    assert all(found["compiled"]["same"]) and all(found["autograd"]["close"]) and all(found["weights"]["close"])
    too_large = found["too-large"]
    assert all(too_large["close"]) and too_large["tried"] == too_large["distinct"] > 0 and too_large["targets"] == 1


@needs_triton
def test_intervals_in_the_kernels_are_those_of_the_geometry_tables():
    found = group("geometry")["intervals"]
    assert found["wrong"] == [] and found["count"] > 300


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exactly_the_boxes_that_are_needed_are_visited():
    found = dict(group("visits"))
    for name in ("dots-loop-1", "dots-once-1", "dots-once-2"):
        dots = found.pop(name)
        assert dots["found"] == dots["want"], name  # by the number of matrix products of the real kernels
    assert len(found) == 12
    for name, each in found.items():
        assert each["wrong"] == 0 and each["distinct"] and each["positions"] == each["tokens"], name
        assert each["visited"] == each["counted"], name
    waste = {name: each["waste"] for name, each in found.items()}
    # pairs visited over pairs that see each other, exact
    assert waste["nat"] == pytest.approx(45 * 32 * 32 / (13 * 20 * 49))
    assert waste["causal"] == pytest.approx(18 * 8 * 4 / (40 * 9 - 36))


def axes(kernel_size, spatial, stride=None, dilation=None, is_causal=None):
    n = len(kernel_size)
    neighborhood = Neighborhood(
        kernel_size, stride or (1,) * n, dilation or (1,) * n, is_causal or (False,) * n
    )  # fmt: skip
    return boxes.axes_of(neighborhood, spatial)


def problem(kernel, kernel_size, spatial, *, bits=16, dim=32, bias=False, **rest):
    return configurations.Problem(kernel, bits, dim, axes(kernel_size, spatial, **rest), bias)


@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
def test_a_new_map_size_takes_the_same_configuration(kernel):
    chosen = {
        configurations.ranked(problem(kernel, (7, 7), spatial, bias=True), "hopper", 227 << 10)
        for spatial in ((56, 56), (28, 28), (14, 14), (8, 9), (224, 1000))
    }
    assert len(chosen) == 1


def machine_code() -> dict[str, dict[str, dict]]:
    """The committed table: by row and launch, by target."""
    return json.loads((ROOT / "benchmarks" / "results" / "gpu-code.json").read_text(encoding="utf-8"))["lines"]


def test_no_warps_repeat_the_work_of_others():
    """Each weight takes one exponential: 1000 are 62.5 cycles of a multiprocessor, twice 125; few more rescale sums."""
    fused = {
        row.id
        for row in configurations.rows()
        if row.kernel.partition("_")[0] in ("forward", "query", "key") and row.bits == 16
    }
    counted = 0
    for name, targets in machine_code().items():
        for target, code in targets.items():
            if name.split()[0] in fused and target != "gfx942":
                assert 60 <= code["cycles"]["exponentials"] <= 80, (name, target)
                counted += 1
    assert counted > 40


def test_costs_are_the_bounds_of_the_machine_code():
    lines = machine_code()
    for row in configurations.rows():
        kind = gpu_compile.KINDS[row.kernel][0]
        for has_bias, cost in enumerate(row.cost):
            never = gpu_compile.WITHOUT_BIAS if has_bias else gpu_compile.FOR_THE_BIAS
            if row.bias in (None, bool(has_bias)) and kind not in never:
                name = " ".join([row.id, kind, *["bias"] * has_bias, *["ieee"] * (row.bits == 32)])
                if "sm_90" in lines[name]:
                    assert cost == max(lines[name]["sm_90"]["cycles"].values()), name


def test_a_loop_is_counted_by_the_pipes_it_goes_through():
    code = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0020*/               @P0 LDSM.16.M88.4 R8, [R4] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
.L_x_1:
        /*0040*/                   HMMA.16816.F32 R12, R8, R10, R12 ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   STG.E.128 [R2.64], R12 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""
    assert len(gpu_bounds.inner_loop(code)) == 3
    loop = gpu_bounds.inner_loop(code.replace("               @P1 BRA `(.L_x_1)", "                   NOP"))
    found = gpu_bounds.bounds(loop, pairs=1000, warps=4, registers=128, shared=16 << 10)
    # eight instructions; 16 bytes for each of 32 lanes three times; four programs fit, and loads are ahead of the work
    assert found == (8, 4 * 12, 8, 6.5, 8 * 4.5 / 4)
    at_once = [each.replace("LDGSTS", "LDG") for each in loop]
    waiting = gpu_bounds.bounds(at_once, 1000, 4, 128, 16 << 10).waiting
    assert waiting == (8 * 4.5 + 700) / 4


def test_the_page_has_the_bounds_of_today():
    content = f"\n{gpu_bounds.table()}\n"
    made = pages.replaced(gpu_bounds.PAGE, gpu_bounds.BEGIN, gpu_bounds.END, content)
    assert made == gpu_bounds.PAGE.read_text(encoding="utf-8")


def test_what_was_measured_on_a_device_holds_there(monkeypatch):
    call = problem("forward", (13, 13), (56, 56))
    document = {"measured": {}, "rows": []}
    monkeypatch.setattr(configurations, "_document", lambda: document)
    rows = configurations.rows()
    monkeypatch.setattr(configurations, "rows", lambda: rows)

    def first(device, vendor="hopper"):
        configurations.ranked.cache_clear()
        return configurations.ranked(call, vendor, 227 << 10, device)[0][0].id

    try:
        estimated = first("sm_90")
        measured = configurations.ranked(call, "hopper", 227 << 10, "sm_90")[-1][0].id
        assert estimated != measured
        configurations.remember(document, "sm_90", {call.key: measured, "other": "row"})
        assert first("sm_90") == measured and first("sm_80") == first("") == estimated
        assert first("gfx942", "hip") != measured
        document["measured"][call.key] = measured  # of a device that is not said
        assert first("sm_80") == measured
        configurations.remember(document, "sm_80", {call.key: estimated})
        assert first("sm_80") == estimated
        assert json.loads(configurations.as_text(document)) == document
    finally:
        configurations.ranked.cache_clear()


def test_the_table_of_configurations_is_as_it_is_written():
    text = configurations.PATH.read_text(encoding="utf-8")
    assert configurations.as_text(json.loads(text)) == text


@needs_triton
def test_devices_are_told_apart_by_their_architecture(monkeypatch):
    from nbhd.backends.triton import launches

    properties = SimpleNamespace(major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-", name="Max 1550")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: properties)
    launches._device.cache_clear()
    try:
        assert launches._device("cuda", 0)[::2] == ("hopper", "sm_90")
        assert launches._device("xpu", 0)[::2] == ("xpu", "Max 1550")
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert launches._device("cuda", 1)[::2] == ("hip", "gfx942")
    finally:
        launches._device.cache_clear()


@pytest.fixture
def multiplication():
    """PyTorch's switch for float32, put back afterwards."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    yield switch
    switch.fp32_precision = before


@needs_triton
def test_a_plan_serves_calls_of_its_layout_alone(monkeypatch, multiplication):
    from nbhd.backends.triton import launches

    monkeypatch.setattr(launches, "target_of", lambda tensor: launches.Target("hopper", 227 << 10))
    monkeypatch.setattr(launches, "_maps", {})
    neighborhood = Neighborhood((3, 3), (1, 1), (1, 1), (False, False))
    tensor, unaligned = torch.empty(2, 4, 5, 2, 16), torch.empty(2, 4, 5, 2, 17)[..., :16]
    multiplication.fp32_precision = "ieee"
    first = launches.map_of(neighborhood, tensor, tensor, tensor)
    assert launches.map_of(neighborhood, torch.empty_like(tensor), tensor, tensor) is first
    kept = first.keep("a launch", object)
    first.admit(tensor, tensor)
    assert first.keep("a launch", object) is kept
    first.admit(unaligned)
    assert first.align == 1 and first.keep("a launch", object) is not kept
    given = [
        (unaligned, tensor, tensor), (tensor.half(),) * 3, (tensor[:1],) * 3, (tensor, tensor[:, :, :, :1], tensor),
        (tensor, tensor, tensor, tensor), (tensor.to("meta"),) * 3,
    ]  # fmt: skip
    others = [launches.map_of(neighborhood, *tensors) for tensors in given]
    others.append(launches.map_of(replace(neighborhood, stride=(1, 2)), tensor, tensor, tensor))
    multiplication.fp32_precision = "tf32"
    others.append(launches.map_of(neighborhood, tensor, tensor, tensor))
    assert (first.precision, others[-1].precision) == ("ieee", "tf32")
    assert len({id(each) for each in (first, *others)}) == 9


@pytest.mark.parametrize("vendor", ["cuda", "hopper"])
def test_nat_is_done_in_one_visit(vendor):
    for spatial in ((56, 56), (7, 7)):
        for kernel in ("forward", "query", "key"):
            row, tile = configurations.ranked(problem(kernel, (7, 7), spatial, bias=True), vendor, 227 << 10)[0]
            assert row.kernel == f"{kernel}_once" and {tile.queries, tile.keys} <= {(2, 1, 8), (8, 1, 16), (8, 1, 8)}


@pytest.mark.parametrize(
    "vendor, shared",
    [("cuda", 99 << 10), ("cuda", 163 << 10), ("hopper", 227 << 10), ("hip", 64 << 10), ("xpu", 64 << 10)],
)
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
def test_there_is_a_configuration_for_every_call(vendor, shared, bits, dim):
    windows = [
        ((7, 7), (56, 56)),
        ((80, 80), (256, 256)),
        ((2048,), (32768,)),
        ((18, 24, 24), (30, 48, 80)),
        ((1, 1), (9, 9)),
    ]
    for kernel in configurations.FORMS:
        for window, spatial in windows:
            for bias in (False, True):
                assert configurations.ranked(
                    problem(kernel, window, spatial, bits=bits, dim=dim, bias=bias), vendor, shared
                ), (kernel, window)  # fmt: skip


@pytest.mark.parametrize(
    "window, spatial, most",
    [
        ((3, 3), (56, 56), 7.2),
        ((5, 5), (56, 56), 2.6),
        ((7, 7), (56, 56), 2.7),
        ((7, 7), (7, 7), 1.8),
        ((13, 13), (56, 56), 3.8),
        ((80, 80), (256, 256), 1.35),
        ((2048,), (32768,), 1.1),
        ((18, 24, 24), (30, 48, 80), 1.9),
        ((5, 5, 5), (16, 32, 32), 7.0),
    ],
)
def test_little_is_visited_in_vain(window, spatial, most):
    """Pairs visited by the forward over pairs needed, away from borders: arithmetic, not a time."""
    call = problem("forward", window, spatial, dim=32 if len(window) == 2 and window[0] < 80 else 128)
    row, tile = configurations.ranked(call, "hopper", 227 << 10)[0]
    assert 1 <= configurations.visited(row, tile, call) <= most


def test_nothing_imports_triton():
    code = """
import sys, torch, nbhd
nbhd.na2d(*(torch.zeros(1, 4, 4, 1, 8) for _ in range(3)), 3)
from nbhd import backends
from nbhd.backends import triton
backends.load("triton").why_unusable()
print("triton" in sys.modules)
"""
    assert process("-c", code, interpret=False).strip() == "False"


def test_first_for_gpus():
    assert backends.order("cuda") == ("triton", "reference")
    assert backends.order("xpu") == ("triton", "reference")
    assert "triton" not in backends.order("cpu")


def call_on(device: str, dtype=torch.float32, dim: int = 8) -> Call:
    tensor = SimpleNamespace(device=SimpleNamespace(type=device, index=0), dtype=dtype, shape=(1, 5, 5, 2, dim))
    return Call(tensor, tensor, tensor, None, Neighborhood((3, 3), (1, 1), (1, 1), (False, False)))  # type: ignore[arg-type]


def test_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "_capability", lambda index: (9, 0))
    assert triton.why_not(call_on("cuda")) is None
    assert triton.why_not(call_on("xpu")) is None
    assert "CUDA, ROCm and XPU" in str(triton.why_not(call_on("cpu")))
    assert "float64" in str(triton.why_not(call_on("cuda", torch.float64)))
    assert "256" in str(triton.why_not(call_on("cuda", dim=257)))
    monkeypatch.setattr(triton, "_capability", lambda index: (7, 5))
    assert "8.0" in str(triton.why_not(call_on("cuda")))
    if triton.why_unusable() is None:
        tensor = torch.zeros(1, 5, 5, 1, 8)
        with pytest.raises(BackendError, match="CUDA, ROCm and XPU"):
            na2d(tensor, tensor, tensor, 3, backend="triton")


def test_launches_on_the_device_of_the_tensors(monkeypatch):
    for kind in ("cuda", "xpu"):
        given = []
        monkeypatch.setattr(getattr(torch, kind), "device", lambda device, given=given: given.append(device))
        device = SimpleNamespace(type=kind, index=1)
        triton._on(SimpleNamespace(device=device))
        assert given == [device]
    with triton._on(torch.empty(0)):
        pass


def test_says_what_to_install(monkeypatch):
    def forget():
        triton.why_unusable.cache_clear()
        triton.version.cache_clear()

    forget()
    try:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "not installed" in triton.why_unusable() and "PyTorch 2.11" in triton.why_unusable()
        forget()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(triton.metadata, "version", lambda name: "3.5.1")
        assert "3.5.1 is too old, 3.6 is needed" in triton.why_unusable()
        forget()
        monkeypatch.setattr(triton.metadata, "version", lambda name: "3.6.0+git1234")
        assert triton.why_unusable() is None
    finally:
        forget()


@functools.cache
def code() -> dict:
    return json.loads(process("-W", "error", "-m", "tests.backends.triton_code", interpret=False))


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_for_real_targets_as_the_table_says():
    table = json.loads((ROOT / "benchmarks" / "results" / "gpu-code.json").read_text(encoding="utf-8"))
    found = code()
    assert len(found["codes"]) == 4
    assert set().union(*found["codes"].values()) == {"sm_80", "sm_90", "gfx942"}
    for name, targets in found["codes"].items():
        for target, each in targets.items():
            assert each["spilled"] <= (0 if found["triton"] == table["triton"] else gpu_compile.A_FEW), (name, target)
            assert sum(each["matrix"].values()) > 0
            if found["triton"] == table["triton"]:  # other versions give other registers
                assert each == table["lines"][name][target], (name, target)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiles_for_other_gpus_and_says_what_does_not_fit():
    found = code()["others"]
    assert "of shared memory, of 1024" in found.pop("tiny")
    assert len(found) == 6
    assert not any(found.values()), found


@pytest.mark.parametrize(
    "name, command",
    [
        ("gpu-code.json", "python -m benchmarks.gpu_compile --write"),
        (
            "gpu-code-triton-3.6.json",
            "python -m benchmarks.gpu_compile --output benchmarks/results/gpu-code-triton-3.6.json, with Triton 3.6",
        ),
    ],
)
def test_the_tables_of_machine_code_are_of_these_kernels(name, command):
    table = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    assert table["sources"] == gpu_compile.sources(), f"{name} is of other kernels than these: {command}"
    assert all(table["lines"].values())


def test_a_digest_of_the_kernels_sees_code_and_rows_and_no_comments(monkeypatch, tmp_path):
    folder = configurations.PATH.parent
    for path in (*folder.glob("*.py"), configurations.PATH):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = gpu_compile.sources()
    monkeypatch.setattr(configurations, "PATH", tmp_path / configurations.PATH.name)
    kernels = tmp_path / "key_kernels.py"
    text = kernels.read_text(encoding="utf-8")
    kernels.write_text(text.replace('"""A program does', '# new\n    """Each program does'), encoding="utf-8")
    assert gpu_compile.sources() == before
    kernels.write_text(text.replace("scale * LN2", "scale * LOG2E"), encoding="utf-8")
    assert gpu_compile.sources() != before
    kernels.write_text(text, encoding="utf-8")
    first, *others = configurations.rows()
    monkeypatch.setattr(configurations, "rows", lambda: (replace(first, cost=(0, 0), shared={}), *others))
    assert gpu_compile.sources() == before
    monkeypatch.setattr(configurations, "rows", lambda: (replace(first, warps=16), *others))
    assert gpu_compile.sources() != before


@needs_triton
def test_a_part_of_the_rows_is_not_written_beside_old_ones(monkeypatch, capsys, tmp_path):
    path = tmp_path / "code.json"
    for text in (None, "{}"):
        if text is not None:
            path.write_text(text, encoding="utf-8")
        assert gpu_compile.main(["--only", "fo16-32", "--output", str(path)]) == 2
        assert f"{path} is of other kernels" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "{}"


def test_the_table_of_machine_code_is_whole_and_spills_no_more_than_is_allowed():
    table = json.loads((ROOT / "benchmarks" / "results" / "gpu-code.json").read_text(encoding="utf-8"))
    assert {name.split()[0] for name in table["lines"]} == {row.id for row in configurations.rows()}
    for row in configurations.rows():
        vendors = {"hopper"} if "hopper" in row.vendors else set(row.vendors) or {"cuda", "hip"}
        wanted = {"sm_90"} if vendors == {"hopper"} else {"cuda": {"sm_80", "sm_90"}, "hip": {"gfx942"}}
        for name, targets in table["lines"].items():
            if name.split()[0] != row.id:
                continue
            if isinstance(wanted, dict):
                names = set().union(*(t for v, t in wanted.items() if v in vendors))
                names -= {"gfx942"} if name.endswith("tf32") else set()
            else:
                names = wanted
            assert targets.keys() == names, name
            for each in targets.values():
                assert each["spilled"] <= gpu_compile.MAY_SPILL.get(row.id, 0), name
                assert each["shared"] <= max(row.shared.values())


@pytest.mark.parametrize("name, most_reads, most_stores", [("gpu-code.json", 5, 0), ("gpu-code-triton-3.6.json", 9, 3)])
def test_inner_loops_spill_as_little_as_the_page_says(name, most_reads, most_stores):
    lines = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))["lines"]
    found = {line: code["turn"] for line, targets in lines.items() for code in targets.values() if code["turn"]}
    assert len(found) > 100
    for line, (reads, stores) in found.items():
        if "32-256" not in line:  # float32 with more than 128 channels
            assert reads <= most_reads and stores <= most_stores, line


def test_the_oldest_triton_has_code_for_every_row_too():
    found = json.loads((ROOT / "benchmarks" / "results" / "gpu-code-triton-3.6.json").read_text(encoding="utf-8"))
    assert tuple(map(int, found["triton"].split(".")))[:2] == triton.OLDEST
    rows = {row.id: row for row in configurations.rows()}
    assert {name.split()[0] for name in found["lines"]} == rows.keys()
    for name, targets in found["lines"].items():
        for each in targets.values():
            assert each["spilled"] <= gpu_compile.MAY_SPILL.get(name.split()[0], gpu_compile.A_FEW), name


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_map_size_compiles_nothing():
    assert code()["specializations"] == {"nat": 1, "odd-channels": 1, "dilated": 1, "sequence": 1}
    assert code()["pointers"] == 2  # where tensors begin is no part of a plan


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_windows_of_one_axis_and_of_three():
    kinds = {"forward", "query", "table", "key", "pairs", "gather", "gather-table", "scatter"}
    assert {name: set(found) for name, found in code()["paths"].items()} == dict.fromkeys(
        ("sequence", "row", "volume"), kinds
    )


def test_gpu_check_and_tune_refuse_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for module in ("benchmarks.gpu_check", "benchmarks.gpu_tune"):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", module], capture_output=True, text=True, cwd=ROOT, check=False,
            env=environment | {"PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "no GPU" in done.stderr or "Triton is not installed" in done.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_numerics_of_gpu_check_run_under_the_interpreter(tmp_path):
    process("-m", "benchmarks.gpu_check", "--interpret", "--output", str(tmp_path / "r.json"), interpret=False)
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert len(report["numerics"]) == 4 and all(each["passed"] for each in report["numerics"])
