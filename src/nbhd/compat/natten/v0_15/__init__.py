"""NATTEN 0.15: three axes, additional tokens, ``has_*`` and kernel switches. No ``natten.context``."""

from nbhd.compat.natten.core.machine import (
    has_bfloat,
    has_cuda,
    has_fp32_gemm,
    has_fp64_gemm,
    has_gemm,
    has_half,
    has_tf32_gemm,
)
from nbhd.compat.natten.core.settings import Settings
from nbhd.compat.natten.v0_15 import functional, modules
from nbhd.compat.natten.v0_15.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__version__ = "0.15.1"

_settings = Settings(kv_parallelism=False)

enable_gemm_na = _settings.enable_gemm_na
disable_gemm_na = _settings.disable_gemm_na
enable_tf32 = _settings.enable_tf32
disable_tf32 = _settings.disable_tf32
enable_tiled_na = _settings.enable_tiled_na
disable_tiled_na = _settings.disable_tiled_na

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
