"""Where PyTorch's products in bfloat16 and float16 are slow on this CPU, and which they are.

They take several times as long as in float32 on processors without instructions for them. There `nbhd.nn.linear`,
`nbhd.nn.convolution` and `nbhd.nn.joined` compute in float32, and round.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from nbhd._processor import features, maker

#: Instructions for products in 16 bits, by Linux's names, and those of them that make several times as many.
_INSTRUCTIONS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "avx_ne_convert"},
    torch.float16: {"avx512_fp16", "amx_fp16", "avx_ne_convert"},
}
_MATRICES = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}


@functools.cache
def are_slow(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products in ``dtype`` take longer on this CPU than those in float32 and both conversions.

    True for bfloat16 and float16 on x86 processors with AVX2 or AVX-512 that have no instructions for them (PyTorch
    takes five to ten times as long then), and on Intel's with AVX-512 and without AMX, which make no more products by
    ``vdpbf16ps`` than in float32. Elsewhere it is not yet measured.
    """
    has, capability = features(), torch.backends.cpu.get_cpu_capability()
    if dtype not in _INSTRUCTIONS or has is None or not capability.startswith("AVX"):
        return False
    if capability.startswith("AVX512") and maker() == "GenuineIntel":
        return _MATRICES[dtype] not in has
    return not has & _INSTRUCTIONS[dtype]


def dtype_of_products(input: Tensor) -> torch.dtype:
    """What PyTorch's layers compute in, given ``input`` in the CPU's memory: its dtype, or autocast's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype


def is_slow(
    input: Tensor, weight: Tensor, bias: Tensor | None, rows: int, pays: dict[torch.dtype, int] | None = None
) -> bool:
    """Whether PyTorch would make a product or a convolution in 16 bits, slowly (`are_slow`).

    That is: of plain tensors in the CPU's memory and of that dtype, or under autocast of any that it takes; and large
    enough for conversions to pay.

    Args:
        rows: of the product's output; positions of a convolution's.
        pays: products for each number that is converted, from which on that pays; else `least_products`.
    """
    if type(input) is not Tensor:  # the first of all: others, which stand for a tensor in a graph, may have no dtype
        return False
    dtype = dtype_of_products(input)
    if dtype == torch.float32:
        return False
    tensors = (input, weight) if bias is None else (input, weight, bias)
    takes = (torch.float32, *_INSTRUCTIONS) if torch.is_autocast_enabled("cpu") else (dtype,)
    if not all(type(t) in (Tensor, nn.Parameter) and t.dtype in takes and _is_in_memory(t) for t in tensors):
        return False
    products = rows * weight.numel()
    converted = input.numel() + weight.numel() + rows * weight.shape[0]
    if not are_slow(dtype):
        return False
    least = pays[dtype] if pays is not None and dtype in pays else least_products(dtype)
    return products >= least * converted


def _is_in_memory(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.layout == torch.strided and not tensor.is_nested


#: Without instructions for 16 bits, and with them.
_LEAST_WITHOUT, _LEAST_WITH = 4, 32


@functools.cache
def least_products(dtype: torch.dtype) -> int:
    """Products for each number that is converted, from which on float32 is faster where 16 bits are slow.

    Inputs and outputs are many where layers are thin, and weights where rows are few.
    """
    return _LEAST_WITH if _INSTRUCTIONS[dtype] & (features() or set()) else _LEAST_WITHOUT
