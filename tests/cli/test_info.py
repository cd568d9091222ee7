"""``nbhd info``."""

from __future__ import annotations

import json
import types

import pytest
import torch

from nbhd import __version__, backends
from nbhd.backends import cpu
from nbhd.checkpoints import default_checkpoint
from nbhd.errors import CheckpointError
from nbhd.nn import sixteen_bits
from tests.commands import nbhd


def info() -> dict:
    run = nbhd("info", "--format", "json")
    assert (run.exit_code, run.stderr) == (0, "")
    return json.loads(run.stdout)


def test_facts() -> None:
    facts = info()
    assert facts["nbhd"] == __version__
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["isa"] == torch.backends.cpu.get_cpu_capability()
    assert facts["devices"][-1]["device"] == "cpu"
    assert {"JPEG", "PNG", "WEBP"} <= set(facts["image_formats"])


def test_verdicts_are_those_of_the_backends_in_their_order() -> None:
    found = info()["backends"]
    assert set(backends.ORDER) <= set(found)
    assert [each["name"] for each in found["cpu"]] == list(backends.order("cpu"))
    for each in found["cpu"]:
        reason = backends.load(each["name"]).why_unusable()
        details = cpu.description() if each["name"] == "cpu" and reason is None else None
        assert each == {"name": each["name"], "usable": reason is None, "reason": reason, "details": details}
    assert found["cpu"][-1] == {"name": "reference", "usable": True, "reason": None, "details": None}


@pytest.mark.skipif(cpu.why_unusable() is not None, reason=f"no native core: {cpu.why_unusable()}")
def test_the_library_is_named() -> None:
    library = cpu.loaded_library()
    run = nbhd("info")
    assert f"usable: {library.isa}, " in run.stdout and str(library.path) in run.stdout


@pytest.mark.parametrize("slow", [set(), {torch.bfloat16}, {torch.bfloat16, torch.float16}])
def test_dtypes_that_are_slow_are_named(slow: set[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sixteen_bits, "are_slow", slow.__contains__)
    names = [name for name in ("bfloat16", "float16") if getattr(torch, name) in slow]
    assert info()["cpu"]["slow_dtypes"] == names
    assert (f"networks in {' and '.join(names)} compute in float32" in nbhd("info").stdout) is bool(names)


def test_why_a_backend_is_not_usable_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.SimpleNamespace(why_unusable=lambda: "its library is missing.")
    monkeypatch.setattr(backends, "load", lambda name: broken)
    run = nbhd("info")
    assert run.exit_code == 0
    assert "not usable: its library is missing." in run.stdout


def test_a_backend_that_cannot_be_imported_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(backends, "load", load)
    run = nbhd("info")
    assert run.exit_code == 0
    assert "not usable: it cannot be imported: libfoo.so" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_backends_of_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.ORDER, "cuda", ("reference",))
    assert info()["backends"]["cuda"] == [
        {"name": "reference", "usable": False, "reason": "this machine has no cuda device", "details": None}
    ]


def test_the_default_checkpoint() -> None:
    found = info()["default_checkpoint"]
    try:
        folder = default_checkpoint()
    except CheckpointError:
        assert found is None
        return
    assert found["path"] == str(folder)
    assert found["labels"] == 10


def test_text_is_for_people() -> None:
    run = nbhd("info")
    assert run.exit_code == 0
    assert f"nbhd         {__version__}" in run.stdout
    assert "reference  usable" in run.stdout


def test_unknown_format() -> None:
    assert nbhd("info", "--format", "xml").exit_code == 2
