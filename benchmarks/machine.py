"""Where and with what a run was made. No host name, no user, no path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nbhd

PACKAGES = ("transformers", "numpy", "natten")

#: Environment variables that change speed.
VARIABLES = (
    "NBHD_CPU_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_",
    "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """The machine, as the JSON keeps it; None for what is not known."""
    processor = _processor()
    return {
        "cpu": processor.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "family_model_stepping": [processor.get(key) for key in ("cpu family", "model", "stepping")],
        "flags": sorted((processor.get("flags") or processor.get("Features") or "").split()),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "caches": _caches(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": _memory_bytes(),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()}",
        "is_virtual": "hypervisor" in (processor.get("flags") or "").split(),
    }


def versions() -> dict[str, Any]:
    """Versions of what was measured and of what it ran on."""
    from nbhd.backends import cpu

    core = cpu.why_unusable()
    return {
        "nbhd": nbhd.__version__,
        "native_core": f"not usable: {core}" if core else cpu.description().partition(",")[0],
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_has_mkl": torch.backends.mkl.is_available(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def environment() -> dict[str, str]:
    """The variables that are set out of those that change speed; of a library that is preloaded only the name."""
    return {name: Path(os.environ[name]).name for name in VARIABLES if name in os.environ}


def load_average() -> float | None:
    """Runnable processes over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> dict[str, Any] | None:
    """The commit, and whether files that are measured differ from it; None outside a repository."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "csrc", "benchmarks/*.py", "CMakeLists.txt")
        return {"id": git("rev-parse", "HEAD"), "has_changes": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def slug(machine: dict[str, Any]) -> str:
    """A name for files: the processor and its cores."""
    words = re.sub(r"\(r\)|\(tm\)|\bcpu\b|\bprocessor\b|@.*", " ", str(machine["cpu"]).lower())
    name = "-".join(re.findall(r"[a-z0-9]+", words)) or str(machine["architecture"])
    family = machine["family_model_stepping"]
    if re.fullmatch(r"[a-z-]+", name) and family[0] and family[1]:  # "amd epyc" alone says little
        name += f"-f{family[0]}m{family[1]}"
    return f"{name}-{machine['usable_cores']}c"


def _processor() -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if not line.strip():
            break
        key, _, value = line.partition(":")
        found[key.strip()] = value.strip()
    if not found and platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found["model name"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found


def _caches() -> dict[str, str]:
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if level and size:
            found[f"L{level} {kind}"] = size
    return found


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
