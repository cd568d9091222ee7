"""Are the kernels right on this device? Every option against the reference in float64: output and every gradient.

What is checked is what ``nbhd`` ships to users' calls: the rows that the table chooses here. Forms of a call:

    fused, unfused           attention, and the pair of weights and weighted sum
    two-images, five-images  programs of small boxes that do so many of five images, as they do on large batches
    fused-qkv, heads-first   query, key and value as views of one tensor, and of ``[batch, heads, *spatial, dim]``
    expanded-gradient        a gradient that is the same for every image, with a stride of 0
    no-lse-gradient          the gradient of the output alone
    graph, compiled          the same bits as a call by a CUDA graph, and under ``torch.compile(fullgraph=True)``
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nbhd
from benchmarks import gpu_children, gpu_graphs
from benchmarks.gpu_children import Job, Outcome
from nbhd.backends import reference, triton
from nbhd.geometry import Neighborhood
from nbhd.qkv import room_for_gradients

NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_rel_pos_bias")
UNFUSED = ("scores", "d_query", "d_key", "d_rel_pos_bias", "out", "d_weights", "d_value")


class Setting(NamedTuple):
    """One call. The window may be longer than the map: it is cut."""

    name: str
    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    is_causal: tuple[bool, ...] = ()
    heads: int = 2
    kv_heads: int = 2
    dim: int = 32
    dim_v: int = 32
    has_bias: bool = True
    batch: int = 2
    dtypes: tuple[str, ...] = ("bfloat16",)

    @property
    def neighborhood(self) -> Neighborhood:
        n = len(self.kernel_size)
        return Neighborhood(
            self.kernel_size, self.stride or (1,) * n, self.dilation or (1,) * n, self.is_causal or (False,) * n
        )


ALL = ("float32", "float16", "bfloat16")
SETTINGS = (
    Setting("nat", (17, 20), (7, 7), dtypes=ALL, batch=3),
    Setting("nat-no-bias", (17, 20), (7, 7), has_bias=False),
    Setting("window-is-map", (7, 7), (7, 7)),
    Setting("window-5-d64", (9, 14), (5, 5), dim=64, dim_v=64),
    Setting("grouped-odd-channels", (9, 12), (4, 6), heads=4, dim=24, dim_v=40, dtypes=("float32",)),
    Setting("dilated", (23, 19), (5, 3), dilation=(3, 4), kv_heads=1),
    Setting("strided", (13, 15), (5, 6), stride=(2, 3), has_bias=False),
    Setting("causal-rows", (12, 15), (5, 6), stride=(2, 3), is_causal=(True, False), has_bias=False),
    Setting("window-13-d64", (20, 21), (13, 13), dim=64, dim_v=64),
    Setting("window-33-d128", (40, 41), (33, 33), dim=128, dim_v=128, has_bias=False, batch=1),
    Setting("window-19-bias-d128", (24, 25), (19, 20), dim=128, dim_v=128, batch=1),
    Setting("wide", (6, 7), (3, 5), dim=256, dim_v=200, batch=1),
    Setting("sequence", (300,), (65,), dilation=(2,), dim=64, dim_v=64),
    Setting("sequence-causal", (300,), (150,), is_causal=(True,), dim=8, dim_v=8, dtypes=("float32",)),
    Setting("volume", (5, 7, 9), (3, 3, 4), is_causal=(True, False, False), has_bias=False),
    Setting("volume-bias", (6, 8, 9), (3, 4, 5), dtypes=("float32", "bfloat16")),
)
#: What the interpreter does in a minute, where there is no GPU.
QUICK = (
    Setting("plane", (3, 4), (3, 3), heads=1, kv_heads=1, dim=8, dim_v=8, batch=1),
    Setting("sequence-walked", (36,), (33,), heads=1, kv_heads=1, dim=8, dim_v=8, batch=1, dtypes=("float32",)),
)


#: What a few minutes for networks alone begin with.
NETWORKS = ("nat", "nat-no-bias", "window-is-map")

#: Scores of a query from which the unfused pair, which keeps them, and more images are left out.
MOST_SCORES = 400
#: Images that a program does in these forms.
IMAGES = {"two-images": 2, "five-images": 5}
#: What else NAT's call goes through.
MORE = ("fused-qkv", "heads-first", "expanded-gradient", "no-lse-gradient", "graph", "compiled")

#: Seconds that a call may take, compilation and all.
LIMIT = 150.0


def jobs_of(names: tuple[str, ...] = (), quick: bool = False) -> list[tuple[Setting, str, str]]:
    """Setting, dtype and form of everything that is checked."""
    found = []
    for setting in QUICK if quick else SETTINGS:
        if names and setting.name not in names:
            continue
        forms = ["fused"]
        if math.prod(setting.kernel_size) <= MOST_SCORES:
            forms += ["unfused"] if quick else ["unfused", *IMAGES]
        if setting.name == "nat":
            forms += MORE
        found += [(setting, setting.dtypes[0], form) for form in forms]
        found += [(setting, dtype, "fused") for dtype in setting.dtypes[1:]]
        if setting.name == "nat":  # what networks are trained in
            found += [(setting, "bfloat16", form) for form in ("unfused", *IMAGES, *MORE)]
    # first what has kernels of its own, so that no two processes compile the same at a time; compilers are the slowest
    order = {"fused": 0, "unfused": 1, "compiled": 2}
    return sorted(found, key=lambda each: order.get(each[2], 3))


def check(
    device: torch.device, *, names: tuple[str, ...] = (), quick: bool = False, until: float = math.inf,
    workers: int = 1,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One result a call, as they come; ``passed`` says whether all is well, None that ``until`` was over before.

    Nearly all of the time goes into compiling, on one core: ``workers`` processes share it. A call that takes its
    process with it is made once more in a fresh one, alone: what has no room among others is not wrong.
    """
    todo = jobs_of(names, quick)
    jobs = [Job(_one, (*each, str(device))) for each in todo]
    again: list[int] = []
    with gpu_children.Children(workers) as children:
        for index, outcome in children.run(jobs, until=until, limit=LIMIT):
            if outcome.has_ended and outcome.error is not None:
                again.append(index)
            else:
                yield _result(todo[index], outcome)
    for index in again:
        with gpu_children.Children() as alone:
            for _, outcome in alone.run([jobs[index]], until=until, limit=LIMIT):
                yield _result(todo[index], outcome)


