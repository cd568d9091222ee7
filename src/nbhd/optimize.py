"""Models made ready to be run and not trained: `optimize_for_inference`."""

from __future__ import annotations

import functools
import os
import shutil
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nbhd.backends import cpu
from nbhd.backends.cpu_linear import DTYPES, product_dtype
from nbhd.errors import ArgumentError
from nbhd.nn.convolution import Conv2d
from nbhd.nn.linear import Linear, is_plain
from nbhd.nn.packed import PackedConv2d, PackedLinear, packed_convolutions_are_faster, packed_linear_gain

Model = TypeVar("Model", bound=nn.Module)

#: bfloat16 is taken where a product in it is this many times faster than in float32 on this machine.
WORTH_IT = 1.2

#: `torch.compile`'s ``options`` for a NAT on a CPU. Inductor lays out what comes before a convolution with axis 1
#: innermost, as if it were (B, C, H, W). NAT's maps have their channels last already: norms and sums would walk them
#: crosswise.
COMPILE_OPTIONS_ON_CPUS = {"layout_optimization": False}


@dataclass(frozen=True)
class Step:
    """One thing that was or was not done, and why.

    Attributes:
        name: ``"evaluation mode"``, ``"fused qkv"``, ``"dtype"``, ``"packed weights"`` or ``"compile"``.
        done: whether the model was changed.
        reason: in words.
    """

    name: str
    done: bool
    reason: str


