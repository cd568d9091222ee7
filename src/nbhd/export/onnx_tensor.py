"""A stand-in for a tensor that writes ONNX nodes: `nbhd.export.operator` runs on it as it runs on tensors.

So the operator is written once. Sizes that are not known are scalars of the graph; the shapes tracked here hold an int
or such a scalar for each axis, and equal axes hold the same object. Only what the operator uses is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


def translations() -> dict[Any, Callable[..., Any]]:
    """ONNX for the operators of nbhd, for ``torch.onnx.export(..., custom_translation_table=...)``."""
    import nbhd.ops  # noqa: F401  (registers them)
    from nbhd.export import operator

    def na_forward(
        query: Any, key: Any, value: Any, rel_pos_bias: Any = None, kernel_size: Sequence[int] = (),
        stride: Sequence[int] = (), dilation: Sequence[int] = (), is_causal: Sequence[bool] = (), scale: float = 1.0,
        backend: str = "auto",
    ) -> Any:  # fmt: skip
        q, k, v, bias = _inputs(query, key, value, rel_pos_bias)
        return _outputs(operator.attend(q, k, v, bias, kernel_size, stride, dilation, is_causal, scale))

    def scores(
        query: Any, key: Any, rel_pos_bias: Any = None, kernel_size: Sequence[int] = (), stride: Sequence[int] = (),
        dilation: Sequence[int] = (), is_causal: Sequence[bool] = (), scale: float = 1.0, backend: str = "auto",
    ) -> Any:  # fmt: skip
        q, k, bias = _inputs(query, key, rel_pos_bias)
        return _outputs(operator.scores(q, k, bias, kernel_size, stride, dilation, is_causal, scale))

    def weighted_sum(
        weights: Any, value: Any, kernel_size: Sequence[int] = (), stride: Sequence[int] = (),
        dilation: Sequence[int] = (), is_causal: Sequence[bool] = (), backend: str = "auto",
    ) -> Any:  # fmt: skip
        w, v = _inputs(weights, value)
        return _outputs(operator.weighted_sum(w, v, kernel_size, stride, dilation, is_causal))

    return {
        torch.ops.nbhd.na_forward.default: na_forward,
        torch.ops.nbhd.scores.default: scores,
        torch.ops.nbhd.weighted_sum.default: weighted_sum,
    }


def _op() -> Any:
    """The operator set as functions that add a node to the graph being written."""
    from onnxscript import opset18

    return opset18


def _dtypes() -> list[tuple[Any, torch.dtype]]:
    import onnx_ir as ir

    return [
        (ir.DataType.FLOAT, torch.float32),
        (ir.DataType.DOUBLE, torch.float64),
        (ir.DataType.FLOAT16, torch.float16),
        (ir.DataType.BFLOAT16, torch.bfloat16),
        (ir.DataType.INT64, torch.int64),
        (ir.DataType.BOOL, torch.bool),
    ]


def _inputs(first: Any, *rest: Any) -> list[Any]:
    """The operator's inputs; batch and map of the first are those of the others of its rank."""
    found: list[Any] = [_input(first)]
    for value in rest:
        if value is None:
            found.append(None)
            continue
        tensor = _input(value)
        if tensor.ndim == found[0].ndim:  # a bias has one axis less or more static axes
            tensor.shape = (*found[0].shape[:-2], *tensor.shape[-2:])
        found.append(tensor)
    return found


def _input(value: Any) -> OnnxTensor:
    dtype = next((there for here, there in _dtypes() if here == value.dtype), torch.float32)
    shape: list[Any] = []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(size)
            continue
        one = _op().Shape(value, start=axis, end=axis + 1)
        shape.append(OnnxTensor(_op().Squeeze(one), (), torch.int64))
    return OnnxTensor(value, tuple(shape), dtype)


def _outputs(result: Any) -> Any:
    return tuple(part.value for part in result) if isinstance(result, tuple) else result.value


