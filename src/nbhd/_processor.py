"""What the processor is called and who made it."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch


def name() -> str:
    """Its model's name, such as ``AMD EPYC``; the architecture where the system tells no more."""
    return _linux("model name") or platform.processor() or platform.machine()


def maker() -> str | None:
    """``GenuineIntel``, ``AuthenticAMD`` and so on as x86 processors say it; None where that is not known."""
    named = _linux("vendor_id")
    if named is None and platform.system() == "Windows":  # "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD"
        named = platform.processor().rpartition(", ")[2] or None
    return named


def family() -> int | None:
    """Of x86 processors the family, such as 25 (AMD's Zen 3 and Zen 4); None where that is not known."""
    said = _linux("cpu family")
    if said is None and platform.system() == "Windows":
        said = next(iter(re.findall(r" Family (\d+) ", platform.processor())), None)
    return int(said) if said is not None and said.isdecimal() else None


def is_zen_4() -> bool:
    """Whether it is AMD's Zen 4, given that it has AVX-512: Zen 3, of the same family, has none."""
    return maker() == "AuthenticAMD" and family() == 25


def features() -> frozenset[str] | None:
    """What x86 processors say they have, by Linux's names such as ``amx_bf16``; None where that is not known."""
    said = _linux("flags")
    if said is not None:
        return frozenset(said.split())
    ask: Any = getattr(torch.cpu, "get_capabilities", dict)  # of PyTorch 2.11 and later; named as Linux names them
    found = ask()
    is_x86 = found.get("architecture") == "x86_64"
    return frozenset(name for name, value in found.items() if value is True) if is_x86 else None


def _linux(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next(
        (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == field), None
    )