@dataclass
class InferenceReport:
    """What `optimize_for_inference` did; ``print`` shows a line for each step."""

    steps: list[Step] = field(default_factory=list)

    def add(self, name: str, done: bool, reason: str) -> None:
        """Append a step."""
        self.steps.append(Step(name, done, reason))

    def __getitem__(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def __str__(self) -> str:
        return "\n".join(
            f"{step.name:<16} {'done' if step.done else 'not done':<9} {step.reason}" for step in self.steps
        )


def optimize_for_inference(model: Model, dtype: torch.dtype | str | None = "auto", compile: bool = False) -> Model:
    """Make a model fast to run, in place.

    Evaluation mode, no gradients; dropout and drop path taken out; the three products for query, key and value of each
    neighborhood attention fused into one, whose result the operator reads through strided views, without copies
    (attentions with hooks, adapters or a ``forward`` of their own stay as they are). On CPUs where it is faster (it is
    measured, once a process: `nbhd.nn.packed`), weights are kept a second time, in the order they are multiplied in (in
    float32 but where products are of bfloat16), and the native core makes the products with the norms, GELU and
    residuals around them.

    Args:
        model: `NatForImageClassification`, `NatModel`, `NatBackbone`, or any model with one of them inside. What is not
            of NAT is only put into evaluation mode and, with ``dtype``, converted.
        dtype: ``torch.bfloat16`` or another floating dtype to convert the model to; ``"auto"`` for bfloat16 where it is
            measured to be faster on this CPU (a product is timed, once a process), and the dtype it has elsewhere; None
            leaves it. NAT converts its pixels itself; what stands around a NAT may want them converted.
        compile: compile the NAT (``torch.compile``, dynamic shapes as it sees fit) at its first call. It takes a C++
            compiler on the CPU, and minutes for a large model.

    Returns:
        The same object. ``model.inference_report`` says what was done and what not, and why: ``print`` it.

        Its ``state_dict`` has the keys and shapes it had (query, key and value apart), takes such a one in
        ``load_state_dict``, and ``save_pretrained`` writes an ordinary checkpoint, in the dtype the model has now. It
        is not for training any more.

    Raises:
        ArgumentError: no module, no NAT in it, or a dtype that is none.

    Example:
        >>> model = nbhd.optimize_for_inference(model, dtype=None)  # doctest: +SKIP
        >>> print(model.inference_report)  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not (dtype is None or dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise ArgumentError(f"dtype must be 'auto', None or a floating dtype such as torch.bfloat16, got {dtype!r}.")
    from nbhd.models import NatPreTrainedModel

    nats: list[nn.Module] = [module for module in model.modules() if isinstance(module, NatPreTrainedModel)]
    nats = [nat for nat in nats if not any(nat is not other and nat in set(other.modules()) for other in nats)]
    if not nats:
        raise ArgumentError(
            f"model must be or contain a NAT of nbhd.models, got a {type(model).__name__} without one. "
            "For other models use torch.compile and model.to(dtype) directly."
        )
    report = InferenceReport()
    model.eval().requires_grad_(False)
    removed = sum(_remove_dropout(nat) for nat in nats)
    report.add("evaluation mode", True, f"no gradients; {removed} modules of dropout and drop path taken out")
    fused, left = (sum(counts) for counts in zip(*map(_fuse, nats), strict=True))
    done = [f"{fused} attentions make query, key and value in one product"] if fused else []
    done += [f"{left} are left as they are, with hooks, adapters or layers of their own"] if left else []
    report.add("fused qkv", fused > 0, "; ".join(done) or "fused already")
    _convert(model, nats, dtype, report)
    _pack(nats, compile, report)
    _compile(nats, compile, next(model.parameters()).device, report)
    model.inference_report = report  # type: ignore[assignment]
    return model


def _remove_dropout(nat: nn.Module) -> int:
    from nbhd.models.nat.layers import NatDropPath, NeighborhoodAttention

    removed = 0
    for module in list(nat.modules()):
        if isinstance(module, NeighborhoodAttention):
            continue  # replaced as a whole
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Dropout, NatDropPath)):
                setattr(module, name, nn.Identity())
                removed += 1
    return removed


def _fuse(nat: nn.Module) -> tuple[int, int]:
    """How many attentions were fused, and how many had to be left."""
    from nbhd.models.nat.fused_attention import FusedNeighborhoodAttention
    from nbhd.models.nat.inference_layers import may_be_fused
    from nbhd.models.nat.layers import NeighborhoodAttention

    fused = left = 0
    for module in list(nat.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, NeighborhoodAttention):
                continue
            if may_be_fused(child):
                setattr(module, name, FusedNeighborhoodAttention(child))
                fused += 1
            else:
                left += 1
    return fused, left


def _first_weight(nats: list[nn.Module]) -> Tensor:
    """What tells the dtype and the device: integers, of quantised layers, do not."""
    return next(parameter for parameter in nats[0].parameters() if parameter.is_floating_point())


def _convert(model: nn.Module, nats: list[nn.Module], dtype: Any, report: InferenceReport) -> None:
    now = _first_weight(nats)
    if dtype is None:
        report.add("dtype", False, f"left at {_name(now.dtype)} as asked")
        return
    if now.device.type != "cpu":
        if dtype == "auto":
            report.add("dtype", False, f"left at {_name(now.dtype)}: not yet measured on {now.device.type}; name one")
            return
        gain = None
    else:
        gain = bfloat16_gain() if dtype in ("auto", torch.bfloat16) else None
    measured = "" if gain is None else f"a product in bfloat16 takes {1 / gain:.2g} times float32's time on this CPU"
    if dtype == "auto":
        if now.dtype != torch.float32:
            report.add("dtype", False, f"it is {_name(now.dtype)} already")
            return
        if gain is None or gain < WORTH_IT:
            report.add("dtype", False, f"left at float32: {measured}")
            return
        dtype = torch.bfloat16
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if dtypes == {dtype}:
        report.add("dtype", False, f"it is {_name(dtype)} already")
        return
    before = " and ".join(sorted(map(_name, dtypes)))
    model.to(dtype)
    slower = "" if gain is None or gain >= 1 else "; PyTorch's layers are slower in it, though half the size"
    report.add("dtype", True, f"{before} to {_name(dtype)}" + (f": {measured}{slower}" if measured else ""))


@functools.cache
def bfloat16_gain() -> float:
    """How many times faster a product of matrices is in bfloat16 than in float32 on this CPU, measured in this process.

    Above 1 with AVX512-BF16, AMX or Arm's bf16 instructions; far below without. Takes some milliseconds, once.
    """

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(256, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        torch.mm(a, b)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        return seconds(torch.float32) / seconds(torch.bfloat16)


def _pack(nats: list[nn.Module], compile: bool, report: InferenceReport) -> None:
    weight = _first_weight(nats)
    reason = None
    if compile:
        reason = "weights in compiled graphs are put in order at each call"
    elif weight.device.type != "cpu" or weight.dtype not in DTYPES:
        reason = f"for float32 and 16 bits on a CPU, not {_name(weight.dtype)} on {weight.device.type}"
    if reason is not None:
        report.add("packed weights", False, reason)
        return
    gain = packed_linear_gain(weight.dtype)
    with_convolutions = weight.dtype == torch.float32 and packed_convolutions_are_faster()
    if gain <= 1 and not with_convolutions:
        watched = "it cannot be measured under a mode that watches PyTorch's operators"
        slower = f"an MLP takes {1 / gain:.2g} times as long on this CPU" if gain else cpu.why_unusable() or watched
        report.add("packed weights", False, slower)
        return
    kinds = ((Linear,) if gain > 1 else ()) + ((nn.Conv2d, Conv2d) if with_convolutions else ())
    weights = [packed for nat in nats for packed in _pack_layers(nat, kinds, weight.dtype)]
    if not weights:
        report.add("packed weights", False, "packed already, or hooks are in the way")
        return
    size = sum(weight.numel() for weight in weights) * product_dtype(weight.dtype).itemsize / 2**20
    reason = f"{len(weights)} layers keep their weights a second time from their first call on, {size:.3g} MiB in all"
    if joined := sum(map(_join_layers, nats)):
        reason += f"; {joined} layers of NAT in four calls each: an MLP is {gain:.2f} times as fast on this CPU"
    report.add("packed weights", True, reason)


def _pack_layers(nat: nn.Module, kinds: tuple[type[nn.Module], ...], dtype: torch.dtype) -> list[Tensor]:
    """Puts layers with packed weights in the place of those of ``kinds`` and ``dtype``, and returns their weights."""
    weights: list[Any] = []
    for module in list(nat.modules()):
        for name, child in list(module.named_children()):
            packed: nn.Module
            weight = getattr(child, "weight", None)
            if type(weight) is not nn.Parameter or weight.dtype != dtype or type(child) not in kinds:
                continue
            if isinstance(child, Linear) and is_plain(child):
                packed = PackedLinear(child)
            elif isinstance(child, nn.Conv2d) and PackedConv2d.suits(child) and is_plain(child):
                packed = PackedConv2d(child)
            else:
                continue
            setattr(module, name, packed)
            weights.append(child.weight)
    return weights


def _join_layers(nat: nn.Module) -> int:
    """Puts layers that run as a whole in the place of those that have packed weights, and returns how many."""
    from nbhd.models.nat.inference_layers import PackedNatLayer

    joined = 0
    for module in list(nat.modules()):
        for name, child in list(module.named_children()):
            if PackedNatLayer.suits(child):
                setattr(module, name, PackedNatLayer(child))  # type: ignore[arg-type]
                joined += 1
    return joined


def _compile(nats: list[nn.Module], wanted: bool, device: torch.device, report: InferenceReport) -> None:
    if not wanted:
        report.add("compile", False, "not asked for")
        return
    if device.type == "cpu" and not _has_compiler():
        report.add("compile", False, "there is no C++ compiler (g++, clang++ or the environment variable CXX)")
        return
    options: Any = COMPILE_OPTIONS_ON_CPUS if device.type == "cpu" else None
    for nat in nats:
        nat.compile(options=options)
    names = ", ".join(sorted({type(nat).__name__ for nat in nats}))
    report.add("compile", True, f"{names} at the first call, which takes seconds to minutes")


def _has_compiler() -> bool:
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named.split()[0]] if named else ["g++", "clang++", "c++", "cl"]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
