"""``natten.functional`` of 0.15, heads first; on three axes the depth's window and dilation stand apart.

The kernel switches, and what is asked before they are set, are at home here.
"""

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
from nbhd.compat.natten.core.unfused_names import plain_av, plain_qk, qk_with_bias, qkrpb

__all__ = [
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "has_bfloat",
    "has_cuda",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]

_ERA = "0.15"
_AXES = (1, 2, 3)

na1d_qk, na2d_qk, na3d_qk = (plain_qk(_ERA, __name__, axes, f"na{axes}d_qk") for axes in _AXES)
na1d_qk_with_bias, na2d_qk_with_bias, na3d_qk_with_bias = (qk_with_bias(_ERA, __name__, axes) for axes in _AXES)
na1d_av, na2d_av, na3d_av = (plain_av(_ERA, __name__, axes, f"na{axes}d_av") for axes in _AXES)

natten1dqk, natten2dqk, natten3dqk = na1d_qk, na2d_qk, na3d_qk
natten1dav, natten2dav, natten3dav = na1d_av, na2d_av, na3d_av
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = (qkrpb(_ERA, __name__, axes) for axes in _AXES)

_settings = Settings(kv_parallelism=False)

enable_gemm_na = _settings.enable_gemm_na
disable_gemm_na = _settings.disable_gemm_na
enable_tf32 = _settings.enable_tf32
disable_tf32 = _settings.disable_tf32
enable_tiled_na = _settings.enable_tiled_na
disable_tiled_na = _settings.disable_tiled_na
