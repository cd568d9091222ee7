"""NATTEN 0.15: three axes, additional tokens, ``has_*`` and kernel switches. No ``natten.context``."""

from nbhd.compat.natten.v0_15 import functional, modules
from nbhd.compat.natten.v0_15.functional import (
    disable_gemm_na,
    disable_tf32,
    disable_tiled_na,
    enable_gemm_na,
    enable_tf32,
    enable_tiled_na,
    has_bfloat,
    has_cuda,
    has_fp32_gemm,
    has_fp64_gemm,
    has_gemm,
    has_half,
    has_tf32_gemm,
)
from nbhd.compat.natten.v0_15.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__version__ = "0.15.1"

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "functional",
    "has_bfloat",
    "has_cuda",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "modules",
]
