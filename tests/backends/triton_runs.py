"""What ``test_triton.py`` runs in processes of its own: the kernels under Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 python -m tests.backends.triton_runs GROUP

prints one JSON object a line, ``{"name": ..., "errors": {...}}`` or whatever the group finds. The interpreter is slow
for two reasons that do not matter here: it patches the language anew at each call of a helper, and it checks every
integer operation for overflow in 64 bits. The first is done once, the second in one group.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import types
import warnings
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources

from nbhd import apply_attention_weights, na2d
from nbhd.backends import reference, triton as backend
from nbhd.backends.triton import boxes, configurations, launches
from nbhd.geometry import Neighborhood, axis_table
from nbhd.qkv import are_parts, room_for_gradients

NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_rel_pos_bias")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def case(spatial, k, s=1, d=1, c=False, heads=1, kv_heads=None, dim=16, dim_v=None, bias=True, batch=1, **rest):
    axes = len(spatial)

    def each(x):
        return x if isinstance(x, tuple) else (x,) * axes

    return {
        "spatial": spatial, "neighborhood": Neighborhood(each(k), each(s), each(d), each(c)), "heads": heads,
        "kv_heads": kv_heads or heads, "dim": dim, "dim_v": dim_v or dim, "bias": bias, "batch": batch, **rest,
    }  # fmt: skip


#: Every option alone, at its edges and mixed; small odd maps. A bias where the operator defines it.
FUSED = {
    "nat": case((8, 9), 7, heads=2, dim=32),
    "nat-no-bias": case((7, 10), 7, dim=32, bias=False),
    "window-is-map": case((7, 7), 7, dim=32),
    "minimum": case((3, 3), 3, dim=8),
    "grouped-heads-odd-channels": case((5, 7), (3, 4), heads=4, kv_heads=2, dim=24, dim_v=40),
    "dilated": case((8, 7), (4, 3), d=(2, 2), heads=2, kv_heads=1),
    "strided": case((7, 11), (5, 6), s=(2, 3), bias=False),
    "blocked": case((8, 12), 4, s=4, bias=False),
    "causal-rows-strided": case((7, 11), (5, 6), s=(2, 3), c=(True, False), bias=False),
    "causal-both-dilated": case((9, 12), (3, 4), d=(1, 2), c=True),
    "one-row-windows": case((5, 20), (1, 7)),
    "wide-loop": case((3, 35), (3, 33), dim=64, dim_v=16),
    "1d": case((57,), 17, d=2, heads=2, dim=64),
    "1d-causal": case((70,), 33, c=True, dim=8),
    "1d-long": case((80,), 70, dim=8),
    "1d-long-strided": case((90,), 70, s=32, bias=False, dim=8),
    "1d-one-key": case((30,), 1, dim=8),
    "1d-shorter-than-a-tile": case((5,), 3, dim=8),
    "3d": case((3, 4, 5), (2, 3, 3)),
    "3d-causal-time": case((4, 5, 6), (3, 3, 4), c=(True, False, False), bias=False),
    "3d-everything": case((4, 5, 7), (2, 2, 3), s=(1, 2, 2), d=(2, 1, 2), c=(False, True, False), bias=False),
    "wide-channels": case((4, 5), 3, dim=80, dim_v=256),
    "scale-zero": case((4, 5), 3, scale=0.0, dim=12, dim_v=5),
    "scale-negative-loop": case((3, 36), (3, 35), scale=-0.7, bias=False, dim=12),
    "no-lse-gradient": case((5, 6), 3, with_lse=False),
}
#: What runs every time; ``everything`` has the rest.
OFTEN = (
    "nat", "window-is-map", "grouped-heads-odd-channels", "dilated", "causal-rows-strided", "1d-causal", "1d-long",
    "3d-everything", "wide-channels", "scale-negative-loop", "no-lse-gradient", "1d-one-key",
)  # fmt: skip
SHORT = {
    "nat": case((8, 9), 7, heads=2, dim=32),
    "loop": case((4, 37), (4, 33), dim=64, heads=2, kv_heads=1),
    "sequence": case((70,), 33, c=True, dim=40),
    # what they have in common must leave no trace in the gradients of scores
    "values-with-a-mean": case((8, 9), 7, heads=2, dim=32, mean=16),
}
UNFUSED = {
    "nat": case((8, 9), 7, heads=2, dim=32),
    "grouped-dilated": case((8, 9), (4, 3), d=(2, 3), heads=2, kv_heads=1, dim=24),
    "strided": case((6, 7), (4, 5), s=(3, 2), bias=False, dim=8),
    "causal": case((6, 9), (3, 4), c=(True, False), dim=8),
    "1d": case((90,), 65, dim=8),
    "3d-causal": case((3, 4, 5), (2, 3, 3), c=(True, False, True), bias=False, dim=8),
}


def make(which: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> tuple[tuple, tuple, Neighborhood, float]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)

    lead, neighborhood = (which["batch"], *which["spatial"]), which["neighborhood"]
    query = normal(*lead, which["heads"], which["dim"])
    key, value = (normal(*lead, which["kv_heads"], which[n]) for n in ("dim", "dim_v"))
    bias = normal(which["heads"], *(2 * k - 1 for k in neighborhood.kernel_size), kind=F32) if which["bias"] else None
    d_out = normal(*lead, which["heads"], which["dim_v"])
    if which.get("mean"):  # in 16 bits exact to a hundredth of it
        value, d_out = value + which["mean"], d_out + 1
    d_lse = normal(*lead, which["heads"], kind=F32) if which.get("with_lse", True) else None
    return (query, key, value, bias), (d_out, d_lse), neighborhood, which.get("scale", which["dim"] ** -0.5)


def run(module, tensors, gradients, neighborhood, scale, dtype=None, into=None):
    query, key, value, bias = (t if t is None or dtype is None else t.to(dtype) for t in tensors)
    d_out, d_lse = (t if t is None or dtype is None else t.to(dtype) for t in gradients)
    out, lse = module.forward(query, key, value, bias, neighborhood, scale)
    back = module.backward(d_out, d_lse, query, key, value, bias, out, lse, neighborhood, scale, into)
    return out, lse, *back


def halves(module, tensors, gradients, neighborhood, scale, dtype=None):
    """Scores, weighted sum and their gradients, the weights being any numbers."""
    query, key, value, bias = (t if t is None or dtype is None else t.to(dtype) for t in tensors)
    d_out = gradients[0] if dtype is None else gradients[0].to(dtype)
    scores = module.scores(query, key, bias, neighborhood, scale)
    d_scores = torch.sin(scores.masked_fill(scores == -math.inf, 0))
    weights = torch.softmax(scores, -1)
    back = module.scores_backward(d_scores, query, key, bias, neighborhood, scale)
    out = module.weighted_sum(weights, value, neighborhood)
    return scores, *back, out, *module.weighted_sum_backward(d_out, weights, value, neighborhood)


def compare(results, plain, truth) -> dict[str, list[float]]:
    """By result: root mean square and largest deviation of ours and of plain PyTorch, relative to the truth's."""
    found = {}
    for i, (ours, other, true) in enumerate(zip(results, plain, truth, strict=True)):
        if true is None:
            assert ours is None
            continue
        assert ours.dtype == other.dtype and ours.shape == other.shape and ours.is_contiguous(), i
        unused = true == -math.inf
        assert torch.equal(ours == -math.inf, unused)
        true, ours, other = (t.double().masked_fill(unused, 0) for t in (true, ours, other))
        norm, top = true.norm().item() or 1.0, true.abs().max().item() or 1.0
        found[i] = [
            x for t in (ours, other) for x in ((t - true).norm().item() / norm, (t - true).abs().max().item() / top)
        ]
    return found


