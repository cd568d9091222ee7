"""NATTEN's tuning knobs: accepted, without effect, and said so once each."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from nbhd.compat.natten.core.signature import Unsupported
from nbhd.errors import ArgumentError

#: Backends NATTEN has names for. Any other name goes to nbhd, whose own backends can be asked for.
BACKENDS = tuple(
    f"{family}-{kind}" for family in ("cutlass", "hopper", "blackwell", "flex") for kind in ("fna", "fmha")
)

#: The name under which the stand-in lists itself among backends.
OWN_BACKEND = "nbhd"

#: Defaults of the knobs of 0.20 and later. A knob left at its default is not worth a word.
DEFAULTS: dict[str, Any] = {
    "q_tile_shape": None,
    "kv_tile_shape": None,
    "backward_q_tile_shape": None,
    "backward_kv_tile_shape": None,
    "q_tile_size": None,
    "kv_tile_size": None,
    "backward_q_tile_size": None,
    "backward_kv_tile_size": None,
    "backward_kv_splits": None,
    "backward_use_pt_reduction": False,
    "run_persistent_kernel": True,
    "kernel_schedule": None,
    "torch_compile": False,
    "try_fuse_additional_kv": False,
    "use_autograd_fix": True,
    "use_experimental_ops": False,
    "xformers_kwargs": None,
}

_said: set[str] = set()


def ignored(name: str, why: str) -> None:
    """Warn, once in a process, that ``name`` changes nothing here."""
    if name in _said or torch.compiler.is_compiling():
        return
    _said.add(name)
    warnings.warn(f"NATTEN's {name} is accepted and has no effect in nbhd: {why}", stacklevel=4)


def forget() -> None:
    """Let every warning be given again."""
    _said.clear()


def ignore(**given: Any) -> None:
    """Warn of each knob that was moved from its default."""
    for name, value in given.items():
        if value is None or value is DEFAULTS[name] or value == DEFAULTS[name]:
            continue
        ignored(name, "tiles, schedules and reductions are chosen by the backend")


def check_schedule(schedule: Any) -> None:
    """Refuse what is no kernel schedule.

    Raises:
        ArgumentError: it is neither None, ``"non"``, ``"coop"``, ``"pp"`` nor a ``KernelSchedule``.
    """
    if schedule is None or schedule in ("non", "coop", "pp") or type(schedule).__name__ == "KernelSchedule":
        return
    raise ArgumentError(
        f"Kernel schedule {schedule} is invalid; choices are: `non` (non-persistent), `coop` (warp-specialized "
        "cooperative), `pp` (warp-specialized ping-pong), or None."
    )


def backend_for(name: Any, kind: str) -> str:
    """The nbhd backend that stands for a backend named the NATTEN way; ``kind`` is ``"fna"`` or ``"fmha"``.

    Raises:
        Unsupported: nobody knows the name (a ``NotImplementedError``, as in NATTEN).
    """
    if name is None or name in (OWN_BACKEND, "auto"):
        return "auto"
    if name in BACKENDS:
        ignored(f"backend={name!r}", "its kernels are not part of nbhd, which takes the best of its own")
        return "auto"
    if kind == "fna" and name in ("reference", "cpu", "triton"):
        return str(name)
    label = "NATTEN backend" if kind == "fna" else "NATTEN FMHA backend"
    raise Unsupported(f"Unrecognized {label} {name}. Known: {', '.join(BACKENDS)}, or None for the best there is.")
