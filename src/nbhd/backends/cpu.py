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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from nbhd.backends import Call
from nbhd.errors import BackendError
from nbhd.geometry import AxisTable, Neighborhood, axis_table, forget_with_tables
from nbhd.qkv import Three

NAME = "cpu"

_ABI_VERSION = 7
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# nbhd_call, see nbhd.h: sizes and tables; query, key, value, out, lse, bias; the gradients of these; threads; weights
# of the unfused pair and their gradients. A tensor is a pointer and five strides.
_GEOMETRY = struct.Struct("=7q9q6qd")
_TENSORS = struct.Struct("=26q")
_THREADS = struct.Struct("=2q")
_WEIGHTS = struct.Struct("=12q")
_CALL_BYTES = _GEOMETRY.size + 2 * _TENSORS.size + _THREADS.size + _WEIGHTS.size
_NO_TENSOR = (0,) * 6
_NO_TENSORS = bytes(_TENSORS.size)
_NO_WEIGHTS = bytes(_WEIGHTS.size)

_BAD_POINTER = 5


class Library:
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
        self.scores, self.scores_backward = library.nbhd_scores, library.nbhd_scores_backward
        self.weighted_sum, self.weighted_sum_backward = library.nbhd_weighted_sum, library.nbhd_weighted_sum_backward
        self.linear, self.linear_gradients = library.nbhd_linear, library.nbhd_linear_gradients
        for entry in (
            self.forward, self.backward, self.scores, self.scores_backward, self.weighted_sum,
            self.weighted_sum_backward, self.linear, self.linear_gradients,
        ):  # fmt: skip
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
def _load() -> Library | str:
    """The library, or why there is none."""
    tried = _candidates()
    for path in tried:
        if path.exists():
            try:
                library = Library(path)
            except (OSError, AttributeError) as error:
                return f"the native library does not load: {error}."
            if library.isa == "none":
                wanted = os.environ.get("NBHD_CPU_ISA")
                return f"the native library has no kernels for this machine, or none for NBHD_CPU_ISA={wanted!r}."
            return library
    if os.environ.get("NBHD_CPU_LIBRARY"):
        return f"there is no native library at {tried[0]}, which NBHD_CPU_LIBRARY names."
    return (
        f"there is no native library at {tried[0]}: this copy of nbhd was built where there was no suitable C++ "
        "compiler, or for another processor."
    )


def why_unusable() -> str | None:
    """Why the native core cannot run on this machine, or None."""
    library = _load()
    return library if isinstance(library, str) else None


def description() -> str:
    """The library in use, its instruction set and its threads, for ``nbhd info``."""
    library = loaded_library()
    threads = "torch's threads" if library.parallel_for else "its own threads"
    return f"{library.isa}, {threads}, {library.path}"


def why_not(call: Call) -> str | None:
    """Why the native core cannot run this call, or None."""
    if call.query.device.type != "cpu":
        return "the cpu backend runs on CPU tensors."
    if call.query.dtype not in _DTYPES:
        return f"the cpu backend takes float32, bfloat16, float16 and float64, not {call.query.dtype}."
    return None


#: Shape and strides.
_Layout = tuple[torch.Size, tuple[int, ...]]