def say(name: str, **found: Any) -> None:
    print(json.dumps({"name": name, **found}), flush=True)


def sweep(cases: dict[str, Any], how, dtypes) -> None:
    for (name, which), dtype in itertools.product(cases.items(), dtypes):
        arguments = make(which, dtype)
        ours = how(backend, *arguments)
        plain, truth = how(reference, *arguments), how(reference, *arguments, torch.float64)
        say(f"{name}-{str(dtype).removeprefix('torch.')}", errors=compare(ours, plain, truth))


def fused() -> None:
    sweep({name: FUSED[name] for name in OFTEN}, run, [F32])


def everything() -> None:
    sweep(FUSED, run, [F32, BF16])


def short() -> None:
    sweep(SHORT, run, [BF16, F16])


def unfused() -> None:
    sweep(UNFUSED, halves, [F32])
    sweep({"nat": UNFUSED["nat"]}, halves, [BF16])


def rows() -> None:
    """Every row of the table, on a small call it can do, each program with all images."""
    launches.MANY_PROGRAMS = 1
    settings = [case((4, 17), (3, 8), batch=2, bias=has_bias) for has_bias in (True, False)]
    for row in configurations.rows():
        which = settings[row.bias is False]
        arguments = make(which, F16 if row.bits == 16 else F32)
        how = forward_alone if row.kernel.startswith("forward") else backward_alone
        how = halves if row.kernel in ("pairs", "gather", "scatter") else how
        # the gradient of a bias has launches of its own after a walk
        walks = [r for r in configurations.rows() if r.kernel == "query_loop" and r.bits == row.bits and r.bias is None]
        with only(row, *walks[: row.kernel == "table_loop"]) as used:
            ours = how(backend, *arguments)
        assert row.id in used
        plain, truth = how(reference, *arguments), how(reference, *arguments, torch.float64)
        say(row.id, errors=compare(ours, plain, truth))


