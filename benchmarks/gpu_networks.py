"""Whole networks on the GPU, inference and training, with and without torch.compile: images a second and peak memory.

NAT-Tiny and NAT-Base against transformers' Swin-T, Swin-B and ConvNeXt-T; autocast to bfloat16, weights in float32.
All of them as they are first, which takes less than a minute, then compiled ones while there is time: compiling takes
minutes for some. What was left out is named in ``notes``.

Times are those of the calls as Python makes them, without CUDA graphs of ours.

Peak memory is what the network takes of the device: its weights, with training gradients and the optimizer's state too,
and the most that a step held beyond them. Other networks on the device are not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks import gpu_children
from benchmarks.gpu_children import why
from benchmarks.gpu_timing import first_call, free, milliseconds, peak_bytes
from benchmarks.models import LABELS, NETWORKS

BATCH, SIDE, ROUNDS = 128, 224, 5
HOWS = ("inference", "training")

#: What is compiled, in this order: each way of the small ones, then of the large ones.
COMPILED = tuple(
    (name, how)
    for names in (("nat-tiny", "swin-tiny", "convnext-tiny"), ("nat-base", "swin-base"))
    for how in HOWS
    for name in names
)
#: Seconds that compiling may take, before one was compiled: after that, what the longest took.
GUESS = {"inference": 60.0, "training": 150.0}


class Network:
    """A network on the device, with an optimizer once it has been trained."""

    def __init__(self, name: str, device: torch.device, batch: int, side: int, *, is_small: bool = False) -> None:
        torch.manual_seed(0)
        with device:  # its random weights are drawn there: on a processor that takes seconds
            network = NETWORKS[name](is_small)
        self.device = device
        self.network = network.to(device)
        pixels = torch.randn(batch, 3, side, side, device=device)
        if name.startswith("convnext"):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.pixels, self.labels = pixels, torch.arange(batch, device=device) % LABELS
        self.optimizer: torch.optim.Optimizer | None = None
        self._compiled: Any = None

    def compiled(self, compiler: str) -> Any:
        """The same network under torch.compile: no weights of its own."""
        if self._compiled is None:
            self._compiled = torch.compile(self.network, backend=compiler)
        return self._compiled

    def run(self, how: str, called: Callable[..., Any]) -> Callable[[], object]:
        """A batch of inference or a step of training by ``called``, the network or its compiled form."""

        def infer() -> object:
            self._switch(False)
            with torch.inference_mode(), self._autocast():
                return called(self.pixels).logits

        def train() -> object:
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, fused=True)
            self._switch(True)
            with self._autocast():
                loss = nn.functional.cross_entropy(called(self.pixels).logits, self.labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)  # at the end: between steps weights and state alone are there
            return loss.detach()

        return {"inference": infer, "training": train}[how]

    def _switch(self, training: bool) -> None:
        if self.network.training != training:  # a walk over all modules
            self.network.train(training)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def resident_bytes(self, how: str) -> int:
        """What lies on the device between two calls: weights and, for training, the optimizer's state."""
        kept: list[Tensor] = [*self.network.parameters(), *self.network.buffers()]
        if how == "training" and self.optimizer is not None:
            states = self.optimizer.state.values()
            kept += [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return sum(t.untyped_storage().nbytes() for t in kept if t.device.type == self.device.type)


def measure(
    device: torch.device, until: float = math.inf, names: str = "*", forms: tuple[bool, ...] = (False, True),
    without: dict[str, str] | None = None, *,
    tell: Callable[[dict[str, Any], str | None], None] = lambda found, doing: None, batch: int = BATCH,
    side: int = SIDE, is_small: bool = False, compiler: str = "inductor",
) -> dict[str, Any]:  # fmt: skip
    """Samples, images a second and peaks of the networks that ``names`` (a glob) matches, as they are (``False`` among
    ``forms``) and compiled (``True``).

    What cannot run, or has no time left, is named in ``notes``. An error after which this process is of no more use is
    raised: the caller begins anew ``without`` what ``tell`` was told last.
    """
    chosen = [name for name in NETWORKS if fnmatchcase(name, names)]
    without = without or {}
    found: dict[str, Any] = {"batch": batch, "side": side, "networks": {}, "notes": dict(without)}
    here: dict[str, Network] = {}

    def sample(label: str, how: str, run: Callable[[], object]) -> None:
        samples = found["networks"][label]["ms"].setdefault(how, [])
        samples.append(milliseconds(run, 2))
        rate = batch / statistics.median(samples) * 1e3
        found["networks"][label].setdefault("images_per_second", {})[how] = rate

    def prepared(parts: list[tuple[str, str]], is_compiled: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
        longest: dict[str, list[float]] = {how: [] for how in HOWS}
        for name, how in parts:
            label = f"{name}{' compiled' if is_compiled else ''}"
            part = f"{label} {how}"
            if part in without:
                continue
            needed = max(longest[how], default=GUESS[how]) if is_compiled else 0.0
            if time.monotonic() + needed > until:
                found["notes"][part] = "no time left"
                continue
            tell(found, part)
            begun = time.monotonic()
            try:
                if name not in here:
                    here[name] = Network(name, device, batch, side, is_small=is_small)
                network = here[name]
                called = network.compiled(compiler) if is_compiled else network.network
                run = network.run(how, called)
                seconds = first_call(run)
                run()  # the optimizer has its state from the first step on, the allocator its blocks
                peak = peak_bytes(run) + network.resident_bytes(how)
                entry = found["networks"].setdefault(label, {"first_call_seconds": {}, "peak_bytes": {}, "ms": {}})
                entry["first_call_seconds"][how], entry["peak_bytes"][how] = seconds, peak
                sample(label, how, run)  # should there be no time for more
            except Exception as error:  # out of memory, a compiler that fails: a result too
                _dropped(found, part, error)
                continue
            longest[how].append(time.monotonic() - begun)
            free()
            yield label, how, run

    # Code that the networks share is compiled for each of them and each way: ten times, and eight is the default. What
    # is beyond the limit would run uncompiled and be called compiled.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for is_compiled in forms:
        parts = list(COMPILED) if is_compiled else [(name, how) for name in NETWORKS for how in HOWS]
        runs = list(prepared([(name, how) for name, how in parts if name in chosen], is_compiled))
        for _ in range(ROUNDS - 1):
            for each in list(runs):
                label, how, run = each
                tell(found, f"{label} {how}")
                try:
                    sample(label, how, run)
                except Exception as error:
                    _dropped(found, f"{label} {how}", error)
                    runs.remove(each)
    return found


def _dropped(found: dict[str, Any], part: str, error: Exception) -> None:
    if not gpu_children.is_usable():
        raise error
    found["notes"][part] = why(error)
    free()
