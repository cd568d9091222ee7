"""The native CPU core (``csrc/``), called through its C interface with ctypes.

A call is one struct, packed here into a byte string: sizes, geometry tables, strides and pointers
(``csrc/include/nbhd.h`` has it field by field). Threads are torch's own where it offers them to C
(``torch_parallel_for``, torch 2.10 and later), so that ``torch.set_num_threads`` rules; otherwise the library starts up
to that many of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from nbhd.backends import Call
from nbhd.errors import BackendError
from nbhd.geometry import AxisTable, Neighborhood, axis_table

NAME = "cpu"

_ABI_VERSION = 1
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# nbhd_call: header, five sizes ... see nbhd.h. A tensor is a pointer and five strides.
_GEOMETRY = struct.Struct("=7q9q6qd")
_TENSORS = struct.Struct("=24q2q24q2q2q")
_CALL_BYTES = _GEOMETRY.size + _TENSORS.size
_NO_TENSOR = (0,) * 6


class _Library:
    """The loaded library and what torch lends it."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        version = library.nbhd_abi_version
        version.restype = ctypes.c_int32
        if version() != _ABI_VERSION:
            raise OSError(f"{path} has interface version {version()}, this package needs {_ABI_VERSION}")
        library.nbhd_isa.restype = ctypes.c_char_p
        library.nbhd_status_text.restype = ctypes.c_char_p
        library.nbhd_status_text.argtypes = [ctypes.c_int32]
        self.path = path
        self.isa: str = library.nbhd_isa().decode()
        self.status_text = library.nbhd_status_text
        self.forward, self.backward = library.nbhd_forward, library.nbhd_backward
        for entry in (self.forward, self.backward):
            entry.restype, entry.argtypes = ctypes.c_int32, [ctypes.c_char_p]
        self.parallel_for = _torch_parallel_for()