def forward_alone(module, tensors, gradients, neighborhood, scale, dtype=None):
    return module.forward(*(t if t is None or dtype is None else t.to(dtype) for t in tensors), neighborhood, scale)


def backward_alone(module, tensors, gradients, neighborhood, scale, dtype=None):
    """The gradients from the reference's output, so that the forward kernels stay out of it."""
    given = [t if t is None or dtype is None else t.to(dtype) for t in tensors]
    out, lse = reference.forward(*given, neighborhood, scale)
    d_out, d_lse = (t if dtype is None else t.to(dtype) for t in gradients)
    return module.backward(d_out, d_lse, *given, out, lse, neighborhood, scale)


class only:
    """Inside, ``rows`` are what their kernels run, others as always; the list given says which were used."""

    def __init__(self, *rows: configurations.Row) -> None:
        self.rows, self.real, self.used = rows, configurations.ranked, []

    def __enter__(self) -> list[str]:
        forget()

        def ranked(problem, *target):
            for row in self.rows:
                tile = configurations.tile(row, problem)
                if tile is not None:
                    self.used.append(row.id)
                    return ((row, tile),)
            return self.real(problem, *target)

        configurations.ranked = ranked
        return self.used

    def __exit__(self, *_: object) -> None:
        configurations.ranked = self.real
        forget()


def forget() -> None:
    """Plan anew what was planned before something was put in the place of what plans are made of."""
    launches._maps.clear()