def _result(job: tuple[Setting, str, str], outcome: Outcome) -> dict[str, Any]:
    setting, dtype, form = job
    name = {"name": f"{setting.name} {dtype} {form}"}
    if outcome.error is None:
        return name | outcome.value
    if outcome.is_late:
        return name | {"passed": None, "skipped": outcome.error}
    # a kernel that does not compile or run is wrong
    return name | {"passed": False, "error": outcome.error}


def _one(setting: Setting, dtype_name: str, form: str, device_name: str) -> dict[str, Any]:
    dtype, device = getattr(torch, dtype_name), torch.device(device_name)
    if form in ("graph", "compiled"):
        return _same_bits(setting, dtype, device, form)
    if form in IMAGES:
        with _images(IMAGES[form]):
            return _judged(_fused, _arguments(setting._replace(batch=5), dtype, device))
    return _judged(_unfused if form == "unfused" else _fused, _laid_out(form, _arguments(setting, dtype, device)))


def _judged(
    call: Callable[..., tuple[Tensor | None, ...]], arguments: tuple[Any, ...]
) -> dict[str, Any]:  # fmt: skip
    """The kernels' results next to those of the reference in the same dtype, both against float64."""
    begun = time.monotonic()
    ours = call(triton, arguments)
    seconds = time.monotonic() - begun  # compilation and all
    again = call(triton, arguments)
    plain = call(reference, arguments)
    truth = call(reference, tuple(t if t is None or not isinstance(t, Tensor) else t.double() for t in arguments))
    errors = {}
    passed = True
    unit = torch.finfo(arguments[0].dtype).eps
    for name, result, other, true, second in zip(
        NAMES if call is _fused else UNFUSED, ours, plain, truth, again, strict=True
    ):  # fmt: skip
        if result is None or true is None or other is None or second is None:
            continue
        unused = true == -math.inf
        same = torch.equal(result == -math.inf, unused) and torch.equal(result, second)  # deterministic
        found, expected = _deviation(result, true, unused), _deviation(other, true, unused)
        errors[name] = [*found, *expected]
        passed &= same and found[0] <= 2 * expected[0] + 4 * unit and found[1] <= 4 * expected[1] + 16 * unit
    return {"passed": bool(passed), "errors": errors, "first_call_seconds": seconds}


