"""The modules of every era: one forward, and what each era does about maps smaller than the window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from nbhd.compat.natten.core.signature import Signature
from nbhd.compat.natten.core.tensors import or_default
from nbhd.functional import AXES
from nbhd.nn.attention import Geometry, NeighborhoodAttention


class Module(NeighborhoodAttention):
    """Self-attention over neighborhoods of ``[batch, *spatial, channels]``, with NATTEN's attributes.

    Parameters, as in every era: ``qkv.weight``, ``qkv.bias``, ``proj.weight``, ``proj.bias``, and ``rpb`` with a bias.
    Attention dropout is always applied in training; NATTEN's fused modules leave it out.
    """

    #: Which era's module this is; set by the eras.
    era: str = ""
    #: Whether small maps are padded with zeros up to the window and cropped back. If not they are an error.
    pad_small_inputs: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Any,
        stride: Any,
        dilation: Any,
        is_causal: Any,
        rel_pos_bias: bool,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        geometry = (kernel_size, or_default(stride, 1), or_default(dilation, 1), or_default(is_causal, False))
        super().__init__(embed_dim, num_heads, *geometry, rel_pos_bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    @property
    def dim(self) -> int:
        """Channels in and out."""
        return self.embed_dim

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.embed_dim // self.num_heads

    @property
    def scale(self) -> float:
        """The factor on the scores. It can be set."""
        return float(self.head_dim**-0.5 if self.qk_scale is None else self.qk_scale)

    @scale.setter
    def scale(self, factor: float) -> None:
        self.qk_scale = factor

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, *spatial, channels]`` to the same shape."""
        layout = f"[batch, {', '.join(AXES[: self.axes])}, {self.embed_dim}]"
        signature = Signature(self.era, f"NeighborhoodAttention{self.axes}D", f"{layout}, channels last")
        if not isinstance(x, Tensor):
            raise signature.error(f"Got {type(x).__name__}.")
        if x.ndim != self.axes + 2:
            raise signature.error(f"It expected a rank-{self.axes + 2} input tensor; got x.dim()={x.ndim}.")
        if x.shape[-1] != self.embed_dim:
            raise signature.error(f"Expected embedding dimension {self.embed_dim}, got {tuple(x.shape)}.")
        if not self.pad_small_inputs:
            kernel_size, _, dilation, _ = self._geometry(x.shape[1:-1])
            small = [
                f"{AXES[n]} has {length}, the window spans {k * d}"
                for n, (length, k, d) in enumerate(zip(x.shape[1:-1], kernel_size, dilation, strict=True))
                if k * d > length
            ]
            if small:
                raise signature.error(
                    f"The map is smaller than kernel_size * dilation: {'; '.join(small)}. NATTEN up to 0.15 pads such "
                    "maps: so does this module with pad_small_inputs=True."
                )
        return super().forward(x)


class EarlyModule(Module):
    """The modules up to 0.15: small maps padded, and ``kernel_size``, ``dilation`` and ``window_size`` are ints."""

    pad_small_inputs = True
    kernel_size: Any
    dilation: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._keep_ints()

    def _keep_ints(self) -> None:
        self.kernel_size, self.dilation = one(self.kernel_size), one(self.dilation)

    def _geometry(self, spatial: Sequence[int]) -> Geometry:
        window, dilation = self._each("kernel_size", self.kernel_size), self._each("dilation", self.dilation)
        return window, self.stride, dilation, self.is_causal

    @property
    def window_size(self) -> Any:
        """Positions that a window spans: ``kernel_size * dilation``."""
        window, dilation = self._each("kernel_size", self.kernel_size), self._each("dilation", self.dilation)
        return one(k * d for k, d in zip(window, dilation, strict=True))


def one(values: Iterable[int]) -> Any:
    """The int that all axes share; the tuple if they differ, which NATTEN did not have."""
    found = tuple(values)
    return found[0] if len(set(found)) == 1 else found