def layouts() -> None:
    """Strides, 64-bit offsets, many images: the same bits. Slabs and chunks of the bias gradient: the same values.

    A call like one before plans nothing; another one does.
    """
    tensors, gradients, neighborhood, scale = make(case((4, 5), (3, 4), dim=16, batch=2), F32)
    dense = run(backend, tensors, gradients, neighborhood, scale)

    def same(name, found, other=dense):
        say(name, same=[a is b or torch.equal(a, b) for a, b in zip(found, other, strict=True)])

    same("twice", run(backend, tensors, gradients, neighborhood, scale))
    query, key, value, bias = tensors
    heads_first = [t.movedim(-2, 1).contiguous().movedim(1, -2) for t in (query, key, value)]
    same("heads-first", run(backend, (*heads_first, bias), gradients, neighborhood, scale))
    fused_qkv = torch.stack([query, key, value], -3).unbind(-3)
    same("one-qkv-tensor", run(backend, (*fused_qkv, bias), gradients, neighborhood, scale))
    columns_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    same("columns-first", run(backend, (*columns_first, bias), gradients, neighborhood, scale))
    odd = [torch.cat([t, t[..., :1]], -1)[..., :-1] for t in (query, key, value)]  # rows of 17 numbers
    assert odd[0].stride(-2) == 17
    same("unaligned", run(backend, (*odd, bias), gradients, neighborhood, scale))
    flat = gradients[0][:1, :1, :1, :1].expand_as(gradients[0])
    expanded = run(backend, tensors, (flat, gradients[1]), neighborhood, scale)
    same("expanded-gradient", expanded, run(backend, tensors, (flat.contiguous(), gradients[1]), neighborhood, scale))

    for name, which in {
        "once": case((8, 9), 7, heads=2, batch=2), "loop": case((3, 34), (3, 33), heads=2, dim=8)
    }.items():  # fmt: skip
        arguments = make(which, F32)
        joined = torch.stack(arguments[0][:3], -3).unbind(-3)
        one = run(backend, (*joined, arguments[0][3]), *arguments[1:], into=room_for_gradients(*joined))
        assert are_parts(*one[2:5])
        same(f"gradients-in-one-tensor-{name}", one, run(backend, *arguments))

    admit = launches.Map.admit

    def admit_wide(self, *given):
        admit(self, *given)
        self.wide = True

    forget()
    launches.Map.admit = admit_wide
    same("wide", run(backend, tensors, gradients, neighborhood, scale))
    launches.Map.admit = admit
    forget()
    constants, planned = launches.Map.constants, []

    def count(self, *given, **more):
        planned.append(given)
        return constants(self, *given, **more)

    launches.Map.constants, really = count, launches.Launch.run
    launches.Launch.run = lambda self: None  # only plans are looked at
    other_scale, no_bias, no_lse = (tensors, gradients, neighborhood, 0.3), (*tensors[:3], None), (gradients[0], None)
    halved = [t.bfloat16() for t in tensors[:3]]
    found = {}
    for name, arguments in {
        "first": (tensors, gradients, neighborhood, scale), "again": (tensors, gradients, neighborhood, scale),
        "odd": ((*odd, bias), gradients, neighborhood, scale), "scale": other_scale,
        "no-bias": (no_bias, gradients, neighborhood, scale), "no-lse": (tensors, no_lse, neighborhood, scale),
        "dtype": ((*halved, bias), gradients, neighborhood, scale),
        "expanded": (tensors, (flat, gradients[1]), neighborhood, scale),
    }.items():  # fmt: skip
        planned.clear()
        run(backend, *arguments)
        found[name] = len(planned)
    planned.clear()
    run(backend, (*fused_qkv, bias), *arguments[1:], into=room_for_gradients(*fused_qkv))
    found["one-tensor"] = len(planned)
    launches.Map.constants, launches.Launch.run = constants, really
    say("plans", found=found)
    forget()
    launches.MANY_PROGRAMS = 1
    same("all-images-in-a-program", run(backend, tensors, gradients, neighborhood, scale)[:5], dense[:5])
    add, sizes = launches.Slabs.add, []

    def add_noted(self, total, tables, origin):
        sizes.append(4 * tables.numel())
        add(self, total, tables, origin)

    launches.Slabs.add = add_noted
    for name, which, limit in (
        ("slabs", case((4, 38), (3, 33), heads=2), 1), ("chunks", case((9, 20), (3, 4), heads=2), 1 << 12)
    ):  # fmt: skip
        forget()
        sizes.clear()
        arguments = make(which, F32)
        truth, plain = run(reference, *arguments, torch.float64), run(reference, *arguments)
        launches.TABLE_BYTES, launches.SLAB = limit, 64
        say(name, errors=compare(run(backend, *arguments), plain, truth), tables=len(sizes), largest=max(sizes))


