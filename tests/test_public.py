"""The public face: what is exported, documented, and what importing it costs."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys

import pytest

import nbhd

MODULES = ["nbhd", "nbhd.nn"]


@pytest.mark.parametrize("name", MODULES)
def test_exports_are_sorted_and_there(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    for key in module.__all__:
        assert hasattr(module, key)
    assert set(nbhd.__dir__()) == set(nbhd.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = nbhd.nothing


def test_every_public_function_and_class_says_what_it_does():
    silent = []
    for info in pkgutil.walk_packages(nbhd.__path__, "nbhd."):
        if any(part.startswith("_") for part in info.name.split(".")[1:]):
            continue
        module = importlib.import_module(info.name)
        assert module.__doc__, f"{info.name} has no docstring"
        for key, value in vars(module).items():
            own = getattr(value, "__module__", None) == info.name
            if own and not key.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
                if key in (
                    "why_unusable",
                    "why_not",
                    "forward",
                    "backward",
                    "scores_backward",
                    "weighted_sum_backward",
                ):
                    continue  # a backend's functions are described once, in nbhd.backends
                if not inspect.getdoc(value):
                    silent.append(f"{info.name}.{key}")
    assert not silent


def test_importing_registers_the_operators():
    """A program saved by torch.export finds them, whichever of the two is imported first."""
    for order in ("import nbhd, torch", "import torch, nbhd"):
        subprocess.run([sys.executable, "-c", f"{order}; torch.ops.nbhd.na_forward.default"], check=True)


PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import nbhd
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def test_importing_brings_nothing_heavy_and_takes_little_beyond_torch():
    best, brought = 9.0, set()
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
        seconds, names = json.loads(run.stdout)
        best, brought = min(best, seconds), brought | set(names)
    heavy = {"transformers", "torchvision", "triton", "ray", "gradio", "matplotlib", "kornia", "datasets", "pyarrow",
             "pandas", "scipy", "typer", "rich", "yaml", "PIL", "huggingface_hub"}  # fmt: skip
    assert not brought & heavy
    assert best < 1.0  # a guard against something heavy, not a timing: the figure is in benchmarks/


def test_torchvision_is_needed_nowhere():
    blocked = (
        "import sys; sys.modules['torchvision'] = None\nimport nbhd, nbhd.models, nbhd.tasks.classification, nbhd.cli"
    )
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", blocked], check=True)
