"""The command as a user runs it: a process of its own, pipes, signals, users, no network."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import encode, noise

pytestmark = [
    pytest.mark.slow,  # each process imports torch
    pytest.mark.skipif(os.name != "posix", reason="written for signals and pipes as POSIX has them"),
]

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


def nbhd(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": 250, "env": ENVIRONMENT, **options}
    return subprocess.run([sys.executable, "-m", "nbhd", *map(str, args)], **options)


def classify(pictures: Path, model: Path) -> list[str]:
    return [sys.executable, "-m", "nbhd", "classify", str(pictures), "--model", str(model), "--device", "cpu"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(encode(noise(seed=i), "JPEG"))
    return folder


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Six hundred pictures: more output than a pipe holds, more work than a moment."""
    folder = tmp_path / "many"
    folder.mkdir()
    (tmp_path / "one.png").write_bytes(encode(noise(), "PNG"))
    for i in range(600):
        (folder / f"{i:04}.png").symlink_to("../one.png")
    return folder


def test_help_is_immediate_and_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['nbhd', '--help']\n"
        "import nbhd.cli\n"
        "try: nbhd.cli.main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL', 'pyarrow'} & set(sys.modules), 'heavy imports'"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "classify  Name what is in pictures." in run.stdout
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert nbhd("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < 0.3  # processor time: a busy machine does not count


def test_help_of_the_command_shows_an_example() -> None:
    run = nbhd("classify", "--help")
    assert run.returncode == 0
    assert "nbhd classify photos/ --format json > labels.json" in run.stdout


def test_version_and_unknown_command() -> None:
    from nbhd import __version__

    assert nbhd("--version").stdout == f"nbhd {__version__}\n"
    run = nbhd("clasify")
    assert (run.returncode, run.stdout) == (2, "")
    assert "No such command 'clasify'" in run.stderr


def test_json_on_standard_output_and_the_rest_on_standard_error(photos: Path, tiny_model: Path) -> None:
    (photos / "bad.jpg").write_text("no")
    run = nbhd("classify", "photos", "--model", tiny_model, "--format", "json", cwd=photos.parent)
    assert run.returncode == 1
    assert [record["error"] is None for record in json.loads(run.stdout)] == [True] * 3 + [False]
    assert run.stderr == (
        "nbhd: photos/bad.jpg: not an image, or not in a format that is read here\n"
        "nbhd: 1 of 4 could not be classified\n"
    )


def test_a_reader_that_leaves_early_is_no_error(many: Path, tiny_model: Path) -> None:
    with subprocess.Popen(
        [*classify(many, tiny_model), "-f", "csv"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"path,rank,label,probability,error\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(200) == 141


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lets SIGINT reach the commands of a test: a shell script has it ignored in what it starts in the background,
    these tests perhaps, and an ignored signal is ignored in every child as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted(many: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for i in range(600, 20_000):  # so much that it cannot be done before the signal comes, however late that is
        (many / f"{i:05}.png").symlink_to("../one.png")
    command = [*classify(many, tiny_model), "-o", str(out), "--batch-size", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        # the temporary file appears when the model is loaded and the work begins
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob(".out.json.*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=90)
    assert (process.returncode, stdout, stderr) == (130, b"", b"nbhd: interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_said(photos: Path, tiny_model: Path) -> None:
    with Path("/dev/full").open("w") as full:
        run = nbhd("classify", photos, "--model", tiny_model, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert run.returncode == 1
    assert run.stderr == "nbhd: standard output: No space left on device\n"


@pytest.mark.skipif(sys.platform != "linux", reason="uses a pseudo-terminal as Linux has it")
def test_a_bar_appears_on_a_terminal_for_long_work_and_leaves_no_trace_in_the_results(
    tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "large.png").write_bytes(encode(noise(1200, 1200), "PNG"))
    large = tmp_path / "large"
    large.mkdir()
    for i in range(100):  # seconds of decoding on the fastest machine
        (large / f"{i:04}.png").symlink_to("../large.png")
    main, terminal = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux: the other side of the terminal is closed
            while piece := os.read(main, 65536):
                shown.append(piece)

    environment = {**ENVIRONMENT, "TERM": "xterm"}
    command = [*classify(large, tiny_model), "-f", "json", "--batch-size", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        os.close(terminal)
        reader = threading.Thread(target=read)
        reader.start()
        stdout, _ = process.communicate(timeout=200)
    reader.join()
    os.close(main)
    assert process.returncode == 0
    assert len(json.loads(stdout)) == 100
    assert b"classifying" in b"".join(shown)
    assert b"/100" in b"".join(shown)


def test_memory_does_not_grow_with_the_number_of_pictures(many: Path, tiny_model: Path) -> None:
    code = (
        "import sys, resource\n"
        "from nbhd.tasks.classification import Classifier\n"
        "from pathlib import Path\n"
        "files = sorted(Path(sys.argv[1]).iterdir())\n"
        "classifier = Classifier(sys.argv[2], 'cpu')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in classifier.stream(files[:100]): pass\n"
        "first = peak()\n"
        "for _ in classifier.stream(files): pass\n"
        "print((peak() - first) / 1024 if sys.platform == 'linux' else (peak() - first) / 2**20)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, many, tiny_model], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert float(run.stdout) < 12  # MB; the 500 prepared pictures more would be 19


def test_a_hub_id_without_network(photos: Path) -> None:
    run = nbhd("classify", photos, "--model", "nobody/such-model-as-this")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("nbhd: model 'nobody/such-model-as-this' is not a folder here, and cannot be had from")
    assert len(run.stderr.splitlines()) == 1