class PreparedCall:
    """Forward and backward for tensors laid out like the given ones: all of the struct is packed but the pointers."""

    __slots__ = (
        "_arguments", "_dense", "_gradient_strides", "_header", "_library", "_lse", "_out", "_strides", "_tables",
    )  # fmt: skip

    def __init__(
        self, dtype: torch.dtype, query: _Layout, key: _Layout, value: _Layout, neighborhood: Neighborhood,
        scale: float,
    ) -> None:  # fmt: skip
        self._library = loaded_library()
        self._arguments = neighborhood, scale
        heads, dim_v = key[0][-2], value[0][-1]
        # the header points into the tables
        self._header, self._tables = _geometry(dtype, query[0], heads, dim_v, neighborhood, scale)
        layouts = (query, key, value)
        self._strides = [_five(stride) for _, stride in layouts]
        dense = [_dense_stride(shape) for shape, _ in layouts]
        self._dense = [layout[1] == d for layout, d in zip(layouts, dense, strict=True)]
        self._gradient_strides = [_five(d) for d in dense]
        out = torch.Size((*query[0][:-1], dim_v))
        self._out = out, _five(_dense_stride(out))
        self._lse = query[0][:-1], torch.float64 if dtype == torch.float64 else torch.float32

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, if asked for, log-sum-exp."""
        shape, out_strides = self._out
        quick = self._dense[0] and shape == query.shape
        out = torch.empty_like(query) if quick else query.new_empty(shape)
        lse_shape, real = self._lse
        lse = query.new_empty(lse_shape, dtype=real) if with_lse else None
        bias = _dense(rel_pos_bias, real)
        of_query, of_key, of_value = self._strides
        library = self._library
        status = library.forward(
            self._header
            + _TENSORS.pack(
                query.data_ptr(), *of_query, key.data_ptr(), *of_key, value.data_ptr(), *of_value,
                out.data_ptr(), *out_strides,
                0 if lse is None else lse.data_ptr(), 0 if bias is None else bias.data_ptr(),
            )
            + _NO_TENSORS
            + _THREADS.pack(library.parallel_for, torch.get_num_threads())
            + _NO_WEIGHTS
        )  # fmt: skip
        if status:
            query, key, value, bias = _usable(library, status, query, key, value, bias)
            return forward(query, key, value, bias, *self._arguments)
        return out, lse

    def backward(
        self, d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        rel_pos_bias: Tensor | None, out: Tensor, lse: Tensor, into: Three | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Gradients of query, key, value and bias. ``out`` is not read."""
        d_out = _rows(d_out if d_out.dtype == query.dtype else d_out.to(query.dtype))
        if into is not None:
            d_query, d_key, d_value = into
            of_d_query, of_d_key, of_d_value = map(_strides, into)
        else:
            query_is_dense, key_is_dense, value_is_dense = self._dense
            d_query = torch.empty_like(query) if query_is_dense else query.new_empty(query.shape)
            d_key = torch.empty_like(key) if key_is_dense else key.new_empty(key.shape)
            d_value = torch.empty_like(value) if value_is_dense else value.new_empty(value.shape)
            of_d_query, of_d_key, of_d_value = self._gradient_strides
        real = self._lse[1]
        lse, d_lse, bias = _dense(lse, real), _dense(d_lse, real), _dense(rel_pos_bias, real)
        d_bias = None if bias is None else torch.empty_like(bias)
        of_query, of_key, of_value = self._strides
        library = self._library
        status = library.backward(
            self._header
            + _TENSORS.pack(
                query.data_ptr(), *of_query, key.data_ptr(), *of_key, value.data_ptr(), *of_value, *_NO_TENSOR,
                lse.data_ptr(), 0 if bias is None else bias.data_ptr(),
            )
            + _TENSORS.pack(
                d_out.data_ptr(), *_strides(d_out),
                d_query.data_ptr(), *of_d_query, d_key.data_ptr(), *of_d_key, d_value.data_ptr(), *of_d_value,
                0 if d_lse is None else d_lse.data_ptr(), 0 if d_bias is None else d_bias.data_ptr(),
            )
            + _THREADS.pack(library.parallel_for, torch.get_num_threads())
            + _NO_WEIGHTS
        )  # fmt: skip
        if status:
            d_out, d_lse, query, key, value, bias, lse = _usable(
                library, status, d_out, d_lse, query, key, value, bias, lse
            )
            d_query, d_key, d_value, d_bias = backward(
                d_out, d_lse, query, key, value, bias, out, lse, *self._arguments
            )
        if d_bias is not None and rel_pos_bias is not None:
            d_bias = d_bias.to(rel_pos_bias.dtype)
        return d_query, d_key, d_value, d_bias


_prepared = functools.lru_cache(maxsize=256)(PreparedCall)
forget_with_tables(_prepared.cache_clear)


def prepare(query: Tensor, key: Tensor, value: Tensor, neighborhood: Neighborhood, scale: float) -> PreparedCall:
    """A call for tensors laid out like these, which must have contiguous channels."""
    layouts = [(t.shape, t.stride()) for t in (query, key, value)]
    return _prepared(query.dtype, *layouts, neighborhood, scale)


