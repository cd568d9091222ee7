"""The networks of the original NAT repository under its own names, as short as can be: truth for the converter."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tests.fixtures.natten_functional import natten2dav, natten2dqkrpb


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kernel_size: int, qkv_bias: bool, dilation: int) -> None:
        super().__init__()
        self.heads, self.kernel_size, self.scale = heads, kernel_size, (dim // heads) ** -0.5
        self.dilation, self.window = dilation, kernel_size * dilation
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        x = nn.functional.pad(x, (0, 0, 0, max(0, self.window - columns), 0, max(0, self.window - rows)))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        scores = natten2dqkrpb(q * self.scale, k, self.rpb, self.kernel_size, self.dilation)
        x = natten2dav(scores.softmax(-1), v, self.kernel_size, self.dilation).permute(0, 2, 3, 1, 4).flatten(3)
        return self.proj(x[:, :rows, :columns])


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, kernel_size: int, mlp_ratio: float, qkv_bias: bool, layer_scale: bool, dilation: int
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, kernel_size, qkv_bias, dilation)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        if layer_scale:
            self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + getattr(self, "gamma1", 1) * self.attn(self.norm1(x))
        return x + getattr(self, "gamma2", 1) * self.mlp(self.norm2(x))


class Convolutions(nn.Module):
    """Convolutions of stride 2 and a norm, channels-last; called ``proj`` in the stem, ``reduction`` in between."""

    def __init__(self, widths: list[int], name: str, bias: bool) -> None:
        super().__init__()
        layers = [nn.Conv2d(a, b, 3, 2, 1, bias=bias) for a, b in pairwise(widths)]
        self.name = name
        setattr(self, name, nn.Sequential(*layers) if name == "proj" else layers[0])
        self.norm = nn.LayerNorm(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(getattr(self, self.name)(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Level(nn.Module):
    def __init__(self, blocks: list[Block], downsample: Convolutions | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map after and before downsampling."""
        for block in self.blocks:
            x = block(x)
        return (x if self.downsample is None else self.downsample(x)), x


class OriginalNat(nn.Module):
    """``forward``: pixels (B, 3, H, W) to logits; with ``out_indices`` to a list of maps (B, C, H, W)."""

    def __init__(
        self,
        embed_dim: int,
        depths: list[int],
        num_heads: list[int],
        kernel_size: int = 7,
        mlp_ratio: float = 3.0,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        layer_scale: bool = False,
        dilations: list[list[int]] | None = None,
        out_indices: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))]
        dilations = dilations or [[1] * depth for depth in depths]
        self.out_indices = out_indices
        self.patch_embed = Convolutions([3, embed_dim // 2, embed_dim], "proj", bias=True)
        self.levels = nn.ModuleList(
            Level(
                [Block(dim, heads, kernel_size, mlp_ratio, qkv_bias, layer_scale, d) for d in layers],
                Convolutions([dim, 2 * dim], "reduction", bias=False) if dim != dims[-1] else None,
            )
            for dim, layers, heads in zip(dims, dilations, num_heads, strict=True)
        )
        for i in out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(dims[i]))
        if not out_indices:
            self.norm = nn.LayerNorm(dims[-1])
            self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, pixels: Tensor) -> Any:
        x = self.patch_embed(pixels.permute(0, 2, 3, 1))
        maps = []
        for i, level in enumerate(self.levels):
            x, before = level(x)
            if i in self.out_indices:
                maps.append(getattr(self, f"norm{i}")(before).permute(0, 3, 1, 2))
        return maps if self.out_indices else self.head(self.norm(x).mean((1, 2)))


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU, under mmcv's names."""

    def __init__(self, a: int, b: int, size: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(a, b, size, padding=size // 2, bias=False), nn.BatchNorm2d(b)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.bn(self.conv(x)))


def resize(x: Tensor, like: Tensor) -> Tensor:
    return nn.functional.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Unified perceptual parsing (Xiao et al. 2018) in mmsegmentation's names: pooling, then feature pyramid."""

    def __init__(self, widths: list[int], width: int, classes: int, scales: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNorm(widths[-1], width, 1)) for scale in scales
        )
        self.bottleneck = ConvNorm(widths[-1] + len(scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(w, width, 1) for w in widths[:-1])
        self.fpn_convs = nn.ModuleList(ConvNorm(width, width, 3) for _ in widths[:-1])
        self.fpn_bottleneck = ConvNorm(len(widths) * width, width, 3)
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        last = maps[-1]
        top = self.bottleneck(torch.cat([last, *(resize(pool(last), last) for pool in self.psp_modules)], 1))
        pyramid = [top]
        for lateral, x in zip(reversed(self.lateral_convs), reversed(maps[:-1]), strict=True):
            pyramid.insert(0, lateral(x) + resize(pyramid[0], x))
        outs = [conv(x) for conv, x in zip(self.fpn_convs, pyramid[:-1], strict=True)] + [top]
        return self.conv_seg(self.fpn_bottleneck(torch.cat([resize(x, outs[0]) for x in outs], 1)))


class FCNHead(nn.Module):
    """A convolution on the third map, for the auxiliary loss."""

    def __init__(self, a: int, width: int, classes: int) -> None:
        super().__init__()
        self.convs, self.conv_seg = nn.Sequential(ConvNorm(a, width, 3)), nn.Conv2d(width, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.conv_seg(self.convs(maps[2]))


class OriginalUPerNet(nn.Module):
    """``forward``: pixels to scores (B, classes, H, W) of the decode head and of the auxiliary one."""

    def __init__(self, width: int, classes: int, **settings: Any) -> None:
        super().__init__()
        self.backbone = OriginalNat(**settings, out_indices=(0, 1, 2, 3))
        widths = [settings["embed_dim"] * 2**i for i in range(4)]
        self.decode_head = UPerHead(widths, width, classes)
        self.auxiliary_head = FCNHead(widths[2], width, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(pixels)
        return resize(self.decode_head(maps), pixels), resize(self.auxiliary_head(maps), pixels)
