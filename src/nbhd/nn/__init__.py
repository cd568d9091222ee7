"""Neighborhood attention as modules, and the layers around it.

`attention` has the modules, projections in and projections out. Around an attention, in them and in NAT, stand `linear`
and `convolution`, one product each; `joined`, several layers in one call of the native CPU core, and `joined_operator`,
the same under `torch.compile`; and `packed`, which keeps weights in the order they are multiplied in. `sixteen_bits`
and `own_parts` say when which may be taken.
"""

from nbhd.nn.attention import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from nbhd.nn.linear import Linear

__all__ = ["Linear", "NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]
