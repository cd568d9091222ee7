"""Whole networks with random weights: images a second and peak memory, in one process, interleaved.

Each network is as its users have it: transformers' defaults (SDPA in Swin), channels-last memory where there are
convolutions only. A training step is forward, cross-entropy, backward and AdamW in one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.subject import NotHere, Subject
from nbhd.optimize import COMPILE_OPTIONS_ON_CPUS, optimize_for_inference

LABELS = 1000


@dataclass(frozen=True)
class ModelCase:
    """Networks on a batch of images.

    Args:
        networks: names in ``NETWORKS``; the first is the one the others are compared with.
        weight, is_default: as in ``cases.Case``.
        is_small: networks of a few layers, for quick runs.
    """

    name: str
    networks: tuple[str, ...]
    batch: int = 8
    side: int = 224
    weight: float = 25.0
    is_default: bool = True
    is_small: bool = False

    def small(self) -> ModelCase:
        return replace(self, batch=1, is_small=True)  # the side stays: Swin takes no map smaller than its window


CASES = {
    case.name: case
    for case in (
        ModelCase("models/tiny-224-b8", ("nat-tiny", "nat-tiny-optimized", "swin-tiny", "convnext-tiny")),
        ModelCase(
            "models/tiny-224-b8-bfloat16", ("nat-tiny-bfloat16", "nat-tiny", "swin-tiny-bfloat16"), is_default=False
        ),
        ModelCase(
            "models/tiny-224-b8-autocast",
            ("nat-tiny-autocast", "nat-tiny", "swin-tiny-autocast", "convnext-tiny-autocast"),
            is_default=False,
        ),
        ModelCase("models/tiny-224-b8-compiled", ("nat-tiny-compiled", "nat-tiny"), is_default=False),
        ModelCase(
            "models/tiny-224-b1",
            ("nat-tiny", "nat-tiny-optimized", "swin-tiny", "convnext-tiny"),
            batch=1,
            is_default=False,
        ),
    )
}


def _nat(is_small: bool, variant: str = "nat_tiny") -> nn.Module:
    from nbhd.models import NatConfig, NatForImageClassification

    smaller = {"embed_dim": 32, "depths": [1, 1, 1, 1]} if is_small else {}
    return NatForImageClassification(NatConfig.from_variant(variant, num_labels=LABELS, **smaller))


#: Swin-B where transformers' defaults are Swin-T (Liu et al. 2021, section 3.3). Its windows are 7x7 too.
SWIN_BASE = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}


def _swin(is_small: bool, **size: Any) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    options: dict[str, Any] = {"num_labels": LABELS, **size}
    if is_small:
        options |= {"depths": [1, 1, 1, 1], "embed_dim": 48}
    return SwinForImageClassification(SwinConfig(**options))


def _convnext(is_small: bool) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    options: dict[str, Any] = {"num_labels": LABELS}
    if is_small:
        options |= {"depths": [1, 1, 1, 1], "hidden_sizes": [24, 48, 96, 192]}
    network: nn.Module = ConvNextForImageClassification(ConvNextConfig(**options))  # its defaults are ConvNeXt-T
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


#: The larger two are in no case here: GPUs alone are measured with them (``gpu_networks``).
NETWORKS: dict[str, Callable[[bool], nn.Module]] = {
    "nat-tiny": _nat,
    "swin-tiny": _swin,
    "convnext-tiny": _convnext,
    "nat-base": functools.partial(_nat, variant="nat_base"),
    "swin-base": functools.partial(_swin, **SWIN_BASE),
}

#: What a network's name may end in.
VARIANTS = ("autocast", "bfloat16", "compiled", "optimized")

TITLES = {
    "nat-tiny": "NAT-Tiny (nbhd)",
    "nat-tiny-autocast": "NAT-Tiny (nbhd), autocast to bfloat16",
    "nat-tiny-bfloat16": "NAT-Tiny (nbhd), bfloat16",
    "nat-tiny-compiled": "NAT-Tiny (nbhd), torch.compile",
    "nat-tiny-optimized": "NAT-Tiny (nbhd), optimize_for_inference",
    "swin-tiny": "Swin-T (transformers)",
    "swin-tiny-autocast": "Swin-T (transformers), autocast to bfloat16",
    "swin-tiny-bfloat16": "Swin-T (transformers), bfloat16",
    "convnext-tiny": "ConvNeXt-T (transformers)",
    "convnext-tiny-autocast": "ConvNeXt-T (transformers), autocast to bfloat16",
    "nat-base": "NAT-Base (nbhd)",
    "swin-base": "Swin-B (transformers)",
}


def prepare(name: str, case: ModelCase) -> Subject:
    """A network ready for ``inference`` and, with weights of float32, ``training_step``, both in seconds a batch."""
    kind, variant = next(((name.removesuffix(f"-{v}"), v) for v in VARIANTS if name.endswith(v)), (name, ""))
    if variant == "compiled" and case.is_small:
        raise NotHere("compiling takes longer than a quick run")
    torch.manual_seed(0)
    network = NETWORKS[kind](case.is_small)
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    network = network.to(dtype)
    if variant == "optimized":
        network = optimize_for_inference(network, dtype=None)
    pixels = torch.randn(case.batch, 3, case.side, case.side, generator=torch.Generator().manual_seed(0)).to(dtype)
    if kind == "convnext-tiny":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(case.batch) % LABELS
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    called: Any = torch.compile(network, options=COMPILE_OPTIONS_ON_CPUS) if variant == "compiled" else network
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=variant == "autocast")
    # Lowering a network to its compiled form takes minutes for each mode; one is enough to say what it gains. What is
    # made for inference does not train.
    trains = variant in ("", "autocast")

    def infer() -> Tensor:
        network.eval()
        with torch.inference_mode(), autocast():
            logits: Tensor = called(pixels).logits
            return logits

    def step() -> Tensor:
        network.train()
        with autocast():
            loss: Tensor = called(pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def timed(quantity: str, call: Callable[[], Tensor]) -> Callable[[int], dict[str, float]]:
        def run(repeats: int) -> dict[str, float]:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return {quantity: (time.perf_counter() - start) / repeats}

        return run

    runs = {"inference": timed("inference", infer)}
    if trains:
        runs["training_step"] = timed("training_step", step)
    return Subject(
        name,
        runs,
        case.batch,
        once=lambda run: [infer() if run == "inference" else step()],
        only_at=torch.get_num_threads() if variant == "compiled" else None,
        is_compiled=variant == "compiled",
        notes=None if trains else {"training_step": "only inference is measured"},
    )


def useful_flop(case: ModelCase) -> dict[str, int]:
    """Multiplications and additions of our network on a batch: products, convolutions and the attention's windows."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):  # counted without being computed
        network: Any = _nat(case.is_small).eval()
        pixels = torch.zeros(case.batch, 3, case.side, case.side)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(pixels)
    counts = counter.get_flop_counts()["Global"]
    attention = int(counts[torch.ops.nbhd.na_forward])
    products = sum(counts.values()) - attention
    # The gradient of a product is two products; that of the attention is counted as in `flops`.
    return {"inference": products + attention, "training_step": 3 * products + attention * 14 // 4}
