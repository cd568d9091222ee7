"""Which device a job runs on."""

from __future__ import annotations

import torch

from nbhd.errors import ArgumentError


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device named, or for None the best one here: CUDA (ROCm included), then MPS, then the CPU.

    Raises:
        ArgumentError: torch knows no such device, or this machine has none.
    """
    if device is None:
        return torch.device(available_devices()[0])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(_refusal(device, "not a name torch knows")) from error
    if found.type not in available_devices():
        raise ArgumentError(_refusal(device, "not available on this machine"))
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise ArgumentError(_refusal(device, f"this machine has {torch.cuda.device_count()} CUDA device(s)"))
    if found.type in ("cpu", "mps") and found.index not in (None, 0):
        raise ArgumentError(_refusal(device, f"there is one {found.type} device"))
    return found


def available_devices() -> list[str]:
    """The device types this machine has, best first."""
    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def _refusal(device: object, reason: str) -> str:
    return f"device {str(device)!r}: {reason}. Use one of {', '.join(map(repr, available_devices()))} here."
