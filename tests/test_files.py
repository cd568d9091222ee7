"""Outputs are whole or not there, whenever the process is interrupted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from nbhd._files import write_whole
from nbhd.cli._errors import INTERRUPTED, reporting


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupt_right_behind_the_creation_leaves_nothing(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.json"
    if existing:
        target.write_text("before")
    opened = os.open
    created = []

    def interrupted(path: str, flags: int, *rest: int) -> int:
        os.close(opened(path, flags, *rest))
        created.append(Path(path).parent)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), write_whole(target, "w"):
        raise AssertionError("not reached")
    assert created == [tmp_path]
    assert [path.name for path in tmp_path.iterdir()] == (["out.json"] if existing else [])
    assert not existing or target.read_text() == "before"


def test_an_interrupt_while_writing_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt), write_whole(target, "w") as stream:
        stream.write("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert target.read_text() == "before"


def test_an_interrupt_between_the_start_and_the_block_leaves_nothing(tmp_path: Path) -> None:
    def begun() -> None:
        manager = write_whole(tmp_path / "out.json", "w")
        manager.__enter__()
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended, reporting(debug=False):
        begun()
    assert ended.value.exit_code == INTERRUPTED
    assert list(tmp_path.iterdir()) == []
