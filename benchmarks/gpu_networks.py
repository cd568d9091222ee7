"""Whole networks on the GPU: NAT-Tiny against Swin-T and ConvNeXt-T, images a second and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_timing import first_call, milliseconds, peak_bytes
from benchmarks.models import LABELS, NETWORKS

BATCH, SIDE, ROUNDS = 128, 224, 5


def _runs(network: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[], object]]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def infer() -> object:
        network.eval()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            return network(pixels).logits

    def train() -> object:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(pixels).logits, labels)
        loss.backward()
        optimizer.step()
        return loss

    return {"inference": infer, "training": train}


def measure(device: torch.device, until: float, *, with_compile: bool) -> dict[str, Any]:
    """Images a second of every network, interleaved; autocast to bfloat16, batch 128 at 224x224."""
    pixels = torch.randn(BATCH, 3, SIDE, SIDE, device=device)
    labels = torch.arange(BATCH, device=device) % LABELS
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    found: dict[str, Any] = {"batch": BATCH, "side": SIDE, "networks": {}, "notes": {}}
    for name, make in NETWORKS.items():
        for compiled in (False, True) if with_compile else (False,):
            label = f"{name}{' compiled' if compiled else ''}"
            if time.monotonic() > until:
                found["notes"][label] = "no time left"
                continue
            try:
                torch.manual_seed(0)
                network = make(False).to(device)
                if compiled:
                    network.compile()
                entry: dict[str, Any] = {"first_call_seconds": {}, "peak_bytes": {}, "ms": {}}
                each = _runs(network, pixels, labels)
                for how, run in each.items():
                    entry["first_call_seconds"][how] = first_call(run)
                    run()
                    entry["peak_bytes"][how] = peak_bytes(run)
            except Exception as error:  # out of memory, a compiler that fails: a result too
                found["notes"][label] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                continue
            found["networks"][label] = entry
            runs |= {(label, how): run for how, run in each.items()}
    for _ in range(ROUNDS):
        for (label, how), run in runs.items():
            found["networks"][label]["ms"].setdefault(how, []).append(milliseconds(run, 2))
    for entry in found["networks"].values():
        entry["images_per_second"] = {
            how: BATCH / statistics.median(samples) * 1e3 for how, samples in entry["ms"].items()
        }
    return found