def _same_bits(setting: Setting, dtype: torch.dtype, device: torch.device, form: str) -> dict[str, Any]:
    """Whether a graph, or a compiled function, gives the bits of the plain call: output and every gradient."""
    query, key, value, bias, d_out, *_ = _arguments(setting, dtype, device)
    leaves = [t.requires_grad_() for t in (query, key, value, bias) if t is not None]
    operator = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}[len(setting.spatial)]

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Any:
        of = setting.neighborhood
        return operator(
            query, key, value, of.kernel_size, of.stride, of.dilation, of.is_causal, rel_pos_bias=bias, backend="triton"
        )

    def run(attend: Callable[..., Any] = attend) -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, d_out)

    begun = time.monotonic()
    if form == "graph":
        replay = gpu_graphs.captured(run)
        with torch.no_grad():  # a replay reads what lies there by then
            for tensor in (*leaves, d_out):
                tensor.copy_(tensor.flip(0))
        found = [t.clone() for t in replay()]
    else:
        compiler = "inductor" if device.type == "cuda" else "aot_eager"
        found = list(run(torch.compile(attend, fullgraph=True, backend=compiler)))
    seconds = time.monotonic() - begun
    names = ["out", *(n for n, t in zip(NAMES[2:], (query, key, value, bias), strict=True) if t is not None)]
    unequal = [name for name, one, other in zip(names, found, run(), strict=True) if not torch.equal(one, other)]
    return {"passed": not unequal, "errors": {}, "unequal": unequal, "first_call_seconds": seconds}


@contextlib.contextmanager
def _images(most: int) -> Iterator[None]:
    """Programs do up to ``most`` images, also where there are few programs."""
    from nbhd.backends.triton import launches

    before = launches.MANY_PROGRAMS, launches.MOST_IMAGES
    launches.MANY_PROGRAMS, launches.MOST_IMAGES = 1, most
    launches._maps.clear()  # which remember how many there were
    try:
        yield
    finally:
        launches.MANY_PROGRAMS, launches.MOST_IMAGES = before
        launches._maps.clear()


def _laid_out(form: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values, laid out in memory as the form says."""
    query, key, value, bias, d_out, d_lse, *rest = arguments
    if form == "fused-qkv":
        query, key, value = torch.stack((query, key, value), -3).unbind(-3)
    elif form == "heads-first":
        query, key, value, d_out = (t.movedim(-2, 1).contiguous().movedim(1, -2) for t in (query, key, value, d_out))
    elif form == "expanded-gradient":
        d_out = d_out[:1].expand_as(d_out)
    elif form == "no-lse-gradient":
        d_lse = None
    return query, key, value, bias, d_out, d_lse, *rest


def _deviation(result: Tensor, truth: Tensor, unused: Tensor) -> tuple[float, float]:
    """Root mean square and largest deviation, relative to the truth's. NaN is infinitely far."""
    result, truth = (t.double().masked_fill(unused, 0) for t in (result, truth))
    off = torch.nan_to_num(result - truth, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return (off.norm() / truth.norm().clamp(min=1e-30)).item(), (
        off.abs().max() / truth.abs().max().clamp(min=1e-30)
    ).item()


def _arguments(setting: Setting, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind).to(device)

    lead, s = (setting.batch, *setting.spatial), setting
    query, key, value = (
        normal(*lead, s.heads, s.dim),
        normal(*lead, s.kv_heads, s.dim),
        normal(*lead, s.kv_heads, s.dim_v),
    )
    bias = normal(s.heads, *(2 * k - 1 for k in s.kernel_size), kind=torch.float32) if s.has_bias else None
    d_out, d_lse = normal(*lead, s.heads, s.dim_v), normal(*lead, s.heads, kind=torch.float32)
    return query, key, value, bias, d_out, d_lse, s.neighborhood, s.dim**-0.5


def _fused(module: Any, arguments: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    query, key, value, bias, d_out, d_lse, neighborhood, scale = arguments
    out, lse = module.forward(query, key, value, bias, neighborhood, scale)
    into = room_for_gradients(query, key, value)  # parts of one tensor, as layers have them, get such gradients
    return out, lse, *module.backward(d_out, d_lse, query, key, value, bias, out, lse, neighborhood, scale, into)


def _unfused(module: Any, arguments: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    query, key, value, bias, d_out, _, neighborhood, scale = arguments
    scores = module.scores(query, key, bias, neighborhood, scale)
    d_scores = torch.sin(scores.masked_fill(scores == -math.inf, 0))
    weights = torch.softmax(scores, -1)
    back = module.scores_backward(d_scores, query, key, bias, neighborhood, scale)
    out = module.weighted_sum(weights, value, neighborhood)
    return scores, *back, out, *module.weighted_sum_backward(d_out, weights, value, neighborhood)
