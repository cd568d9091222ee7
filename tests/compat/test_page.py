"""The snippets of docs/coming-from-natten.md run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import nbhd

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-natten.md"
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
LINES = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python(number):
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NATTEN's|The DiNAT of")
        exec(compile(SNIPPETS[number], f"{PAGE.name}, snippet {number + 1}", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("line", LINES)
def test_shell(line, tmp_path):
    """Each line runs a train.py that imports natten, with nbhd on the path and its start-up file in a site folder."""
    source = Path(nbhd.__file__).parents[1]
    (tmp_path / "train.py").write_text("import natten\nprint(natten.__version__)\n")
    (tmp_path / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(source / 'startup')!r})\n")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    run = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "0.17.5\n", run.stderr
