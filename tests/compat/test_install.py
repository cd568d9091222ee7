"""``install()``, the environment variable and the command."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
import types
import unittest.mock
from pathlib import Path

import pytest
import torch

import nbhd
from nbhd.compat.natten import _finder, install, uninstall, v0_17
from nbhd.errors import ArgumentError

SOURCE = Path(nbhd.__file__).parents[1]
STARTUP = SOURCE / "startup"

VERSIONS = {
    None: ("0.21.7", "v0_21"),
    "0.14": ("0.14.6", "v0_14"),
    "0.14.2.post4": ("0.14.2.post4", "v0_14_4"),
    "0.14.4": ("0.14.4", "v0_14_4"),
    "0.14.5": ("0.14.5", "v0_14"),
    "0.15.0": ("0.15.0", "v0_15"),
    "0.17.1": ("0.17.1", "v0_17"),
    "0.20": ("0.20.1", "v0_20"),
    "0.21.1": ("0.21.1", "v0_21_1"),
    "0.21.5": ("0.21.5", "v0_21"),
    "0.21.9.dev3": ("0.21.9.dev3", "v0_21"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_versions(version):
    full, package = VERSIONS[version]
    assert install(version)
    natten = importlib.import_module("natten")
    era = importlib.import_module(f"nbhd.compat.natten.{package}")
    assert natten.__version__ == importlib.metadata.version("natten") == full
    assert importlib.util.find_spec("natten") is not None
    assert natten.NeighborhoodAttention2D is era.NeighborhoodAttention2D
    assert hasattr(natten, "context") == hasattr(era, "context")
    assert {name for name in dir(natten.functional) if not name.startswith("_")} == set(era.functional.__all__)
    exec("from natten import *", {})


@pytest.mark.parametrize("version", ["0.13", "0.16.0", "0.22", "1.0", "", "newest", "0.21.x"])
def test_versions_there_never_were(version):
    with pytest.raises(ArgumentError, match=r"no stand-in for NATTEN .*0.14, 0.15, 0.17, 0.20, 0.21"):
        install(version)
    assert importlib.util.find_spec("natten") is None


SUBMODULES = {
    "0.14.6": ["functional", "natten1d", "natten2d", "flops"],
    "0.15.1": ["functional", "natten3d"],
    "0.17.5": ["functional", "na2d", "natten2d", "context", "utils", "utils.log", "utils.checks", "types",
               "experimental", "flops"],
    "0.21.7": ["functional", "modules", "context", "types", "backends", "backends.configs", "backends.reference",
               "utils.checks", "utils.varlen", "utils.log", "version", "attn_merge"],
}  # fmt: skip


@pytest.mark.parametrize("version", SUBMODULES)
def test_submodules_are_there_with_one_import_of_the_package(version):
    install(version)
    natten = importlib.import_module("natten")
    for name in SUBMODULES[version]:
        found = natten
        for part in name.split("."):
            found = getattr(found, part)
        assert sys.modules[f"natten.{name}"] is found
    assert importlib.util.find_spec("natten.libnatten") is None
    with pytest.raises(ModuleNotFoundError, match=r"natten\.profiler"):
        importlib.import_module("natten.profiler")


#: Names that callers import from submodules.
NAMES = {
    "0.15.1": {
        "functional": "has_cuda has_half has_bfloat has_gemm has_tf32_gemm has_fp32_gemm has_fp64_gemm enable_tf32 "
        "disable_tf32 enable_gemm_na disable_gemm_na enable_tiled_na disable_tiled_na",
    },
    "0.17.5": {
        "utils.checks": "check_all_args check_kernel_size_arg check_dilation_arg check_causal_arg check_input_size_arg "
        "get_num_na_weights",
        "flops": "fna_flop_count na_qk_flop_count na_av_flop_count add_natten_handle get_flops",
        "context": "MemoryUsagePreference should_use_flex_attention should_force_flex_attention",
    },
    "0.20.1": {
        "utils.checks": "na_tensor_checks fmha_tensor_checks check_kernel_schedule is_self_attention",
        "attn_merge": "merge_attentions",
        "version": "__version__",
    },
    "0.21.1": {"attn_merge": "merge_attentions", "utils.checks": "check_kernel_schedule", "version": "__version__"},
    "0.21.6": {"attn_merge": "merge_attentions", "utils.checks": "check_kernel_schedule", "version": "__version__"},
}


@pytest.mark.parametrize("version", NAMES)
def test_names_in_submodules(version):
    install(version)
    natten = importlib.import_module("natten")
    for module, names in NAMES[version].items():
        found = importlib.import_module(f"natten.{module}")
        for name in names.split():
            assert hasattr(found, name), f"natten.{module}.{name}"
            if module in ("functional", "attn_merge", "version") and hasattr(natten, name):
                assert getattr(found, name) == getattr(natten, name)
    if version == "0.21.1":
        assert natten.version.__version__ == "0.21.1"
    if version.startswith("0.2"):
        takes_four = "has_additional_attention" in inspect.signature(natten.utils.checks.is_self_attention).parameters
        assert takes_four == (version == "0.21.6")


@pytest.mark.parametrize("mock", [unittest.mock.MagicMock(), types.SimpleNamespace(), types.ModuleType("natten")])
def test_a_mock_in_natten_s_place_is_left_alone(monkeypatch, mock):
    monkeypatch.setitem(sys.modules, "natten", mock)
    assert not install()
    uninstall()
    assert sys.modules["natten"] is mock


def test_no_context_before_0_17():
    install("0.15.1")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("natten.context")


def test_installing_twice():
    assert install("0.17.5")
    assert install()  # keeps what is there
    assert install("0.15")  # nothing has imported natten yet
    assert importlib.import_module("natten").__version__ == "0.15.1"
    assert install("0.15.1")
    with pytest.raises(ArgumentError, match=r"imported already, as 0\.15\.1"):
        install("0.17.5")
    uninstall()
    assert install("0.17.5")
    assert importlib.import_module("natten.functional").na2d is v0_17.functional.na2d
    assert sum(isinstance(finder, _finder.Finder) for finder in sys.meta_path) == 1


def test_never_in_the_place_of_natten_itself(tmp_path, monkeypatch):
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = 'real'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not install()
    assert importlib.import_module("natten").__version__ == "real"
    assert not install("0.17.5")
    del sys.modules["natten"]
    _finder.add("0.17.5")  # as at start-up, before it is known whether NATTEN is there
    assert importlib.import_module("natten").__version__ == "real"
    del sys.modules["natten"]
    assert not list(_finder.installed().find_distributions())


def test_a_folder_named_natten_does_not_hide_the_stand_in(tmp_path, monkeypatch):
    """A checkout of NATTEN's or NAT's repository in the working directory has one."""
    (tmp_path / "natten" / "src").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert install()
    assert importlib.import_module("natten").__version__ == "0.21.7"


def test_metadata_answers_for_this_process_alone(tmp_path):
    install("0.17.5")
    assert importlib.metadata.metadata("Natten")["Name"] == "natten"
    assert [d.version for d in importlib.metadata.distributions(name="natten")] == ["0.17.5"]
    assert "natten" in importlib.metadata.packages_distributions()
    assert not list(importlib.metadata.distributions(path=[str(tmp_path)]))  # what installers ask
    uninstall()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("natten")


def test_models_pickled_with_natten_s_module_names_load(tmp_path):
    install("0.17.5")
    from natten.natten2d import NeighborhoodAttention2D

    torch.save(NeighborhoodAttention2D(8, 2, 3), tmp_path / "whole.pt")
    assert torch.load(tmp_path / "whole.pt", weights_only=False).num_heads == 2


def test_transformers_is_told():
    utils = pytest.importorskip("transformers.utils.import_utils")
    assert not utils.is_natten_available()
    install()
    assert utils.is_natten_available()
    uninstall()
    assert not utils.is_natten_available()


SCRIPT = """
import sys
print("nbhd" in sys.modules, "torch" in sys.modules)
import natten, multiprocessing
from natten.functional import na2d_qk
print(natten.__version__, na2d_qk.__module__, sys.argv[1:], __name__)
"""


def python(*arguments, folder, **environment):
    """Run Python with nbhd's source on the path and a site folder holding the start-up line."""
    code = f"import site; site.addsitedir({str(STARTUP)!r})" if environment.pop("startup", False) else ""
    (folder / "sitecustomize.py").write_text(code)
    paths = os.pathsep.join([str(folder), str(SOURCE)])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


