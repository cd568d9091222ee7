"""The modules of every era: one forward, and what each era does about maps smaller than the window."""

from __future__ import annotations

from torch import Tensor

from nbhd.compat.natten.core.signature import Signature
from nbhd.functional import AXES
from nbhd.nn import _NeighborhoodAttention


class Module(_NeighborhoodAttention):
    """Self-attention over neighborhoods of ``[batch, *spatial, channels]``, with NATTEN's attributes.

    Parameters, as in every era: ``qkv.weight``, ``qkv.bias``, ``proj.weight``, ``proj.bias``, and ``rpb`` with a bias.
    Attention dropout is always applied in training; NATTEN's fused modules leave it out.
    """

    #: Which era's module this is; set by the eras.
    era: str = ""
    #: Whether small maps are padded with zeros up to the window and cropped back. If not they are an error.
    pad_small_inputs: bool = False

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
        """The factor on the scores."""
        return float(self.head_dim**-0.5 if self.qk_scale is None else self.qk_scale)

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
            small = [
                f"{AXES[n]} has {length}, the window spans {k * d}"
                for n, (length, k, d) in enumerate(zip(x.shape[1:-1], self.kernel_size, self.dilation, strict=True))
                if k * d > length
            ]
            if small:
                raise signature.error(
                    f"The map is smaller than kernel_size * dilation: {'; '.join(small)}. NATTEN up to 0.15 pads such "
                    "maps: so does this module with pad_small_inputs=True."
                )
        return super().forward(x)
