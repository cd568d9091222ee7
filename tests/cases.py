"""Settings that every backend is tested on, and a hypothesis strategy for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Case:
    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    dim: int = 4
    dim_v: int = 4
    bias: bool = False
    scale: float | None = None
    seed: int = 0

    @property
    def geometry(self) -> tuple:
        return self.kernel_size, self.stride, self.dilation, self.is_causal

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        made = {
            "query": normal(self.batch, *self.spatial, self.heads, self.dim),
            "key": normal(self.batch, *self.spatial, self.kv_heads, self.dim),
            "value": normal(self.batch, *self.spatial, self.kv_heads, self.dim_v),
        }
        if self.bias:
            made["rel_pos_bias"] = normal(self.heads, *(2 * k - 1 for k in self.kernel_size))
        return made


def simple(spatial: tuple[int, ...], kernel: int | tuple[int, ...], stride=1, dilation=1, causal=False, **rest) -> Case:
    axes = len(spatial)

    def each(x):
        return x if isinstance(x, tuple) else (x,) * axes

    return Case(spatial, each(kernel), each(stride), each(dilation), each(causal), **rest)


#: Every option alone, at its edges, and mixed.
NAMED = {
    "1d": simple((9,), 3),
    "1d-even-window": simple((9,), 4, bias=True),
    "1d-one-key": simple((5,), 1),
    "1d-whole-axis": simple((6,), 6, heads=2, kv_heads=2),
    "1d-minimum-dilated": simple((6,), 3, dilation=2),
    "1d-dilation-remainder": simple((11,), 3, dilation=3, bias=True),
    "1d-stride": simple((11,), 4, stride=3),
    "1d-blocked": simple((10,), 4, stride=4),
    "1d-causal": simple((8,), 3, causal=True),
    "1d-causal-stride-dilation-bias": simple((13,), 4, stride=2, dilation=2, causal=True, bias=True),
    "2d-not-square": simple((5, 8), 3, heads=2, kv_heads=2, bias=True),
    "2d-minimum": simple((3, 3), 3, bias=True),
    "2d-window-7": simple((7, 9), 7, bias=True, batch=2),
    "2d-per-axis": simple((6, 9), (3, 4), stride=(2, 3), dilation=(2, 2), causal=(False, True), bias=True),
    "2d-wide-value": simple((5, 6), 3, dim=3, dim_v=5),
    "2d-grouped-heads": simple((5, 5), 3, heads=6, kv_heads=2, dim=2, dim_v=3, bias=True),
    "2d-scale-zero": simple((4, 5), 3, scale=0.0, bias=True),
    "3d": simple((3, 4, 5), (2, 3, 3), bias=True),
    "3d-causal-time": simple((4, 3, 4), (3, 3, 2), causal=(True, False, False)),
    "3d-everything": simple(
        (4, 5, 6), (2, 2, 3), stride=(1, 2, 2), dilation=(2, 1, 2), causal=(False, True, False), heads=2, bias=True
    ),
}


@st.composite
def cases(draw, axes: tuple[int, ...] = (1, 2, 3), longest: int = 60) -> Case:
    n = draw(st.sampled_from(axes))
    most = {1: 24, 2: 9, 3: 5}[n]
    kernel = tuple(draw(st.integers(1, {1: 7, 2: 4, 3: 3}[n])) for _ in range(n))
    dilation = tuple(draw(st.integers(1, max(1, most // k))) for k in kernel)
    spatial = tuple(k * d + draw(st.integers(0, max(0, most - k * d))) for k, d in zip(kernel, dilation, strict=True))
    kv_heads = draw(st.integers(1, 2))
    return Case(
        spatial=spatial,
        kernel_size=kernel,
        stride=tuple(draw(st.integers(1, k)) for k in kernel),
        dilation=dilation,
        is_causal=tuple(draw(st.booleans()) for _ in range(n)),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        dim=draw(st.integers(1, 4)),
        dim_v=draw(st.integers(1, 4)),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 1.0, 0.0, -0.7])),
        seed=draw(st.integers(0, 2**16)),
    )
