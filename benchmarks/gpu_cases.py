"""What the GPU is measured on: NAT's maps, the windows of image and video generators, long sequences."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import NAT_MAPS, Case


def _case(name: str, spatial: tuple[int, ...], heads: int, dim: int, kernel: tuple[int, ...], **rest: object) -> Case:
    options = {"has_bias": False, "dtype": "bfloat16", **rest}
    return Case(name, spatial, heads, dim, kernel, **options)  # type: ignore[arg-type]


def _nat(batch: int, has_bias: bool) -> list[Case]:
    found = []
    for side, heads in NAT_MAPS:
        name = f"gpu/nat-{side}x{side}-b{batch}{'-bias' if has_bias else ''}"
        peers = ("flex", "swin") if side in (56, 14) else ("swin",)
        found.append(_case(name, (side, side), heads, 32, (7, 7), batch=batch, has_bias=has_bias, peers=peers))
    return found


#: In the order they are measured in: what matters most first, the run stops where its time is over.
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *_nat(128, True),
        *_nat(128, False),
        _case("gpu/flux-256x256-w80", (256, 256), 24, 128, (80, 80)),
        _case("gpu/flux-256x256-w80-stride16", (256, 256), 24, 128, (80, 80), stride=(16, 16)),
        _case("gpu/hunyuan-30x48x80-w18x24x24", (30, 48, 80), 24, 128, (18, 24, 24)),
        _case("gpu/sequence-32k-w2048", (32768,), 1, 128, (2048,), peers=("flex",)),
        _case("gpu/sequence-32k-w2048-stride256", (32768,), 1, 128, (2048,), stride=(256,)),
        _case("gpu/ltx-69x64x96-w3x7x7", (69, 64, 96), 8, 64, (3, 7, 7)),
        _case("gpu/ltx-69x64x96-w3x5x5", (69, 64, 96), 8, 64, (3, 5, 5)),
        _case("gpu/ltx-69x64x96-w11x11x11", (69, 64, 96), 8, 64, (11, 11, 11)),
        _case("gpu/window13-56x56-d64-bias", (56, 56), 4, 64, (13, 13), batch=32, has_bias=True),
    )
}

#: NAT's stages once more, as whole layers: projections and all.
LAYERS: dict[str, Case] = {
    name: _case(
        name, (side, side), heads, 32, (7, 7), batch=128, has_bias=True,
        peers=("nbhd-layer", "swin-layer", "swin-layer-eager"),
    )
    for side, heads in NAT_MAPS
    for name in (f"gpu/layer-{side}x{side}-b128-bias",)
}  # fmt: skip

#: What ``gpu_check`` goes through: NAT's maps, its layers, the rest.
ALL: dict[str, Case] = {**{case.name: case for case in _nat(128, True)}, **LAYERS, **CASES}


def contenders(case: Case) -> list[str]:
    """Names in ``gpu_timing.PEERS``, ours first."""
    return list(case.peers) if case.name in LAYERS else ["nbhd", *case.peers]


#: NATTEN's published times for the same shapes on an H100, in ms (forward with its token permutation): not ours.
PUBLISHED = {
    "gpu/flux-256x256-w80": 16.2 + 2.4,
    "gpu/flux-256x256-w80-stride16": 7.9 + 2.7,
    "gpu/hunyuan-30x48x80-w18x24x24": 79.0 + 5.4,
    "gpu/sequence-32k-w2048": 0.095,
    "gpu/sequence-32k-w2048-stride256": 0.063,
}


def small(case: Case) -> Case:
    """A map of little more than one window, for the numerics."""
    return replace(case.small(), batch=2)
