"""A command that is told to end leaves no file that is not whole, and none is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer

from nbhd.cli import _errors
from nbhd.cli._errors import reporting, told_to_end
from tests.commands import nbhd
from tests.pictures import encode, noise

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

#: The command line, which says when it is in the middle of writing and waits there. Whoever runs the tests may ignore
#: signals, as nohup does, and children inherit that.
WAITING = """
import os, signal, sys, time

for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

def wait(_):
    os.write(1, b"writing\\n")
    time.sleep(60)

os.fsync = wait
from nbhd.cli import main
main()
"""


def told(number: int, folder: Path, *args: object) -> tuple[int, str]:
    """Exit status and standard error of ``nbhd ARGS`` in ``folder``, ended in the middle of writing."""
    command = [sys.executable, "-c", WAITING, *map(str, args)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n", process.communicate()[1]
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")]
)
def test_files_are_removed(number: int, status: int, said: str, tmp_path: Path) -> None:
    result = told(number, tmp_path, "recipes", "copy", "cifar10_quick", "-o", "x.yaml")
    assert result == (status, f"nbhd: {said}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["classify", "photos", "--device", "cpu", "-o", "out.csv", "--model"],
        ["evaluate", "--data", "data", "--device", "cpu", "-o", "out.json", "--model"],
        ["convert", "--image-size", "64"],
        ["export", "--to", "torch-export", "-o", "out.pt2"],
    ],
    ids=lambda args: args[0],
)
def test_what_commands_write_goes_and_what_was_there_stays(
    args: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    for folder in (work / "photos", work / "data" / "church", temporary):
        folder.mkdir(parents=True)
    for folder in ("photos", "data/church"):
        (work / folder / "a.png").write_bytes(encode(noise(), "PNG"))
    for name in ("out.csv", "out.json", "out.pt2"):
        (work / name).write_text("before")
    before = sorted(work.rglob("*"))
    target = ["out"] if args[0] == "convert" else []
    monkeypatch.setenv("TMPDIR", str(temporary))
    status, said = told(signal.SIGTERM, work, *args, tiny_model, *target)
    assert (status, said.splitlines()[-1]) == (143, "nbhd: terminated")
    assert "Traceback" not in said
    assert sorted(work.rglob("*")) == before
    assert {(work / name).read_text() for name in ("out.csv", "out.json", "out.pt2")} == {"before"}
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")] == []


def test_a_hangup_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As under nohup: the command goes on to its end."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGHUP)\n"
        "from nbhd.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "recipes", "copy", "cifar10_quick", "-o", "x.yaml"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "nbhd: copied cifar10_quick to x.yaml\n")


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(typer.Exit) as ended, reporting(debug=True), told_to_end():
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.exit_code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_handler_of_another_program_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with told_to_end():
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_does_not_cut_the_removal_short(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(typer.Exit) as ended, reporting(debug=False), told_to_end():
            try:
                signal.raise_signal(signal.SIGHUP)
            finally:
                signal.raise_signal(signal.SIGTERM)
                removed.append("all")
        assert (removed, ended.value.exit_code) == (["all"], 129)
        # One that comes later counts: the first may have been lost in a library.
        monkeypatch.setattr(_errors, "ONE_SIGNAL_S", 0.0)
        with pytest.raises(typer.Exit) as ended, reporting(debug=False), told_to_end():
            try:
                signal.raise_signal(signal.SIGHUP)
            except BaseException:
                signal.raise_signal(signal.SIGTERM)
        assert ended.value.exit_code == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_threads_set_no_handlers() -> None:
    found: list[object] = []

    def enter() -> None:
        with told_to_end():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with told_to_end():
            handler = signal.getsignal(signal.SIGTERM)
            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()
            assert found == [handler]
            assert signal.getsignal(signal.SIGTERM) is handler is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_ends_at_once() -> None:
    """It goes on from its last checkpoint, and may be in the middle of a fork or of waiting for another process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with told_to_end():
            assert nbhd("train", "--config", "cifar10_quick", "--data", "none", "--output", "none").exit_code == 2
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
