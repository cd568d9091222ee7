"""What ``test_triton.py`` compiles, in a process of its own without the interpreter: prints one JSON object."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import torch
import triton
from benchmarks import gpu_code, gpu_compile
from benchmarks.cases import Case

from nbhd.backends.triton import attention, launches

#: A once and a walked kernel, forward and both backward ones, one of float32.
LINES = ("fo16-32 forward bias", "ko16-32 key bias", "fl16-64x64 forward", "fl32-64 forward ieee")

#: The table has planes. Where an axis is missing, or has windows of one key, the kernels are other code.
PATHS = {
    "sequence": Case("s", (400,), 2, 64, (129,), has_bias=True, dtype="float16"),
    "row": Case("r", (9, 50), 2, 32, (1, 7), has_bias=True, dtype="bfloat16"),
    "volume": Case("v", (8, 16, 16), 2, 32, (3, 4, 5), has_bias=True, dtype="float32"),
}


def path_of(case: Case, target: str) -> dict[str, int]:
    """Registers by kind of launch, each with the row that is chosen: all of them compile."""
    gpu, limits = gpu_code.TARGETS[target]
    found = {}
    for kind, call, build in gpu_code.plans(case, limits):
        kernel = "gather" if kind == "gather-table" else kind
        row, tile = launches.rows_of(call, kernel, case.has_bias and kernel not in ("gather", "scatter"))[0]
        launch = gpu_code.main_launch(build(row, tile))
        found[kind] = gpu_code.read(gpu_code.compiled(launch, gpu), row.queries * row.keys).registers
    return found


def specializations(case: Case, target: str) -> list[str]:
    """What decides whether each launch of a call compiles anew."""
    gpu, limits = gpu_code.TARGETS[target]
    found = []
    for kind, call, build in gpu_code.plans(case, limits):
        kernel = "gather" if kind == "gather-table" else kind
        row, tile = launches.rows_of(call, kernel, case.has_bias and kernel not in ("gather", "scatter"))[0]
        found += [gpu_code.specialization(launch, gpu) for launch in build(row, tile)]
    return found


def of_pointers(case: Case, target: str) -> list[str]:
    """The same of one plan, for a query that begins where 16 bytes do, and for one that does not."""
    gpu, limits = gpu_code.TARGETS[target]
    shape = (case.batch, *case.spatial, case.heads, case.head_dim)
    size = math.prod(shape)
    memory, out, lse = torch.empty(size + 1, dtype=case.torch_dtype), torch.empty(shape), torch.empty(shape[:-1])
    call = launches.Map(memory[:size].view(shape), case.heads, case.head_dim, case.head_dim, case.neighborhood, limits)
    found = []
    for begin in (0, 1):
        query = memory[begin : begin + size].view(shape)
        plan = attention.ForwardPlan(call, query, query, query, None, out, lse, 1.0)
        row, tile = launches.rows_of(call, "forward", False)[0]
        found += [gpu_code.specialization(launch, gpu) for launch in plan.launches(row, tile)]
    return found


def on_others(line: gpu_compile.Line) -> dict[str, str | None]:
    """Why the line does not run on each of the other GPUs; under "tiny" on one with a kilobyte of shared memory."""
    found = {target: gpu_compile.why_not(line, target) for target in gpu_code.OTHERS}
    gpu, limits = gpu_code.OTHERS["sm_120"]
    gpu_code.OTHERS["tiny"] = gpu, limits._replace(shared=1024)
    return {**found, "tiny": gpu_compile.why_not(replace(line, row=replace(line.row, shared={})), "tiny")}


def main() -> None:
    codes = {}
    others = {}
    for line in gpu_compile.lines():
        if line.name in LINES:
            found = {target: gpu_compile.compile_line(line, target) for target in gpu_code.TARGETS}
            codes[line.name] = {target: code._asdict() for target, code in found.items() if code is not None}
        if line.name == LINES[0]:
            others = on_others(line)
    same = {}
    plain = Case("map", (56, 56), 2, 32, (7, 7), batch=2, has_bias=True, dtype="bfloat16")
    for name, case in {
        "nat": plain,
        "odd-channels": replace(plain, heads=3, head_dim=24, has_bias=False),
        "dilated": replace(plain, dilation=(2, 3), has_bias=False),
        "sequence": Case("s", (400,), 1, 64, (129,), is_causal=(True,), has_bias=False, dtype="float16"),
    }.items():
        sizes = ((56, 56), (64, 48), (21, 30), (113, 57)) if len(case.spatial) == 2 else ((400,), (512,), (131,))
        # the launches of one bias gradient may be more or fewer, so what is compiled is compared as a set
        found = {
            frozenset(specializations(replace(case, spatial=s, batch=b), "sm_90")) for s in sizes for b in (1, 2, 5)
        }
        same[name] = len(found)
    paths = {name: path_of(case, "sm_90") for name, case in PATHS.items()}
    pointers = len(set(of_pointers(plain, "sm_90")))
    report = {"codes": codes, "specializations": same, "pointers": pointers, "paths": paths, "others": others}
    print(json.dumps({"triton": triton.__version__, **report}))


if __name__ == "__main__":
    main()
