"""What published code does with natten, in our words: its calls, in its order and layouts, against the loop.

Every model here imports ``natten`` as its original does and runs at sizes of its kind; the loop computes a sample of
positions, corners included, from the same inputs.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nbhd.compat.natten import install
from tests.compat.loops import attend_at, some_positions


class Watched:
    """A function of natten that keeps what it was called with and what it returned."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        result = self.function(*args, **kwargs)
        self.calls.append((args, kwargs, result))
        return result


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def compare(found: Tensor, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    largest = max(1.0, np.abs(expected[np.isfinite(expected)]).max())
    np.testing.assert_allclose(array(found), expected, rtol=tolerance, atol=tolerance * largest)


def check_pair(qk_call, av_call, dilation, kernel_size, axes):
    """Scores and outputs of one unfused attention (heads first) at some positions."""
    (query, key, *rest), keywords, scores = qk_call
    (attn, value, *_), _, out = av_call
    bias = next((a for a in (*rest, keywords.get("rpb")) if isinstance(a, Tensor)), None)
    assert torch.allclose(attn, scores.softmax(-1), atol=1e-6)
    q, k, v = (array(t[0].movedim(0, -2)) for t in (query, key, value))
    kernel, dilations = (kernel_size,) * axes, dilation if isinstance(dilation, tuple) else (dilation,) * axes
    for position in some_positions(q.shape[:-2], 20):
        expected, weighted = attend_at(q, k, v, position, kernel, dilations, bias=None if bias is None else array(bias))
        compare(scores[(0, slice(None), *position)], expected)
        compare(out[(0, slice(None), *position)], weighted)


# ---- A DiNAT classifier or detector: the module by keyword, dilated layers, small maps in detection
# ----------------------------------------------------------------------------------------------------------------------


class DinatLayer(nn.Module):
    def __init__(self, dim, heads, kernel_size, dilation):
        super().__init__()
        import natten
        from natten import NeighborhoodAttention2D as NeighborhoodAttention

        extra = {"rel_pos_bias": True} if hasattr(natten, "context") else {"bias": True}
        if natten.__version__ == "0.14.4":  # what the code of that time passed: there, the bias is always learnt
            extra = {}
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(
            dim, kernel_size=kernel_size, dilation=dilation, num_heads=heads, qkv_bias=True, qk_scale=None,
            attn_drop=0.0, proj_drop=0.0, **extra,
        )  # fmt: skip
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("version", ["0.14.4", "0.14.6", "0.15.1", "0.17.5", None])
def test_dinat(version):
    install(version)
    layers = nn.Sequential(DinatLayer(32, 2, 7, 1), DinatLayer(32, 2, 7, 3))
    x = torch.randn(1, 24, 29, 32)
    seen: dict[nn.Module, Tensor] = {}

    def watch(module, inputs, output):
        seen[module] = output if module.out_features == 96 else inputs[0]

    for layer in layers:
        layer.attn.qkv.register_forward_hook(watch)
        layer.attn.proj.register_forward_hook(watch)
    layers(x).square().mean().backward()
    for layer, dilation in zip(layers, (1, 3), strict=True):
        qkv, before_projection = seen[layer.attn.qkv], seen[layer.attn.proj]
        q, k, v = (array(t) for t in qkv[0].unflatten(-1, (3, 2, 16)).unbind(-3))
        for position in some_positions((24, 29), 20):
            _, out = attend_at(q, k, v, position, (7, 7), (dilation,) * 2, scale=16**-0.5, bias=array(layer.attn.rpb))
            compare(before_projection[(0, *position)].unflatten(-1, (2, 16)), out)
        assert layer.attn.rpb.grad.abs().sum() > 0
    small = torch.randn(1, 9, 11, 32)  # 9 < 7 * 3
    if version in ("0.14.4", "0.14.6", "0.15.1"):
        assert layers(small).shape == small.shape
    else:
        with pytest.raises(ValueError, match="smaller than kernel_size"):
            layers(small)


# ---- An audio beat tracker: unfused, 1-D over 30,000 frames with dilations to 1024, 2-D over instruments and time
# ----------------------------------------------------------------------------------------------------------------------


class Beats(nn.Module):
    """Attention over frames and, in the other class of layers, over (instrument, frame)."""

    def __init__(self, dim, heads, kernel_size, dilation, axes):
        super().__init__()
        self.heads, self.kernel_size, self.dilation, self.axes = heads, kernel_size, dilation, axes
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.rpb = nn.Parameter(torch.randn(heads, *(2 * kernel_size - 1,) * axes))
        self.dropout = nn.Dropout(0.1)
        functional = importlib.import_module("natten.functional")
        self.qk = Watched(getattr(functional, f"natten{axes}dqkrpb"))
        self.av = Watched(getattr(functional, f"natten{axes}dav"))

    def heads_first(self, x):
        x = x.view(*x.shape[:-1], self.heads, -1)
        return x.permute(0, x.ndim - 2, *range(1, x.ndim - 2), x.ndim - 1)

    def forward(self, x):
        query, key, value = (self.heads_first(part(x)) for part in (self.query, self.key, self.value))
        query = query / query.shape[-1] ** 0.5
        scores = self.qk(query, key, self.rpb, self.kernel_size, self.dilation)
        probabilities = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = self.av(probabilities, value, self.kernel_size, self.dilation)
        context = context.permute(0, *range(2, context.ndim - 1), 1, context.ndim - 1).contiguous()
        return context.view(*context.shape[:-2], -1)


@pytest.mark.parametrize("version", ["0.14.6", None])
def test_beat_tracker_over_frames(version):
    install(version)
    frames = 30_000
    x = torch.randn(1, frames, 24)
    with torch.no_grad():
        for layer in range(11):
            model = Beats(24, 2, 5, 2**layer, 1).eval()
            out = model(x)
            assert out.shape == x.shape
            check_pair(model.qk.calls[0], model.av.calls[0], 2**layer, 5, 1)


def test_beat_tracker_over_instruments_and_its_training_step():
    install()
    model = Beats(24, 2, 5, 1, 2).eval()
    x = torch.randn(1, 4, 300, 24)
    padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 1))  # four instruments, a window of five
    out = model(padded)[:, :4]
    assert out.shape == x.shape
    check_pair(model.qk.calls[0], model.av.calls[0], 1, 5, 2)
    model.train()
    model(padded).square().mean().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# ---- A diffusion transformer: cosine attention, scale 1; fused where natten says it can, else the pair