def test_the_environment_variable(tmp_path):
    """The start-up line is read from a site folder, here one of the test's own, and imports neither nbhd nor torch."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = python(str(script), "a", folder=tmp_path, startup=True, NBHD_NATTEN="0.17.5")
    assert run.stdout.splitlines() == ["False False", "0.17.5 nbhd.compat.natten.v0_17.functional ['a'] __main__"], (
        run.stderr
    )
    run = python("-c", "import natten", folder=tmp_path, startup=True, NBHD_NATTEN="")
    assert "No module named 'natten'" in run.stderr
    run = python("-c", "pass", folder=tmp_path, startup=True, NBHD_NATTEN="0.3")
    assert run.returncode == 0
    assert run.stderr.startswith("NBHD_NATTEN='0.3' is ignored: there is no stand-in for NATTEN '0.3'. Versions: 0.14")


def test_the_command_runs_a_script_or_module(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    command = ("-m", "nbhd.compat.natten", "run", "--version", "0.17")
    run = python(*command, str(script), "a", "--b", folder=tmp_path)
    assert run.stdout.splitlines()[1] == "0.17.5 nbhd.compat.natten.v0_17.functional ['a', '--b'] __main__", run.stderr
    run = python(*command, "-m", "program", "a", folder=tmp_path)
    assert run.stdout.splitlines()[1] == "0.17.5 nbhd.compat.natten.v0_17.functional ['a'] __main__", run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name a script"),
        (["run", "missing.py"], "there is no file 'missing.py'"),
        (["run", "--version", "0.3", "x.py"], "There is no stand-in for NATTEN '0.3'"),
        (["run", "-m", "no_such.module_here"], "there is no module"),
        ([], "required: command"),
    ],
)
def test_wrong_commands_exit_with_2(arguments, message, capsys, monkeypatch):
    from nbhd.compat.natten.__main__ import main

    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("NBHD_NATTEN", "")
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