class OnnxTensor:
    """A value of the graph with its shape, dtype, and the part of `torch.Tensor` that the operator uses."""

    device = None

    def __init__(self, value: Any, shape: Sequence[Any], dtype: torch.dtype) -> None:
        self.value = value
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known: dict[Any, Any] = {
            torch.minimum: cls._minimum, torch.maximum: cls._maximum, torch.matmul: cls._matmul, torch.exp: cls._exp,
            torch.log: cls._log, torch.where: cls._where, torch.cat: cls._cat, torch.stack: cls._stack,
            torch.full_like: cls._full_like,
        }  # fmt: skip
        return known[func](*args, **(kwargs or {}))

    @classmethod
    def range(cls, length: Any) -> OnnxTensor:
        """0 to ``length - 1``."""
        if isinstance(length, OnnxTensor):
            zero, one = _op().Constant(value_int=0), _op().Constant(value_int=1)
            return cls(_op().Range(zero, length.value, one), (length,), torch.int64)
        return cls(_op().Constant(value_ints=list(range(length))), (length,), torch.int64)

    # ---- arithmetic

    def _binary(self, name: str, other: Any, result: torch.dtype | None = None, is_swapped: bool = False) -> OnnxTensor:
        other = other if isinstance(other, OnnxTensor) else self._constant(other)
        pair = (other.value, self.value) if is_swapped else (self.value, other.value)
        shape = _broadcast(self.shape, other.shape)
        return OnnxTensor(getattr(_op(), name)(*pair), shape, result or self.dtype)

    def _constant(self, number: float) -> OnnxTensor:
        return _number(number, self.dtype)

    def __add__(self, other: Any) -> OnnxTensor:
        return self if _is(other, 0) else self._binary("Add", other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> OnnxTensor:
        return self if _is(other, 0) else self._binary("Sub", other)

    def __rsub__(self, other: Any) -> OnnxTensor:
        return self._binary("Sub", other, is_swapped=True)

    def __mul__(self, other: Any) -> OnnxTensor:
        return self if _is(other, 1) else self._binary("Mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> OnnxTensor:
        return self._binary("Div", other)

    def __floordiv__(self, other: int) -> OnnxTensor:
        # ONNX rounds towards zero; what the operator divides is exact where it is negative.
        return self if _is(other, 1) else self._binary("Div", other)

    def __mod__(self, other: int) -> OnnxTensor:
        return self._binary("Mod", other)

    def __ge__(self, other: Any) -> OnnxTensor:
        return self._binary("GreaterOrEqual", other, torch.bool)

    def __gt__(self, other: Any) -> OnnxTensor:
        return self._binary("Greater", other, torch.bool)

    def __lt__(self, other: Any) -> OnnxTensor:
        return self._binary("Less", other, torch.bool)

    def __and__(self, other: Any) -> OnnxTensor:
        return self._binary("And", other)

    def clamp(self, min: int | None = None, max: int | None = None) -> OnnxTensor:
        found = self if min is None else self._binary("Max", min)
        return found if max is None else found._binary("Min", max)

    def _minimum(self, other: Any) -> OnnxTensor:
        return self._binary("Min", other)

    def _maximum(self, other: Any) -> OnnxTensor:
        return self._binary("Max", other)

    def _exp(self) -> OnnxTensor:
        return OnnxTensor(_op().Exp(self.value), self.shape, self.dtype)

    def _log(self) -> OnnxTensor:
        return OnnxTensor(_op().Log(self.value), self.shape, self.dtype)

    def _full_like(self, number: int) -> OnnxTensor:
        return self * 0 + number

    def _where(self, yes: float, no: float) -> OnnxTensor:
        pair = (_number(yes, torch.float32).value, _number(no, torch.float32).value)
        return OnnxTensor(_op().Where(self.value, *pair), self.shape, torch.float32)

    def masked_fill(self, mask: OnnxTensor, number: float) -> OnnxTensor:
        return OnnxTensor(_op().Where(mask.value, self._constant(number).value, self.value), self.shape, self.dtype)

    def to(self, dtype: torch.dtype) -> OnnxTensor:
        if dtype == self.dtype:
            return self
        kind = next(here for here, there in _dtypes() if there == dtype)
        return OnnxTensor(_op().Cast(self.value, to=int(kind)), self.shape, dtype)

    # ---- reductions and products

    def amax(self, axis: int, keepdim: bool) -> OnnxTensor:
        return self._reduced("ReduceMax", axis)

    def sum(self, axis: int, keepdim: bool) -> OnnxTensor:
        return self._reduced("ReduceSum", axis)

    def _reduced(self, name: str, axis: int) -> OnnxTensor:
        axis %= self.ndim
        value = getattr(_op(), name)(self.value, _ints([axis]), keepdims=1)
        return OnnxTensor(value, (*self.shape[:axis], 1, *self.shape[axis + 1 :]), self.dtype)

    def _matmul(self, other: OnnxTensor) -> OnnxTensor:
        shape = (*_broadcast(self.shape[:-2], other.shape[:-2]), self.shape[-2], other.shape[-1])
        return OnnxTensor(_op().MatMul(self.value, other.value), shape, self.dtype)

    # ---- layout

    def index_select(self, axis: int, index: OnnxTensor) -> OnnxTensor:
        shape = (*self.shape[:axis], *index.shape, *self.shape[axis + 1 :])
        return OnnxTensor(_op().Gather(self.value, index.value, axis=axis), shape, self.dtype)

    def narrow(self, axis: int, begin: int, length: int) -> OnnxTensor:
        axis %= self.ndim
        value = _op().Slice(self.value, _ints([begin]), _ints([begin + length]), _ints([axis]))
        return OnnxTensor(value, (*self.shape[:axis], length, *self.shape[axis + 1 :]), self.dtype)

    def movedim(self, source: int, destination: int) -> OnnxTensor:
        order = list(range(self.ndim))
        moved = order.pop(source)
        order.insert(destination % self.ndim, moved)
        return OnnxTensor(_op().Transpose(self.value, perm=order), [self.shape[i] for i in order], self.dtype)

    def squeeze(self, axis: int) -> OnnxTensor:
        axis %= self.ndim
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        return OnnxTensor(_op().Squeeze(self.value, _ints([axis])), shape, self.dtype)

    def _unsqueezed(self, axis: int) -> OnnxTensor:
        shape = (*self.shape[:axis], 1, *self.shape[axis:])
        return OnnxTensor(_op().Unsqueeze(self.value, _ints([axis])), shape, self.dtype)

    @staticmethod
    def _cat(tensors: Sequence[OnnxTensor], axis: int) -> OnnxTensor:
        first = tensors[0]
        size = sum(tensor.shape[axis] for tensor in tensors)
        value = _op().Concat(*(tensor.value for tensor in tensors), axis=axis)
        return OnnxTensor(value, (*first.shape[:axis], size, *first.shape[axis + 1 :]), first.dtype)

    @staticmethod
    def _stack(tensors: Sequence[OnnxTensor], axis: int) -> OnnxTensor:
        return OnnxTensor._cat([tensor._unsqueezed(axis) for tensor in tensors], axis)

    def reshape(self, *shape: Any) -> OnnxTensor:
        if shape == (-1,):
            known = all(isinstance(size, int) for size in self.shape)
            sizes: tuple[Any, ...] = (math.prod(self.shape) if known else _Unknown(),)
            return OnnxTensor(_op().Reshape(self.value, _ints([-1])), sizes, self.dtype)
        if -1 in shape:  # a column along one axis
            place = shape.index(-1)
            shape = (*shape[:place], self.shape[0], *shape[place + 1 :])
        parts: list[Any] = []
        inferred = False
        for axis, size in enumerate(shape):
            if isinstance(size, int):
                parts.append(size)
            elif axis < self.ndim and self.shape[axis] is size:
                parts.append(0)  # as it is
            elif not inferred:
                parts.append(-1)
                inferred = True
            else:
                parts.append(size)
        return OnnxTensor(_op().Reshape(self.value, _sizes(parts)), shape, self.dtype)


class _Unknown:
    """A size that nothing is done with."""


def _is(number: Any, value: int) -> bool:
    return isinstance(number, int) and number == value


def _number(number: float, dtype: torch.dtype) -> OnnxTensor:
    if dtype == torch.int64:
        return OnnxTensor(_op().Constant(value_int=int(number)), (), dtype)
    return OnnxTensor(_op().Constant(value_float=float(number)), (), torch.float32).to(dtype)


def _ints(numbers: Sequence[int]) -> Any:
    return _op().Constant(value_ints=list(numbers))


def _sizes(parts: Sequence[Any]) -> Any:
    """A shape as a tensor, from ints and scalars of the graph."""
    if all(isinstance(part, int) for part in parts):
        return _ints(parts)
    pieces = [_ints([part]) if isinstance(part, int) else _op().Reshape(part.value, _ints([1])) for part in parts]
    return _op().Concat(*pieces, axis=0)


def _broadcast(first: Sequence[Any], second: Sequence[Any]) -> tuple[Any, ...]:
    """The shape of an elementwise result. Of two unknown sizes the first is taken: they are equal."""
    first, second = list(first), list(second)
    longest = max(len(first), len(second))
    first, second = [1] * (longest - len(first)) + first, [1] * (longest - len(second)) + second
    return tuple(b if _is(a, 1) else a for a, b in zip(first, second, strict=True))
