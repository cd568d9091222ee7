"""``has_*``: what a caller asks before it takes a path. Each answers for nbhd, on this machine."""

from __future__ import annotations

from typing import Any

import torch

__all__ = [
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
]


def has_cuda(device_index: Any = None) -> bool:
    """Whether PyTorch sees a CUDA device."""
    return torch.cuda.is_available()


def has_fused_na(device_index: Any = None) -> bool:
    """True: ``na1d``, ``na2d`` and ``na3d`` run on every device."""
    return True


def has_fna(device_index: Any = None) -> bool:
    """True: another name of :func:`has_fused_na`."""
    return True


def has_half(device_index: Any = None) -> bool:
    """True: float16 runs on every device."""
    return True


def has_bfloat(device_index: Any = None) -> bool:
    """True: bfloat16 runs on every device."""
    return True


def has_gemm(device_index: Any = None) -> bool:
    """False: the kernels this asks for are NATTEN's own; callers then leave their switches alone."""
    return False


def has_tf32_gemm(device_index: Any = None) -> bool:
    """False, as :func:`has_gemm`."""
    return False


def has_fp32_gemm(device_index: Any = None) -> bool:
    """False, as :func:`has_gemm`."""
    return False


def has_fp64_gemm(device_index: Any = None) -> bool:
    """False, as :func:`has_gemm`."""
    return False