def _torch_parallel_for() -> int:
    """Address of torch's ``torch_parallel_for``, 0 where it has none."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def _candidates() -> list[Path]:
    named = os.environ.get("NBHD_CPU_LIBRARY")
    if named:
        return [Path(named)]
    package = Path(__file__).resolve().parent.parent
    found = [package / "_native" / f"libnbhd_cpu{_SUFFIX}"]
    # an editable install keeps compiled files apart from the sources
    found += [Path(entry) / "nbhd" / "_native" / f"libnbhd_cpu{_SUFFIX}" for entry in sys.path if "packages" in entry]
    root = package.parent.parent
    if (root / "CMakeLists.txt").exists():
        found.append(root / "build" / "cpu" / f"libnbhd_cpu{_SUFFIX}")
    return found


@functools.cache
def _load() -> _Library | str:
    """The library, or why there is none."""
    tried = _candidates()
    for path in tried:
        if path.exists():
            try:
                library = _Library(path)
            except (OSError, AttributeError) as error:
                return f"the native library does not load: {error}."
            if library.isa == "none":
                wanted = os.environ.get("NBHD_CPU_ISA")
                return f"the native library has no kernels for this machine, or none for NBHD_CPU_ISA={wanted!r}."
            return library
    return f"there is no native library at {tried[0]}: this copy of nbhd was built without a C++ compiler."


def why_unusable() -> str | None:
    """Why the native core cannot run on this machine, or None."""
    library = _load()
    return library if isinstance(library, str) else None


def description() -> str:
    """The library in use, its instruction set and its threads, for ``nbhd info``."""
    library = _library()
    threads = "torch's threads" if library.parallel_for else "its own threads"
    return f"{library.isa}, {threads}, {library.path}"


def why_not(call: Call) -> str | None:
    """Why the native core cannot run this call, or None."""
    if call.query.device.type != "cpu":
        return "the cpu backend runs on CPU tensors."
    if call.query.dtype not in _DTYPES:
        return f"the cpu backend takes float32, bfloat16, float16 and float64, not {call.query.dtype}."
    return None


def forward(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as :mod:`nbhd.backends` describes."""
    library = _library()
    query, key, value = _rows(query), _rows(key), _rows(value)
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    real = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:-1], dtype=real)
    bias = _dense(rel_pos_bias, real)
    arguments = _TENSORS.pack(
        *_tensor(query), *_tensor(key), *_tensor(value), *_tensor(out),
        lse.data_ptr(), 0 if bias is None else bias.data_ptr(),
        *_NO_TENSOR, *_NO_TENSOR, *_NO_TENSOR, *_NO_TENSOR, 0, 0,
        library.parallel_for, torch.get_num_threads(),
    )  # fmt: skip
    _check(library, library.forward(_header(query, key, value, neighborhood, scale) + arguments))
    return out, lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    neighborhood: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, as :mod:`nbhd.backends` describes. ``out`` is not read."""
    library = _library()
    query, key, value, d_out = _rows(query), _rows(key), _rows(value), _rows(d_out.to(query.dtype))
    d_query, d_key, d_value = (t.new_empty(t.shape) for t in (query, key, value))
    lse = lse.contiguous()
    d_lse = _dense(d_lse, lse.dtype)
    bias = _dense(rel_pos_bias, lse.dtype)
    d_bias = None if bias is None else torch.empty_like(bias)
    arguments = _TENSORS.pack(
        *_tensor(query), *_tensor(key), *_tensor(value), *_NO_TENSOR,
        lse.data_ptr(), 0 if bias is None else bias.data_ptr(),
        *_tensor(d_out), *_tensor(d_query), *_tensor(d_key), *_tensor(d_value),
        0 if d_lse is None else d_lse.data_ptr(), 0 if d_bias is None else d_bias.data_ptr(),
        library.parallel_for, torch.get_num_threads(),
    )  # fmt: skip
    _check(library, library.backward(_header(query, key, value, neighborhood, scale) + arguments))
    if d_bias is not None and rel_pos_bias is not None:
        d_bias = d_bias.to(rel_pos_bias.dtype)
    return d_query, d_key, d_value, d_bias


def _library() -> _Library:
    library = _load()
    if isinstance(library, str):
        raise BackendError(f"the cpu backend cannot run: {library}")
    return library


def _check(library: _Library, status: int) -> None:
    if status:
        raise BackendError(
            f"the native core refused the call: {library.status_text(status).decode()} (status {status})."
        )


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


def _tensor(tensor: Tensor) -> tuple[int, ...]:
    """nbhd_tensor: pointer, strides of batch, three spatial axes (absent ones first, stride 0) and head."""
    stride = tensor.stride()
    if len(stride) == 5:
        return tensor.data_ptr(), stride[0], 0, stride[1], stride[2], stride[3]
    if len(stride) == 4:
        return tensor.data_ptr(), stride[0], 0, 0, stride[1], stride[2]
    return tensor.data_ptr(), *stride[:5]


def _header(query: Tensor, key: Tensor, value: Tensor, neighborhood: Neighborhood, scale: float) -> bytes:
    return _geometry(query.dtype, query.shape, key.shape[-2], value.shape[-1], neighborhood, scale)[0]


@functools.lru_cache(maxsize=256)
def _geometry(
    dtype: torch.dtype, shape: torch.Size, kv_heads: int, dim_v: int, neighborhood: Neighborhood, scale: float
) -> tuple[bytes, tuple[AxisTable, ...]]:
    """The first half of the struct, and the tables it points into."""
    spatial = shape[1:-2]
    absent = 3 - len(spatial)
    tables = (axis_table(1, 1, 1, 1, False),) * absent + neighborhood.tables(tuple(spatial))
    header = _GEOMETRY.pack(
        _CALL_BYTES, _DTYPES[dtype], shape[0], shape[-2], kv_heads, shape[-1], dim_v,
        *(t.length for t in tables), *(t.kernel_size for t in tables), *(t.dilation for t in tables),
        *(t.first.data_ptr() for t in tables), *(t.count.data_ptr() for t in tables), scale,
    )  # fmt: skip
    return header, tables