# ----------------------------------------------------------------------------------------------------------------------


class CosineAttention(nn.Module):
    def __init__(self, dim, heads, kernel_size):
        super().__init__()
        import natten

        self.natten, self.heads, self.kernel_size = natten, heads, kernel_size
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.full((heads,), 10.0))
        self.fused = hasattr(natten, "has_fused_na") and natten.has_fused_na()

    def attend(self, q, k, v):
        """On heads-last ``[n, h, w, heads, e]``, which the fused operator takes as it is."""
        if self.fused:
            return self.natten.functional.na2d(q, k, v, self.kernel_size, scale=1.0)
        q, k, v = (t.permute(0, 3, 1, 2, 4) for t in (q, k, v))
        qk = self.natten.functional.natten2dqk(q, k, self.kernel_size, 1)
        a = torch.softmax(qk, dim=-1).to(v.dtype)
        return self.natten.functional.natten2dav(a, v, self.kernel_size, 1).permute(0, 2, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        root = self.scale[:, None].sqrt()
        q, k = (nn.functional.normalize(t, dim=-1) * root for t in (q, k))
        self.seen = q, k, v, self.attend(q, k, v)
        return x + self.out(self.seen[-1].flatten(-2))


@pytest.mark.parametrize("version", ["0.14.6", "0.17.5", "0.21.7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusion_transformer(version, dtype):
    install(version)
    model = CosineAttention(128, 2, 7).to(dtype)
    assert model.fused == (version != "0.14.6")
    model(torch.randn(1, 16, 20, 128, dtype=dtype)).square().mean().backward()
    assert torch.isfinite(model.scale.grad).all()
    q, k, v = (array(t[0]) for t in model.seen[:3])
    for position in some_positions((16, 20), 10):
        _, expected = attend_at(q, k, v, position, (7, 7), (1, 1), scale=1.0)
        compare(model.seen[3][(0, *position)], expected, 2e-6 if dtype == torch.float32 else 2e-2)


# ---- A video block: na3d with literal backend names, causal time, the generic function with strides and tiles
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:NATTEN's")
@pytest.mark.parametrize("kernel_size", [(3, 7, 7), (3, 5, 5), (3, 3, 3)])
def test_video_decoder(kernel_size):
    install("0.21.7")
    import natten

    assert natten.HAS_LIBNATTEN
    numbers = [int(part) for part in natten.__version__.split(".")[:3]]
    assert numbers >= [0, 21, 5]
    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    q, k, v = torch.randn(3, 1, 4, 9, 11, 2, 32)
    out = natten.na3d(q, k, v, kernel_size=kernel_size, scale=1.0, backend="cutlass-fna")
    arrays = [array(t[0]) for t in (q, k, v)]
    for position in some_positions((4, 9, 11), 10):
        compare(out[(0, *position)], attend_at(*arrays, position, kernel_size, (1, 1, 1), scale=1.0)[1])


@pytest.mark.filterwarnings("ignore:NATTEN's")
def test_video_diffusion():
    install()
    from natten.functional import neighborhood_attention_generic
    from natten.utils.checks import check_all_args

    kernel_size, stride, dilation, causal = check_all_args(3, (4, 6, 6), (2, 3, 6), (1, 1, 1), (True, False, False))
    q, k, v = (torch.randn(1, 5, 8, 9, h, 16, requires_grad=True) for h in (4, 2, 2))
    out = neighborhood_attention_generic(
        query=q, key=k, value=v, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=causal,
        backend="blackwell-fna", q_tile_shape=(4, 4, 8), kv_tile_shape=(4, 4, 8), run_persistent_kernel=False,
    )  # fmt: skip
    arrays = [array(t[0]) for t in (q, k.repeat_interleave(2, -2), v.repeat_interleave(2, -2))]
    for position in some_positions((5, 8, 9), 10):
        _, expected = attend_at(*arrays, position, kernel_size, dilation, stride=stride, causal=causal, scale=0.25)
        compare(out[(0, *position)], expected)
    out.square().mean().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


# ---- Others: attention the caller computed, and try-import ladders
# ----------------------------------------------------------------------------------------------------------------------


def test_a_segmentation_backbone_brings_its_own_attention():
    install()
    try:
        from natten.functional import na2d_av
    except ImportError:
        pytest.fail("the unfused names stay in the newest era")
    weights = torch.randn(2, 4, 12, 15, 25).softmax(-1)
    wide = torch.cat([weights, weights], -1).split(25, -1)[1]  # a view, not contiguous
    value = torch.randn(2, 12, 15, 4, 8).permute(0, 3, 1, 2, 4)
    out = na2d_av(wide, value, kernel_size=5)
    keys = array(value[1].movedim(0, -2))
    for position in some_positions((12, 15), 10):
        rows = [min(max(position[0] - 2, 0), 7) + n for n in range(5)]
        columns = [min(max(position[1] - 2, 0), 10) + n for n in range(5)]
        picked = keys[rows][:, columns].reshape(25, 4, 8)
        expected = np.einsum("hs,shd->hd", array(weights[(1, slice(None), *position)]), picked)
        compare(out[(1, slice(None), *position)], expected)