def apart() -> None:
    """Images, or heads, that lie 2^31 numbers apart, in memory of which little is touched: the same bits."""
    launches.MANY_PROGRAMS = 1
    real, kernels = launches.Launch.run, set()

    def run_noted(self):
        kernels.add(self.kernel.fn.__name__)
        real(self)

    launches.Launch.run = run_noted
    step = 1 << 31
    memory = torch.empty(step + (1 << 16), dtype=F16)
    for name, which in {
        "once": case((3, 4), 3, heads=2, batch=2),
        "once-grouped": case((3, 4), 3, heads=2, kv_heads=1, batch=2),
        "loop": case((3, 34), (3, 33), heads=2, dim=8, batch=2),
    }.items():
        tensors, gradients, neighborhood, scale = make(which, F16)
        for axis in (0, -2):
            begin, placed = 0, []
            for tensor in (*tensors[:3], gradients[0]):
                strides = list(tensor.stride())
                strides[axis] = step
                placed.append(memory.as_strided(tensor.shape, strides, begin).copy_(tensor))
                begin += tensor.numel()
            far = (*placed[:3], tensors[3]), (placed[3], gradients[1]), neighborhood, scale
            for how in (run, halves) if name == "once" else (run,):
                found, want = how(backend, *far), how(backend, tensors, gradients, neighborhood, scale)
                same = [a is b or torch.equal(a, b) for a, b in zip(found, want, strict=True)]
                say(f"{name}-{'images' if axis == 0 else 'heads'}-{how.__name__}", same=same)
    say("kernels", found=sorted(kernels))


def framework() -> None:
    """What surrounds the backend: no waiting for the device, torch.compile, autograd through both forms."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(str(function))
            return function(*args, **(kwargs or {}))

    seen: set[str] = set()
    arguments = make(case((3, 4), (2, 3), c=(True, False)), F32)
    with Watch():
        run(backend, *arguments)
        halves(backend, *arguments)
    say("operations", seen=sorted(seen))

    (query, key, value, bias), *_ = make(case((3, 4), 3, dim=8), F32)
    leaves = [t.requires_grad_() for t in (query, key, value, bias)]

    def call(q, k, v, b):
        out, lse = na2d(q, k, v, 3, rel_pos_bias=b, return_lse=True, backend="triton")
        return out.sin().sum() + lse.cos().sum()

    eager = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    other = torch.autograd.grad(compiled(*leaves), leaves)
    truth = torch.autograd.grad(
        sum(f(x) for f, x in zip((lambda o: o.sin().sum(), lambda s: s.cos().sum()),
            na2d(*leaves[:3], 3, rel_pos_bias=bias, return_lse=True, backend="reference"), strict=True)), leaves,
    )  # fmt: skip
    say("compiled", same=[torch.equal(a, b) for a, b in zip(eager, other, strict=True)])
    say("autograd", close=[torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, truth, strict=True)])
    fallback()
    weights = torch.softmax(torch.randn(1, 3, 4, 1, 9), -1).requires_grad_()
    given = [weights, value]
    found, wanted = (
        torch.autograd.grad(apply_attention_weights(*given, 3, backend=name).sin().sum(), given)
        for name in ("triton", "reference")
    )
    say("weights", close=[torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True)])


def fallback() -> None:
    """A row that turns out too large for the device: the next one is run, and on another device it is tried again."""
    arguments = make(case((6, 7), 3), F32)
    ranked, real, tried = launches.rows_of, launches.Launch.run, []

    def loops_first(call, kernel, has_bias):
        return tuple(sorted(ranked(call, kernel, has_bias), key=lambda found: not found[0].kernel.endswith("loop")))

    def refuse_loops(self):
        if self.row is not None and self.row.kernel == "query_loop":
            tried.append(self.row.id)
            raise OutOfResources(1 << 20, 1 << 10, "shared memory")
        real(self)

    forget()
    launches.rows_of, launches.Launch.run = loops_first, refuse_loops
    found, again = run(backend, *arguments), run(backend, *arguments)
    known = {target for target, *_ in launches._too_large}
    launches.rows_of, launches.Launch.run = ranked, real
    launches._too_large.clear()
    forget()
    wanted = run(reference, *arguments)
    close = [torch.allclose(a, b, atol=1e-5) for each in (found, again) for a, b in zip(each, wanted, strict=True)]
    say("too-large", close=close, tried=len(tried), distinct=len(set(tried)), targets=len(known))


def overflow() -> None:
    """With the interpreter's check that no 32-bit integer overflows."""
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=True
    )
    sweep({"nat": case((3, 4), 3, dim=8), "loop": case((36,), 33, dim=8, c=True)}, run, [F32])


