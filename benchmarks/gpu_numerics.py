"""Are the kernels right on this device? Every option against the reference in float64: output and every gradient.

What is checked is what ``nbhd`` ships to users' calls: the rows that the table chooses here.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nbhd.backends import reference, triton
from nbhd.geometry import Neighborhood

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


def check(
    device: torch.device, *, names: tuple[str, ...] = (), quick: bool = False, until: float = math.inf,
    workers: int = 1,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One result a setting and dtype; ``passed`` says whether all is well, None that ``until`` was over before.

    Nearly all of the time goes into compiling, on one core: ``workers`` processes share it.
    """
    jobs = []
    for setting in QUICK if quick else SETTINGS:
        if names and setting.name not in names:
            continue
        for dtype, form in itertools.product(setting.dtypes, ("fused", "unfused")):
            if form == "unfused" and (dtype != setting.dtypes[0] or math.prod(setting.kernel_size) > 400):
                continue
            jobs.append((setting, dtype, form))
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        elsewhere = [None if pool is None else pool.submit(_one, *job, str(device)) for job in jobs]
        for job, future in zip(jobs, elsewhere, strict=True):
            setting, dtype, form = job
            name = f"{setting.name} {dtype} {form}"
            found: dict[str, Any] = {"passed": None, "skipped": "no time left"}
            try:
                if future is not None:
                    found = future.result(None if until == math.inf else max(0.0, until - time.monotonic()))
                elif time.monotonic() <= until:
                    found = _here(job, device)
            except TimeoutError:
                pass
            except Exception:  # a device that lets one process in, say: here it can be seen what is the matter
                found = _here(job, device)
            yield {"name": name, **found}
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)  # what still runs would be in the way of what is timed next


def _here(job: tuple[Setting, str, str], device: torch.device) -> dict[str, Any]:
    try:
        return _one(*job, str(device))
    except Exception as error:  # a kernel that does not compile or run is wrong, and the others are still of interest
        lines = str(error).strip().splitlines() or [""]
        return {"passed": False, "error": f"{type(error).__name__}: {lines[0][:200]}"}


def _one(setting: Setting, dtype_name: str, form: str, device_name: str) -> dict[str, Any]:
    dtype, device = getattr(torch, dtype_name), torch.device(device_name)
    begun = time.monotonic()
    call: Callable[..., tuple[Tensor | None, ...]] = _fused if form == "fused" else _unfused
    arguments = _arguments(setting, dtype, device)
    ours = call(triton, arguments)
    seconds = time.monotonic() - begun  # compilation and all
    again = call(triton, arguments)
    plain = call(reference, arguments)
    truth = call(reference, tuple(t if t is None or not isinstance(t, Tensor) else t.double() for t in arguments))
    errors = {}
    passed = True
    unit = torch.finfo(dtype).eps
    for name, result, other, true, second in zip(
        NAMES if form == "fused" else UNFUSED, ours, plain, truth, again, strict=True
    ):  # fmt: skip
        if result is None or true is None or other is None:
            continue
        unused = true == -math.inf
        same = torch.equal(result == -math.inf, unused) and torch.equal(result, second)  # deterministic
        found, expected = _deviation(result, true, unused), _deviation(other, true, unused)
        errors[name] = [*found, *expected]
        passed &= same and found[0] <= 2 * expected[0] + 4 * unit and found[1] <= 4 * expected[1] + 16 * unit
    return {"passed": bool(passed), "errors": errors, "first_call_seconds": seconds}


def _deviation(result: Tensor, truth: Tensor, unused: Tensor) -> tuple[float, float]:
    """Root mean square and largest deviation, relative to the truth's. NaN is infinitely far."""
    result, truth = (t.double().masked_fill(unused, 0) for t in (result, truth))
    off = torch.nan_to_num(result - truth, nan=math.inf)
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
    return out, lse, *module.backward(d_out, d_lse, query, key, value, bias, out, lse, neighborhood, scale)


def _unfused(module: Any, arguments: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    query, key, value, bias, d_out, _, neighborhood, scale = arguments
    scores = module.scores(query, key, bias, neighborhood, scale)
    d_scores = torch.sin(scores.masked_fill(scores == -math.inf, 0))
    weights = torch.softmax(scores, -1)
    back = module.scores_backward(d_scores, query, key, bias, neighborhood, scale)
    out = module.weighted_sum(weights, value, neighborhood)
    return scores, *back, out, *module.weighted_sum_backward(d_out, weights, value, neighborhood)
