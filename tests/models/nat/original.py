"""The network of the original NAT repository under its own names, as short as can be: truth for the converter."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from tests.fixtures.natten_functional import natten2dav, natten2dqkrpb


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kernel_size: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads, self.kernel_size, self.scale = heads, kernel_size, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        x = nn.functional.pad(x, (0, 0, 0, max(0, self.kernel_size - columns), 0, max(0, self.kernel_size - rows)))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        scores = natten2dqkrpb(q * self.scale, k, self.rpb, self.kernel_size, 1)
        x = natten2dav(scores.softmax(-1), v, self.kernel_size, 1).permute(0, 2, 3, 1, 4).flatten(3)
        return self.proj(x[:, :rows, :columns])


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, kernel_size: int, mlp_ratio: float, qkv_bias: bool, layer_scale: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, kernel_size, qkv_bias)
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

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class OriginalNat(nn.Module):
    """``forward``: pixels (B, 3, H, W) to logits."""

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
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.patch_embed = Convolutions([3, embed_dim // 2, embed_dim], "proj", bias=True)
        self.levels = nn.ModuleList(
            Level(
                [Block(dim, heads, kernel_size, mlp_ratio, qkv_bias, layer_scale) for _ in range(depth)],
                Convolutions([dim, 2 * dim], "reduction", bias=False) if dim != dims[-1] else None,
            )
            for dim, depth, heads in zip(dims, depths, num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels.permute(0, 2, 3, 1))
        for level in self.levels:
            x = level(x)
        return self.head(self.norm(x).mean((1, 2)))