def geometry() -> None:
    """The kernels' arithmetic against the geometry tables, every setting of short axes."""
    from tests.backends import triton_kernels

    wrong, count = [], 0
    for k, s, c in itertools.product(range(1, 8), range(1, 8), (0, 1)):
        for length in (k, k + 1, k + 2, 2 * k + 1, 3 * k + 2, 23):
            if s > k or length < k:
                continue
            count += 1
            table = axis_table(length, k, s, 1, bool(c))
            want = torch.stack([
                table.first, table.first + table.count, table.first_query, table.first_query + table.query_count
            ])  # fmt: skip
            out = torch.empty(4, length, dtype=torch.int32)
            triton_kernels.intervals[(1,)](out, length, length, AXES=(k, s, c, 1, 1, 0, 1, 1, 0), BLOCK=32)
            if not torch.equal(out.long(), want):
                wrong.append([k, s, c, length])
    say("intervals", wrong=wrong, count=count)


VISITS = {
    "nat": (case((13, 20), 7), (4, 1, 8), (4, 1, 8)),
    "dilated": (case((17, 14), (3, 4), d=(3, 2)), (2, 1, 4), (2, 1, 2)),
    "strided": (case((14, 17), (6, 5), s=(4, 3)), (4, 1, 4), (2, 1, 4)),
    "causal": (case((40,), 9, c=True), (8, 1, 1), (4, 1, 1)),
    "causal-strided": (case((37,), 9, c=True, s=4), (8, 1, 1), (4, 1, 1)),
    "volume": (case((5, 7, 9), (3, 3, 4), c=(True, False, False)), (2, 2, 4), (2, 2, 4)),
}


