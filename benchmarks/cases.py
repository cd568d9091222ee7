"""The registry of cases. A case is a name and a shape; ``peers`` says what it is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from nbhd.errors import ArgumentError
from nbhd.geometry import Neighborhood

#: Ways to compute the same or a comparable attention, see ``benchmarks.peers``.
SWIN = ("swin-shifted-sdpa", "swin-shifted-eager", "swin-unshifted-sdpa")
EVERYTHING = (*SWIN, "dense-sdpa", "flex-compiled", "unfold", "nbhd-reference", "natten")


@dataclass(frozen=True)
class Case:
    """An attention call, forward and backward, on standard normal query, key and value.

    Args:
        name: ``group/rest``; ``--case`` takes globs over it.
        spatial: the map, one to three axes.
        kernel_size, stride, dilation: one entry an axis.
        is_causal: one entry an axis.
        has_bias: with a relative position bias ``[heads, 2k - 1, ...]``, whose gradient is computed too.
        dtype: a name in torch.
        peers: names in ``benchmarks.peers.PEERS``, beside ``nbhd`` itself.
        single_threaded: only at one thread; else at one and at all.
        weight: share of the run's time, 1 being ordinary.
        is_default: in the set that runs without ``--full``.
        measures_memory: peak memory of every subject, in a child process.
    """

    name: str
    spatial: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    batch: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    is_causal: tuple[bool, ...] = ()
    has_bias: bool = True
    dtype: str = "float32"
    peers: tuple[str, ...] = ()
    single_threaded: bool = False
    weight: float = 1.0
    is_default: bool = True
    measures_memory: bool = False

    def __post_init__(self) -> None:
        axes = len(self.spatial)
        for field, default in (("stride", 1), ("dilation", 1), ("is_causal", False)):
            if not getattr(self, field):
                object.__setattr__(self, field, (default,) * axes)

    @property
    def neighborhood(self) -> Neighborhood:
        return Neighborhood(self.kernel_size, self.stride, self.dilation, self.is_causal)

    @property
    def tokens(self) -> int:
        """Positions of one map."""
        return math.prod(self.spatial)

    @property
    def queries(self) -> int:
        """Query vectors of one call: batch, positions and heads."""
        return self.batch * self.tokens * self.heads

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def small(self) -> Case:
        """The same kind of call on a map of little more than one window: for checks, warming up and quick runs."""
        margin = 2 if len(self.spatial) < 3 else 0
        spatial = tuple(
            min(length, k * d + max(margin, s - 1) + 1)
            for length, k, d, s in zip(self.spatial, self.kernel_size, self.dilation, self.stride, strict=True)
        )
        heads = min(self.heads, 2 if self.neighborhood.slots < 256 else 1)
        return replace(self, spatial=spatial, batch=min(self.batch, 2), heads=heads)


def _nat(side: int, heads: int, batch: int) -> Case:
    return Case(
        f"nat/{side}x{side}-b{batch}",
        spatial=(side, side),
        heads=heads,
        head_dim=32,
        kernel_size=(7, 7),
        batch=batch,
        peers=EVERYTHING if batch == 8 else SWIN,
        weight=3.0 if batch == 8 else 1.0,
        measures_memory=batch == 8,
    )


#: The maps of NAT-Mini and NAT-Tiny at 224 x 224: side and heads of each stage.
NAT_MAPS = ((56, 2), (28, 4), (14, 8), (7, 16))


def _cases() -> list[Case]:
    cases = [_nat(side, heads, batch) for batch in (8, 1, 32) for side, heads in NAT_MAPS]
    cases += [
        replace(
            _nat(side, heads, 8),
            name=f"bfloat16/{side}x{side}-b8{peers}",
            dtype="bfloat16",
            peers=("nbhd-float32",) if peers == "" else SWIN,
            weight=1.0,
            measures_memory=False,
            is_default=peers == "",
        )
        # Torch's own bfloat16 is a hundred times slower than float32 on processors that have no instructions for it.
        for peers in ("", "-swin")
        for side, heads in NAT_MAPS
    ]

    def plane(name: str, side: int, k: int, heads: int = 4, dim: int = 32, **options: object) -> Case:
        shape = {"spatial": (side, side), "heads": heads, "head_dim": dim, "kernel_size": (k, k)}
        return Case(name, **{"batch": 8, "peers": SWIN, **shape, **options})  # type: ignore[arg-type]

    cases += [
        plane("window/3x3-d32", 27, 3),
        plane("window/5x5-d32", 30, 5),
        plane("window/13x13-d32", 26, 13),
        # 26 columns leave a fifth of a vector of 16 idle, 64 none of it
        plane("window/13x13-d32-64x64", 64, 13, heads=2, is_default=False),
        plane("window/13x13-d64", 26, 13, heads=2, dim=64),
        plane("window/13x13-d128", 26, 13, heads=1, dim=128),
        plane("window/7x7-d64", 28, 7, heads=2, dim=64),
        plane("window/7x7-d128", 28, 7, heads=1, dim=128),
        plane("window/7x7-d16", 28, 7, heads=8, dim=16, is_default=False),
        plane("window/8x8-d32", 32, 8, is_default=False),
        plane("window/7x7-d32-stride2", 28, 7, stride=(2, 2), has_bias=False, is_default=False),
        plane("window/7x7-d32-causal", 28, 7, is_causal=(True, True), has_bias=False, is_default=False),
    ]

    def line(name: str, length: int, k: int, heads: int, dim: int, **options: object) -> Case:
        shape = {"spatial": (length,), "heads": heads, "head_dim": dim, "kernel_size": (k,), "has_bias": False}
        return Case(name, **{**shape, **options})  # type: ignore[arg-type]

    cases += [
        line("1d/window128-8192", 8192, 128, 2, 64, peers=("dense-sdpa",)),
        line("1d/window1024-8192", 8192, 1024, 2, 64, peers=("dense-sdpa",)),
        line("1d/window4096-8192", 8192, 4096, 2, 64, peers=("dense-sdpa", "flex-compiled"), is_default=False),
        line("1d/window128-8192-causal", 8192, 128, 2, 64, is_causal=(True,), peers=("dense-sdpa",), is_default=False),
        line("1d/window128-8192-flex", 8192, 128, 2, 64, peers=("flex-compiled", "unfold", "natten"), is_default=False),
    ]
    # Beat trackers: 30,000 frames, 12 channels a head, and a relative position bias.
    cases += [
        line(
            f"1d/window5-30000-dilation{dilation}",
            30_000,
            5,
            2,
            12,
            has_bias=True,
            dilation=(dilation,),
            peers=("unfold", "nbhd-reference", "natten"),
            is_default=dilation in (1, 32, 1024),
        )
        for dilation in (1, 2, 32, 256, 1024)
    ]

    def volume(name: str, spatial: tuple[int, int, int], k: tuple[int, int, int], **options: object) -> Case:
        shape = {"spatial": spatial, "heads": 2, "head_dim": 32, "kernel_size": k, "has_bias": False}
        return Case(name, **{**shape, **options})  # type: ignore[arg-type]

    cases += [
        volume("3d/5x5x5", (16, 32, 32), (5, 5, 5), peers=("natten",)),
        volume("3d/3x7x7", (8, 56, 56), (3, 7, 7), peers=("natten",)),
        volume("3d/11x11x11", (16, 24, 24), (11, 11, 11), peers=("dense-sdpa", "natten")),
        volume("3d/5x5x5-small", (8, 16, 16), (5, 5, 5), peers=("dense-sdpa", "unfold", "natten"), is_default=False),
    ]
    cases += [
        plane(
            f"dilation/{dilation}",
            56,
            7,
            heads=2,
            dilation=(dilation, dilation),
            peers=("nbhd-undilated",),
            is_default=dilation in (2, 8),
        )
        for dilation in (2, 4, 8)
    ]
    cases += [
        plane(f"size/{side}x{side}", side, 7, heads=1, batch=1, has_bias=True, peers=("nbhd-56x56",), weight=weight)
        for side, weight in ((112, 0.7), (224, 0.7), (512, 1.0), (1024, 2.0))
    ]
    # Many heads on maps that no cache holds: a head is a small part of each token.
    cases += [
        plane("heads/63x63-h16", 63, 7, heads=16, peers=("swin-shifted-sdpa",)),
        plane("heads/252x252-h8", 252, 7, heads=8, batch=1, peers=("swin-shifted-sdpa",), is_default=False),
    ]
    cases += [
        plane(
            f"overhead/{side}x{side}",
            side,
            k,
            heads=1,
            dim=8,
            batch=1,
            has_bias=False,
            peers=("dense-sdpa",),
            single_threaded=True,
            weight=0.5,
        )
        for side, k in ((3, 3), (7, 7), (14, 7))
    ]
    return cases


CASES: dict[str, Case] = {case.name: case for case in _cases()}


def matching(names: list[str], patterns: list[str], argument: str) -> list[str]:
    """The names that match any of the globs, in their own order.

    Raises:
        ArgumentError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(f"{argument} {pattern!r} matches nothing. `python -m benchmarks --list` has the names.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
