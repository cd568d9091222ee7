"""NATTEN 0.14.5 and 0.14.6. For earlier releases see ``v0_14_4``."""

from nbhd.compat.natten.v0_14 import functional, modules
from nbhd.compat.natten.v0_14.modules import NeighborhoodAttention1D, NeighborhoodAttention2D

__version__ = "0.14.6"

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "__version__", "functional", "modules"]
