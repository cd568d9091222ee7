"""``nbhd convert`` in this process: wrong calls are named by the command's own words, and leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.commands import nbhd


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a few files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "binary").write_bytes(b"\x99\xff")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.pth", "out"], "cannot read none.pth: it does not exist."),
        (["other.pth", "out"], "other.pth: this is not a checkpoint of the original NAT"),
        (["", "out"], "CHECKPOINT must name a file or a folder, got ''."),
        (["MODEL", ""], "FOLDER must name a folder, got ''."),
        (["MODEL", "-"], "FOLDER must name a folder, got '-'."),
        (["MODEL", "full"], "FOLDER must be a folder that is new or empty, but full exists."),
        (["MODEL", "none/out"], "cannot write none/out: the folder"),
        (["MODEL", "out", "--labels", "none"], "cannot read the labels in none: No such file or directory."),
        (["MODEL", "out", "--labels", "full"], "cannot read the labels in full: Is a directory."),
        (["MODEL", "out", "--labels", "binary"], "the labels in binary are not text in UTF-8."),
        (["MODEL", "out", "--labels", "full/x"], "the labels in full/x are none."),
        (["MODEL", "out", "--dilations", "[["], "--dilations must be JSON"),
        (["MODEL", "out", "--dilations", "[[0]]"], "--dilations [[0]]: dilations "),
        (["MODEL", "out", "--dilations", "7"], "--dilations 7: dilations must be a list"),
        (["MODEL", "out", "--image-size", "99999999999"], "--image-size must be at most 178,956,970 pixels"),
        (
            ["MODEL", "out", "--image-size", "13000"],
            "--image-size is too large, got 13000: of the image processor, size",
        ),
    ],
)
def test_wrong_calls(args: list[str], message: str, folder: Path, tiny_model: Path) -> None:
    before = sorted(folder.rglob("*"))
    run = nbhd("convert", *(tiny_model if arg == "MODEL" else arg for arg in args))
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr.startswith(f"nbhd: {message}")
    assert sorted(folder.rglob("*")) == before


def test_a_folder_of_large_images_is_a_model(folder: Path, tiny_model: Path) -> None:
    assert nbhd("convert", tiny_model, "out", "--image-size", 1000).exit_code == 0
    assert json.loads((folder / "out" / "preprocessor_config.json").read_text())["crop_size"]["height"] == 1000
    assert nbhd("classify", "none.jpg", "--model", "out", "--device", "cpu").exit_code == 1
