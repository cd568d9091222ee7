"""``nbhd info``."""

from __future__ import annotations

import json
import platform
from enum import StrEnum
from importlib import metadata
from typing import Annotated, Any

import typer

from nbhd import _processor
from nbhd._version import __version__
from nbhd.errors import CheckpointError

#: Packages whose versions decide how nbhd behaves; an optional one that is missing is shown as such.
PACKAGES = ("torch", "transformers", "triton", "numpy", "pillow", "pyarrow", "accelerate", "kornia")


class Format(StrEnum):
    """How the facts are written."""

    text = "text"
    json = "json"


def info(
    format: Annotated[Format, typer.Option("--format", "-f", help="For people or for programs.")] = Format.text,
) -> None:
    r"""Say what nbhd can use on this machine: versions, devices, which backends run and why the others do not.

    \b
    Example:
      nbhd info --format json
    """
    facts = gather()
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False) if format is Format.json else "\n".join(_lines(facts)))


def gather() -> dict[str, Any]:
    """The facts, as ``--format json`` prints them."""
    import torch

    from nbhd.nn import sixteen_bits

    return {
        "nbhd": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch itself names its build (+cpu, +cu130), which its metadata may not
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": str(torch.__version__)},
        "cpu": {
            "name": _processor.name(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            # what networks of nbhd in these compute in float32
            "slow_dtypes": [name for name in ("bfloat16", "float16") if sixteen_bits.are_slow(getattr(torch, name))],
        },
        "devices": _devices(),
        "backends": _backends(),
        "default_checkpoint": _default_checkpoint(),
        "image_formats": _image_formats(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, str]]:
    import torch

    from nbhd.tasks.devices import available_devices

    found = []
    for kind in available_devices():
        if kind == "cuda":
            count = torch.cuda.device_count()
            found += [{"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i)} for i in range(count)]
        else:
            found.append({"device": kind, "name": _processor.name() if kind == "cpu" else "Apple GPU"})
    return found


def _backends() -> dict[str, list[dict[str, Any]]]:
    """For each device type the backends ``backend="auto"`` tries, in that order, and their verdicts on this machine."""
    from nbhd import backends
    from nbhd.tasks.devices import available_devices

    here = available_devices()
    types = sorted({*backends.ORDER, *here})
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in types:
        found[kind] = []
        for name in backends.order(kind):
            details = None
            try:
                backend: Any = backends.load(name)
                reason = backend.why_unusable()
                if reason is None and hasattr(backend, "description"):
                    details = backend.description()
            except Exception as error:  # a broken installation is what this command is there to show
                reason = f"it cannot be imported: {error}"
            if reason is None and kind not in here:
                reason, details = f"this machine has no {kind} device", None
            found[kind].append({"name": name, "usable": reason is None, "reason": reason, "details": details})
    return found


def _default_checkpoint() -> dict[str, Any] | None:
    from nbhd.checkpoints import default_checkpoint

    try:
        folder = default_checkpoint()
    except CheckpointError:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "name": folder.name,
        "path": str(folder),
        "architecture": config["architectures"][0],
        "labels": len(config.get("id2label") or {}),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def _image_formats() -> list[str]:
    from PIL import features

    from nbhd.tasks.images import readable_formats

    libraries = {"JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp", "AVIF": "avif"}
    return [name for name in readable_formats() if name not in libraries or features.check(libraries[name])]


def _lines(facts: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version or '(not installed)'}" for name, version in facts["packages"].items())
    cpu = facts["cpu"]
    lines = [
        f"nbhd         {facts['nbhd']}, Python {facts['python']}, {facts['platform']}",
        f"packages     {packages}",
        f"CPU          {cpu['name']}: {cpu['isa']}, {cpu['threads']} thread{'s' * (cpu['threads'] != 1)}",
        "devices      " + ", ".join(f"{each['device']} ({each['name']})" for each in facts["devices"]),
    ]
    if slow := " and ".join(cpu["slow_dtypes"]):
        lines.append(f"16 bits      networks in {slow} compute in float32 on this CPU, where PyTorch is slower in them")
    lines.append("backends     in the order they are tried")
    for kind, backends in facts["backends"].items():
        for i, each in enumerate(backends):
            details = f": {each['details']}" if each["details"] else ""
            verdict = f"usable{details}" if each["usable"] else f"not usable: {each['reason']}"
            lines.append(f"  {'' if i else kind:<10} {each['name']:<10} {verdict}")
    model = facts["default_checkpoint"]
    if model is None:
        lines.append("model        none in this installation; name one with `nbhd classify --model`")
    else:
        size = f"{model['bytes'] / 1e6:.1f} MB"
        what = f"{model['architecture']}, {model['labels']} labels, {size}, comes with nbhd"
        lines.append(f"model        {model['name']}: {what}")
        lines.append(f"             {model['path']}")
    lines.append(f"pictures     {', '.join(facts['image_formats'])}")
    return lines