def visits() -> None:
    """Boxes visited: exactly those that hold a key (query) some query (key) of the tile sees, each once, in order."""
    from tests.backends import triton_kernels

    for (name, (which, own, walk)), inverse in itertools.product(VISITS.items(), (False, True)):
        spatial, neighborhood = which["spatial"], which["neighborhood"]
        axes, lengths = boxes.axes_of(neighborhood, spatial), boxes.three(spatial, 1)
        most = 200
        programs = boxes.programs(lengths, axes, own)
        out = torch.full((programs, most, 10), -1, dtype=torch.int32)
        count = torch.zeros(programs, dtype=torch.int32)
        flat = tuple(x for a in axes for x in (a.kernel_size, a.stride, int(a.is_causal)))
        triton_kernels.visited[(programs,)](
            out, count, *lengths, *(a.dilation for a in axes), MOST=most, AXES=flat, OWN=own, WALK=walk, INVERSE=inverse
        )
        tables = [
            axis_table(n, a.kernel_size, a.stride, a.dilation, a.is_causal) for n, a in zip(lengths, axes, strict=True)
        ]
        wrong = 0
        owners = []
        for program in range(programs):
            rows = out[program, : count[program]].tolist()
            for row in rows[:1]:
                owners.append(tuple(row[:6]))
                # along each axis: what each owner of the tile sees, as places of its group
                seen = [sees_of(tables[i], axes[i], row[3 + i], row[i], own[i], inverse) for i in range(3)]
                needed = [
                    sorted({(p - min(v)) // walk[i] for owner in seen[i] for p in owner})
                    for i, v in enumerate(union(seen))
                ]
                want = [
                    tuple(min(v) + b * walk[i] for i, (b, v) in enumerate(zip(box, union(seen), strict=True)))
                    for box in itertools.product(*needed)
                ]
                wrong += want != [tuple(r[6:9]) for r in rows]
                for r in rows if not inverse else ():
                    whole = all(
                        set(range(r[6 + i], r[6 + i] + walk[i])) <= set(owner) for i in range(3) for owner in seen[i]
                    )
                    wrong += bool(r[9]) != whole
        counted = math.prod(
            boxes.visits(n, a, o, w, inverse=inverse) for n, a, o, w in zip(lengths, axes, own, walk, strict=True)
        )
        useful = math.prod(int(t.count.sum()) for t in tables)
        say(
            f"{name}{'-inverse' if inverse else ''}", wrong=wrong, distinct=len(set(owners)) == len(owners),
            visited=int(count.sum()), counted=counted, waste=counted * math.prod(own) * math.prod(walk) / useful,
            positions=sum(owned(o, axes, lengths, own) for o in owners), tokens=math.prod(lengths),
        )  # fmt: skip
    dots()


def sees_of(table, axis, group, place, own, inverse) -> list[list[int]]:
    first, count = (table.first_query, table.query_count) if inverse else (table.first, table.count)
    positions = range(group + place * axis.dilation, table.length, axis.dilation)[:own]
    return [[(int(first[p]) - group) // axis.dilation + j for j in range(int(count[p]))] for p in positions]


def union(seen) -> list[set[int]]:
    return [{p for owner in axis for p in owner} for axis in seen]


def owned(owner, axes, lengths, own) -> int:
    """Positions of a tile that are on the map."""
    return math.prod(
        len(range(owner[3 + i] + owner[i] * a.dilation, n, a.dilation)[: own[i]])
        for i, (a, n) in enumerate(zip(axes, lengths, strict=True))
    )


def dots() -> None:
    """The real kernels multiply as often as the tables say, no more: boxes visited are counted by their products."""
    real, calls = interpreter.interpreter_builder.create_dot, [0]

    def create_dot(*args):
        calls[0] += 1
        return real(*args)

    interpreter.interpreter_builder.create_dot = create_dot
    for which, form in (
        (case((40, 3), (33, 3), heads=2, kv_heads=1, bias=False, s=(2, 1)), "loop"),
        (case((20, 23), 7, heads=2, kv_heads=1, batch=2), "once"),  # two query heads for a key head: a walk
        (case((23, 20), 7, heads=2, batch=2), "once"),
    ):
        (query, key, value, bias), (d_out, d_lse), neighborhood, scale = make(which, F32)
        axes, lengths = boxes.axes_of(neighborhood, which["spatial"]), boxes.three(which["spatial"], 1)
        call = launches.Map(query, key.shape[-2], 16, 16, neighborhood)
        calls[0] = 0
        out, lse = backend.forward(query, key, value, bias, neighborhood, scale)
        forward = calls[0]
        backend.backward(d_out, d_lse, query, key, value, bias, out, lse, neighborhood, scale)
        products = []
        # two products a visit forward, three for dQ, four for dK and dV
        for kernel, each in (("forward", 2), ("query", 3), ("key", 4)):
            row, tile = launches.rows_of(call, kernel, bias is not None)[0]
            assert row.kernel == f"{kernel}_{form}"
            is_key = kernel == "key"
            own, walk = (tile.keys, tile.queries) if is_key else (tile.queries, tile.keys)
            visits_ = math.prod(
                boxes.visits(n, a, o, w, inverse=is_key) for n, a, o, w in zip(lengths, axes, own, walk, strict=True)
            )
            products.append(each * visits_ * which["heads"] * which["batch"])
        say(f"dots-{form}-{key.shape[-2]}", found=[forward, calls[0] - forward], want=[products[0], sum(products[1:])])
    interpreter.interpreter_builder.create_dot = real


GROUPS = {
    f.__name__: f
    for f in (fused, everything, short, unfused, rows, layouts, apart, framework, overflow, geometry, visits)
}


def main() -> None:
    # Triton 3.6's interpreter makes a range of an array of one number, which NumPy 1.26 warns of and 2.4 refuses
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: types.SimpleNamespace(restore=lambda: None)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        GROUPS[name]()


if __name__ == "__main__":
    main()
