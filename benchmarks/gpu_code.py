"""Machine code of the GPU kernels, made without a GPU: what a launch would compile to, and what is in it.

A launch is planned on CPU tensors for a target that is not there, specialised exactly as Triton would at the call, and
compiled with the assemblers that come with Triton. Counts are of instructions in the code, not of what is executed.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import gpu_bounds
from benchmarks.cases import Case
from nbhd.backends.triton import attention, configurations, unfused
from nbhd.backends.triton.boxes import Tile
from nbhd.backends.triton.configurations import Row
from nbhd.backends.triton.launches import Launch, Map, Target

#: What is compiled for: Triton's target, and shared memory that a program may have.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Target("cuda", 163 << 10)),
    "sm_90": (GPUTarget("cuda", 90, 32), Target("hopper", 227 << 10)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Target("hip", 64 << 10)),
}
#: GPUs that rows must compile for and fit as well. Their code is looked at no further.
OTHERS = {
    "sm_89": (GPUTarget("cuda", 89, 32), Target("cuda", 99 << 10)),
    "sm_100": (GPUTarget("cuda", 100, 32), Target("cuda", 227 << 10)),
    "sm_120": (GPUTarget("cuda", 120, 32), Target("cuda", 99 << 10)),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), Target("hip", 64 << 10)),
    "gfx950": (GPUTarget("hip", "gfx950", 64), Target("hip", 160 << 10)),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), Target("hip", 64 << 10)),
}

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Code(NamedTuple):
    """``registers`` and ``spilled`` (bytes) of a thread, ``shared`` bytes of a program, matrix instructions by kind.

    On NVIDIA ``turn``: spilled values that a turn of the inner loop reads back, and stores; ``cycles``: its bounds
    (:mod:`benchmarks.gpu_bounds`).
    """

    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    turn: list[int]
    cycles: dict[str, int]


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The launch's kernel as it would be specialised and compiled."""
    backend = make_backend(target)
    kernel = launch.kernel
    keywords = {**launch.constants, **launch.options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def specialization(launch: Launch, target: GPUTarget) -> str:
    """What decides whether a launch compiles anew."""
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, make_backend(target))
    return repr(bind(*launch.arguments, **launch.constants, **launch.options)[1])


def read(code: Any, pairs: int) -> Code:
    """Count what is in a compiled kernel that visits ``pairs`` in a turn of its inner loop."""
    return _cuda(code, pairs) if "cubin" in code.asm else _amd(code)


def _cuda(code: Any, pairs: int) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(code.asm["cubin"])
        text = subprocess.run([_BIN / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([_BIN / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", text, re.MULTILINE)
    counts = Counter(found)
    spilled = 4 * (counts["LDL"] + counts["STL"])
    matrix = {name: counts[name] for name in ("HGMMA", "HMMA", "FFMA") if counts[name] and (name != "FFMA")}
    if not matrix:
        matrix = {"FFMA": counts["FFMA"]}
    shared = int(code.metadata.shared)
    loop = gpu_bounds.inner_loop(text)
    bounds = gpu_bounds.bounds(loop, pairs, code.metadata.num_warps, registers, shared)
    cycles = {name: round(each) for name, each in bounds._asdict().items()}
    return Code(registers, max(spilled, stack), shared, matrix, list(gpu_bounds.spilled(loop)), cycles)


def _amd(code: Any) -> Code:
    text = code.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    body = [
        line.split()[0] for line in text.splitlines() if re.match(r"^\t[sv]_|^\t(ds|global|buffer|flat|scratch)_", line)
    ]
    kinds = Counter(
        "MFMA" if name.startswith("v_mfma") else "scratch" if name.startswith("scratch_") else "" for name in body
    )
    matrix = (
        {"MFMA": kinds["MFMA"]}
        if kinds["MFMA"]
        else {"FMA": sum(n.startswith(("v_fma", "v_pk_fma", "v_fmac", "v_dot")) for n in body)}
    )
    spilled = 4 * (number("vgpr_spill_count") + kinds["scratch"])
    # vector registers alone: a thread has 512 with the accumulators
    return Code(number("vgpr_count"), spilled, int(code.metadata.shared), matrix, [], {})


def plans(case: Case, target: Target) -> Iterator[tuple[str, Map, Any]]:
    """For each kernel kind of a case, forward, backward and unfused: the call, and its ``launches(row, tile)``."""
    dtype = case.torch_dtype
    shape = (case.batch, *case.spatial, case.heads, case.head_dim)
    query, key, value, d_out = (torch.empty(shape, dtype=dtype) for _ in range(4))
    bias = torch.empty(case.heads, *(2 * k - 1 for k in case.kernel_size)) if case.has_bias else None
    lse = torch.empty(shape[:-1])
    scale = case.head_dim**-0.5

    def call() -> Map:
        return Map(query, case.heads, case.head_dim, case.head_dim, case.neighborhood, target)

    made = call()
    yield "forward", made, attention.ForwardPlan(made, query, key, value, bias, d_out, lse, scale).launches
    made = call()
    back = attention.BackwardPlan(made, d_out, None, query, key, value, bias, d_out, lse, scale)
    yield "query", made, back.query_launches
    if case.has_bias:
        yield "table", made, back.table_launches
    yield "key", made, back.key_launches
    slots = torch.empty((*shape[:-1], case.neighborhood.slots), dtype=dtype)
    made = call()
    yield "pairs", made, unfused.PairsPlan(made, query, key, bias, slots, scale).launches
    made = call()
    gather = unfused.GatherPlan(made, slots, key, scale)
    yield "gather", made, gather.launches
    if case.has_bias:
        gather.d_bias = torch.zeros(case.heads, *(2 * a.kernel_size - 1 for a in made.axes))
        yield "gather-table", made, gather.table_launches
    made = call()
    yield "scatter", made, unfused.ScatterPlan(made, slots, query, scale).launches


def tile_of(kind: str, made: Map, row: Row, has_bias: bool) -> Tile | None:
    """The boxes of a row for a kind of launch, None where the row is not for it."""
    kernel = "gather" if kind == "gather-table" else kind
    return configurations.tile(
        row, made.problem(kernel, has_bias and kernel in ("forward", "query", "table", "key", "pairs"))
    )


def main_launch(launches: Iterator[Launch]) -> Launch:
    """The launch of the kernel itself, after what prepares it."""
    return next(launch for launch in launches if launch.row is not None)
