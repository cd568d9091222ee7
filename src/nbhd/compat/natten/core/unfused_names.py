"""The unfused pair under its historical names and argument orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nbhd.compat.natten.core import unfused
from nbhd.compat.natten.core.signature import Signature, heads_first, named

Function = Callable[..., Tensor]

_SCORES = "Scores of each query with the keys of its window"
_VALUES = "Attention weights times the values of each window"


def _signature(era: str, name: str, axes: int, arguments: str) -> Signature:
    first = "query and key" if "qk" in name else "value"
    return Signature(era, name, f"({arguments}), {first} {heads_first(axes)}, heads first")


def _doc(what: str, axes: int, signature: Signature) -> str:
    result = "slots]" if "qk" in signature.name else "dim]"
    shape = heads_first(axes).replace("dim]", result)
    takes = f"As in NATTEN {signature.era}: takes {signature.takes}. No scaling, no softmax."
    errors = "Raises:\n        ArgumentError: a shape or parameter does not fit (a ``ValueError``)."
    return f"{what}: ``{shape}``.\n\n    {takes}\n\n    {errors}"


def _suffix(axes: int, three: str, fewer: str) -> str:
    return three if axes == 3 else fewer


def qkrpb_from_bias(era: str, module: str, axes: int) -> Function:
    """``natten*dqkrpb(query, key, rpb, dilation)``, up to 0.14.4: the window follows from the bias."""
    name = f"natten{axes}dqkrpb"
    signature = _signature(era, name, axes, "query, key, rpb, dilation")

    def qkrpb(query: Tensor, key: Tensor, rpb: Tensor, dilation: Any) -> Tensor:
        if not isinstance(rpb, Tensor) or rpb.ndim != axes + 1 or any(n % 2 == 0 for n in rpb.shape[1:]):
            raise signature.error(
                f"rpb must be [heads, {', '.join(['2 * kernel_size - 1'] * axes)}], got {_text(rpb)}."
            )
        kernel_size = tuple((n + 1) // 2 for n in rpb.shape[1:])
        return unfused.scores(signature, axes, query, key, kernel_size, dilation, rpb=rpb)

    return named(qkrpb, name, module, _doc(_SCORES + ", with a relative position bias", axes, signature))


def av_from_attention(era: str, module: str, axes: int) -> Function:
    """``natten*dav(attn, value, dilation)``, up to 0.14.4: the window follows from the attention."""
    name = f"natten{axes}dav"
    signature = _signature(era, name, axes, "attn, value, dilation")

    def av(attn: Tensor, value: Tensor, dilation: Any) -> Tensor:
        slots = attn.shape[-1] if isinstance(attn, Tensor) and attn.ndim else 0
        kernel_size = round(slots ** (1 / axes))
        if kernel_size**axes != slots:
            raise signature.error(f"The last axis of attn must be kernel_size ** {axes}, got {_text(attn)}.")
        return unfused.weighted_sum(signature, axes, attn, value, kernel_size, dilation)

    return named(av, name, module, _doc(_VALUES, axes, signature))


def qkrpb(era: str, module: str, axes: int) -> Function:
    """``natten*dqkrpb``: bias before the window; on three axes the depth has its window and dilation apart."""
    name = f"natten{axes}dqkrpb"
    window = _suffix(axes, "kernel_size_d, kernel_size, dilation_d, dilation", "kernel_size, dilation")
    signature = _signature(era, name, axes, f"query, key, rpb, {window}")

    def qkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Any, dilation: Any) -> Tensor:
        return unfused.scores(signature, axes, query, key, kernel_size, dilation, rpb=rpb)

    def qkrpb_3d(
        query: Tensor,
        key: Tensor,
        rpb: Tensor | None,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
    ) -> Tensor:
        window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
        return unfused.scores(signature, 3, query, key, *window, rpb=rpb)

    doc = _doc(_SCORES + ", with a relative position bias (or None)", axes, signature)
    return named(qkrpb_3d, name, module, doc) if axes == 3 else named(qkrpb, name, module, doc)


def qk_with_bias(era: str, module: str, axes: int) -> Function:
    """``na*d_qk_with_bias`` of 0.15: ``natten*dqkrpb`` with additional tokens, and ``bias`` as the bias's name."""
    name = f"na{axes}d_qk_with_bias"
    window = _suffix(axes, "kernel_size_d, kernel_size, dilation_d, dilation", "kernel_size, dilation")
    signature = _signature(era, name, axes, f"query, key, bias, {window}, additional_keys=None")

    def qk_with_bias(
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        kernel_size: Any,
        dilation: Any,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        return unfused.scores(
            signature, axes, query, key, kernel_size, dilation, rpb=bias, additional_keys=additional_keys
        )

    def qk_with_bias_3d(
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
        return unfused.scores(signature, 3, query, key, *window, rpb=bias, additional_keys=additional_keys)

    doc = _doc(_SCORES + ", with a relative position bias (or None)", axes, signature)
    return named(qk_with_bias_3d, name, module, doc) if axes == 3 else named(qk_with_bias, name, module, doc)


def plain_qk(era: str, module: str, axes: int, name: str) -> Function:
    """``natten*dqk``, and ``na*d_qk`` of 0.15: no bias, no causal axis."""
    window = _suffix(axes, "kernel_size_d, kernel_size, dilation_d, dilation", "kernel_size, dilation")
    signature = _signature(era, name, axes, f"query, key, {window}, additional_keys=None")

    def qk(
        query: Tensor, key: Tensor, kernel_size: Any, dilation: Any, additional_keys: Tensor | None = None
    ) -> Tensor:
        return unfused.scores(signature, axes, query, key, kernel_size, dilation, additional_keys=additional_keys)

    def qk_3d(
        query: Tensor,
        key: Tensor,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_keys: Tensor | None = None,
    ) -> Tensor:
        window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
        return unfused.scores(signature, 3, query, key, *window, additional_keys=additional_keys)

    doc = _doc(_SCORES, axes, signature)
    return named(qk_3d, name, module, doc) if axes == 3 else named(qk, name, module, doc)


def plain_av(era: str, module: str, axes: int, name: str) -> Function:
    """``natten*dav``, and ``na*d_av`` of 0.15."""
    window = _suffix(axes, "kernel_size_d, kernel_size, dilation_d, dilation", "kernel_size, dilation")
    signature = _signature(era, name, axes, f"attn, value, {window}, additional_values=None")

    def av(
        attn: Tensor, value: Tensor, kernel_size: Any, dilation: Any, additional_values: Tensor | None = None
    ) -> Tensor:
        return unfused.weighted_sum(
            signature, axes, attn, value, kernel_size, dilation, additional_values=additional_values
        )

    def av_3d(
        attn: Tensor,
        value: Tensor,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_values: Tensor | None = None,
    ) -> Tensor:
        window = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
        return unfused.weighted_sum(signature, 3, attn, value, *window, additional_values=additional_values)

    doc = _doc(_VALUES, axes, signature)
    return named(av_3d, name, module, doc) if axes == 3 else named(av, name, module, doc)


def qk(era: str, module: str, axes: int) -> Function:
    """``na*d_qk`` of 0.17: per-axis parameters, causal axes, the bias last."""
    name = f"na{axes}d_qk"
    arguments = "query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None"
    signature = _signature(era, name, axes, arguments)

    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: Any,
        dilation: Any = 1,
        additional_keys: Tensor | None = None,
        is_causal: Any = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        return unfused.scores(signature, axes, query, key, kernel_size, dilation, is_causal, rpb, additional_keys)

    return named(qk, name, module, _doc(_SCORES, axes, signature))


def av(era: str, module: str, axes: int) -> Function:
    """``na*d_av`` of 0.17."""
    name = f"na{axes}d_av"
    arguments = "attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False"
    signature = _signature(era, name, axes, arguments)

    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: Any,
        dilation: Any = 1,
        additional_values: Tensor | None = None,
        is_causal: Any = False,
    ) -> Tensor:
        return unfused.weighted_sum(signature, axes, attn, value, kernel_size, dilation, is_causal, additional_values)

    return named(av, name, module, _doc(_VALUES, axes, signature))


def with_apply(function: Function, name: str) -> type:
    """A class ``name`` whose ``apply`` is the function: callers take no more than that of NATTEN's autograd functions.

    The function has its own gradient already.
    """
    members = {"apply": staticmethod(function), "__module__": function.__module__, "__doc__": function.__doc__}
    return type(name, (), members)


def _text(tensor: Any) -> str:
    return str(tuple(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__


def old_names(module: str) -> dict[str, Function]:
    """The unfused functions of 0.14 to 0.17 that 0.20 dropped, for the eras after: each as it last was."""
    found: list[Function] = []
    for axes in (1, 2, 3):
        found += [qk("0.17", module, axes), av("0.17", module, axes), qk_with_bias("0.15", module, axes)]
        found += [
            qkrpb("0.17", module, axes),
            plain_qk("0.17", module, axes, f"natten{axes}dqk"),
            plain_av("0.17", module, axes, f"natten{axes}dav"),
        ]
    return {function.__name__: function for function in found}
