"""Outputs are whole or not there, whenever the process is interrupted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from nbhd._files import write_whole
from nbhd.cli._errors import INTERRUPTED, reporting
from nbhd.errors import FileError


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


def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    target = tmp_path / ("\N{GRINNING FACE}" * 60 + ".json")
    with write_whole(target, "w") as stream:
        assert len(list(tmp_path.iterdir())) == 1
        stream.write("whole")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="open files have no names here")
@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_pipe_is_written_to_by_the_name_it_has(mode: str) -> None:
    """As /dev/stdout in a pipeline: a link to something that has no path."""
    reader, writer = os.pipe()
    try:
        with write_whole(f"/dev/fd/{writer}", mode) as stream:
            stream.write("whole" if mode == "w" else b"whole")
        assert os.read(reader, 100) == b"whole"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_a_full_device_is_named() -> None:
    with (
        pytest.raises(FileError, match="cannot write /dev/full: No space left on device"),
        write_whole("/dev/full") as stream,
    ):
        stream.write(b"lost")