def forward(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as :mod:`nbhd.backends` describes."""
    query, key, value = _rows(query), _rows(key), _rows(value)
    out, lse = prepare(query, key, value, neighborhood, scale).forward(query, key, value, rel_pos_bias, True)
    assert lse is not None
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
    into: Three | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, as :mod:`nbhd.backends` describes. ``out`` is not read."""
    query, key, value = _rows(query), _rows(key), _rows(value)
    call = prepare(query, key, value, neighborhood, scale)
    return call.backward(d_out, d_lse, query, key, value, rel_pos_bias, out, lse, into)


# ---- the unfused pair


def scores(query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float) -> Tensor:
    """``[batch, *spatial, heads, slots]`` scores before the softmax, minus infinity in unused slots."""
    query, key = _rows(query), _rows(key)
    result = query.new_empty((*query.shape[:-1], neighborhood.slots))
    bias = _dense(rel_pos_bias, _real(query))
    _run(loaded_library().scores, query, key, key, neighborhood, scale, first=(query, key), bias=bias, weights=result)
    return result


def scores_backward(
    d_scores: Tensor, query: Tensor, key: Tensor, rel_pos_bias: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and bias."""
    d_scores, query, key = _rows(d_scores.to(query.dtype)), _rows(query), _rows(key)
    d_query, d_key = query.new_empty(query.shape), key.new_empty(key.shape)
    bias = _dense(rel_pos_bias, _real(query))
    d_bias = None if bias is None else torch.empty_like(bias)
    _run(
        loaded_library().scores_backward, query, key, key, neighborhood, scale,
        first=(query, key), gradients=(None, d_query, d_key), bias=bias, d_bias=d_bias, d_weights=d_scores,
    )  # fmt: skip
    if d_bias is not None and rel_pos_bias is not None:
        d_bias = d_bias.to(rel_pos_bias.dtype)
    return d_query, d_key, d_bias


def weighted_sum(weights: Tensor, value: Tensor, neighborhood: Neighborhood) -> Tensor:
    """``[batch, *spatial, heads, dim_v]``: each query's weights times the values of its window."""
    weights, value = _rows(weights), _rows(value)
    out = value.new_empty((*weights.shape[:-1], value.shape[-1]))
    _run(
        loaded_library().weighted_sum, out, value, value, neighborhood, 1.0,
        first=(None, None, value, out), weights=weights,
    )  # fmt: skip
    return out


def weighted_sum_backward(
    d_out: Tensor, weights: Tensor, value: Tensor, neighborhood: Neighborhood
) -> tuple[Tensor, Tensor]:
    """Gradients of weights (zero in unused slots) and value."""
    d_out, weights, value = _rows(d_out.to(value.dtype)), _rows(weights), _rows(value)
    d_weights, d_value = weights.new_empty(weights.shape), value.new_empty(value.shape)
    _run(
        loaded_library().weighted_sum_backward, d_out, value, value, neighborhood, 1.0,
        first=(None, None, value), gradients=(d_out, None, None, d_value), weights=weights, d_weights=d_weights,
    )  # fmt: skip
    return d_weights, d_value


def _run(
    entry: Any, query: Tensor, key: Tensor, value: Tensor, neighborhood: Neighborhood, scale: float, *,
    first: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...] = (), bias: Tensor | None = None,
    d_bias: Tensor | None = None, weights: Tensor | None = None, d_weights: Tensor | None = None,
) -> None:  # fmt: skip
    """A half: the geometry of these tensors; ``first`` and ``gradients`` are in the struct's order."""
    library = loaded_library()
    # the header points into the tables, which live until the call is over, whatever other threads do
    header, _tables = _geometry(query.dtype, query.shape, key.shape[-2], value.shape[-1], neighborhood, scale)
    copies: list[Tensor] = []  # of what the library would not take; they live as long

    def numbers_of(tensor: Tensor | None) -> tuple[int, ...]:
        if tensor is None:
            return _NO_TENSOR
        copies.append(_aligned(tensor))
        return _tensor(copies[-1])

    def tensors(given: tuple[Tensor | None, ...], last: Tensor | None) -> bytes:
        numbers: list[int] = []
        for tensor in (*given, *(None,) * (4 - len(given))):
            numbers += numbers_of(tensor)
        return _TENSORS.pack(*numbers, 0, numbers_of(last)[0])

    status = entry(
        header
        + tensors(first, bias)
        + tensors(gradients, d_bias)
        + _THREADS.pack(library.parallel_for, torch.get_num_threads())
        + _WEIGHTS.pack(*numbers_of(weights), *numbers_of(d_weights))
    )
    if status:
        refused(library, status)


def loaded_library() -> Library:
    """The library and what torch lends it; raises BackendError where there is none."""
    library = _load()
    if isinstance(library, str):
        raise BackendError(f"the cpu backend cannot run: {library}")
    return library


def refused(library: Library, status: int) -> None:
    """Raise BackendError with what the library says of a status."""
    raise BackendError(f"the native core refused the call: {library.status_text(status).decode()} (status {status}).")


def _usable(library: Library, status: int, *tensors: Tensor | None) -> Any:
    """The tensors of a call that was refused, in memory that the library takes. Raises BackendError if it was that."""
    aligned = [None if t is None else _aligned(t) for t in tensors]
    if status != _BAD_POINTER or all(a is t for a, t in zip(aligned, tensors, strict=True)):
        refused(library, status)
    return aligned


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if it lies at odd bytes of a file or, being all zeros, nowhere."""
    pointer = tensor.data_ptr()
    if (pointer and not pointer % tensor.element_size()) or not tensor.numel():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _real(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@overload
def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _dense(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _dense(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg()):
        return tensor
    return tensor.detach().to(dtype).resolve_neg().contiguous()


def _dense_stride(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return _five(tensor.stride())


def _five(stride: tuple[int, ...]) -> tuple[int, ...]:
    """nbhd_tensor's strides: batch, three spatial axes (absent ones first, stride 0), head."""
    if len(stride) == 5:
        return stride[0], 0, stride[1], stride[2], stride[3]
    if len(stride) == 4:
        return stride[0], 0, 0, stride[1], stride[2]
    return stride[:5]


def _tensor(tensor: Tensor) -> tuple[int, ...]:
    return tensor.data_ptr(), *_strides(tensor)


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


forget_with_tables(_geometry.cache_clear)
