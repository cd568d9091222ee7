"""NATTEN up to 0.14.4: ``kernel_size`` before ``num_heads`` in modules, no ``kernel_size`` in functions."""

from nbhd.compat.natten.v0_14_4 import functional, modules
from nbhd.compat.natten.v0_14_4.modules import NeighborhoodAttention, NeighborhoodAttention1D, NeighborhoodAttention2D

__version__ = "0.14.4"

__all__ = [
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "__version__",
    "functional",
    "modules",
]
