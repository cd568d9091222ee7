"""``nbhd classify`` in this process: formats, wrong calls, bad inputs, outputs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nbhd.backends import cpu
from nbhd.cli import _console
from nbhd.cli._console import INSTRUCTION_SETS
from nbhd.tasks.classification import Classifier
from tests.commands import nbhd
from tests.files import as_ordinary_user
from tests.pictures import bombs, encode, noise
from tests.processes import ROOT
from tests.tiny import LABELS, write_classifier

Run = Callable[..., Any]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with four pictures in ``photos``."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(["b.jpg", "a.png", "deep/c.webp", "d"]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encode(noise(seed=i), ("JPEG", "PNG", "WEBP", "BMP")[i]))
    return folder


@pytest.fixture
def classify(tiny_model: Path) -> Iterator[Run]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield lambda *args: nbhd("classify", "--model", tiny_model, "--device", "cpu", *args)
    logging.set_verbosity(level)
    logging.enable_progress_bar()


NAMES = ["photos/a.png", "photos/b.jpg", "photos/d", "photos/deep/c.webp"]


# Formats


def test_json_is_one_list_and_nothing_else(classify: Run, photos: Path, tiny_model: Path) -> None:
    (photos / "broken.jpg").write_text("no picture")
    run = classify("photos", "--format", "json", "-k", 3)
    assert run.exit_code == 1
    records = json.loads(run.stdout)
    assert [record["path"] for record in records] == [*NAMES[:2], "photos/broken.jpg", *NAMES[2:]]
    assert all(list(record) == ["path", "predictions", "error"] for record in records)
    assert records[2]["predictions"] == []
    assert records[2]["error"] == "not an image, or not in a format that is read here"
    expected = Classifier(tiny_model, "cpu").predict("photos/a.png", top_k=3)[0]
    assert records[0]["error"] is None
    assert [each["label"] for each in records[0]["predictions"]] == [score.label for score in expected.predictions]
    found = [each["probability"] for each in records[0]["predictions"]]
    assert found == pytest.approx([score.probability for score in expected.predictions], rel=1e-4)


def test_json_of_failures_alone(classify: Run, photos: Path) -> None:
    run = classify("none.jpg", "--format", "json")
    assert run.exit_code == 1
    assert json.loads(run.stdout) == [{"path": "none.jpg", "predictions": [], "error": "no such file or folder"}]


def test_csv(classify: Run, photos: Path) -> None:
    run = classify("photos/a.png", 'gone,"1".png', "--format", "csv", "-k", 2)
    rows = list(csv.DictReader(io.StringIO(run.stdout)))
    assert run.exit_code == 1
    assert [(row["path"], row["rank"], row["error"]) for row in rows] == [
        ("photos/a.png", "1", ""),
        ("photos/a.png", "2", ""),
        ('gone,"1".png', "", "no such file or folder"),
    ]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"]) > 0
    assert {row["label"] for row in rows[:2]} < set(LABELS)


def test_parquet(classify: Run, photos: Path) -> None:
    (photos / "z.jpg").touch()
    run = classify("photos", "--output", "out.parquet")
    assert (run.exit_code, run.stdout) == (1, "")
    rows = pq.read_table("out.parquet").to_pylist()
    assert [row["path"] for row in rows] == [*NAMES, "photos/z.jpg"]
    assert [row["error"] for row in rows] == [None] * 4 + ["empty file"]
    assert [len(row["predictions"]) for row in rows] == [5] * 4 + [0]
    assert json.loads(classify("photos", "--format", "json").stdout)[0]["path"] == rows[0]["path"]


def test_table(classify: Run, photos: Path) -> None:
    run = classify("photos", "-k", 2)
    lines = run.stdout.splitlines()
    assert (run.exit_code, run.stderr) == (0, "")
    assert lines[0].split() == ["picture", "label", "probability"]
    assert len(lines) == 1 + 4 * 2
    assert lines[1].startswith("photos/a.png ")
    assert lines[2].startswith(" ")
    assert all(line.endswith("%") for line in lines[1:])
    assert len({line.rindex("%") for line in lines[1:]}) == 1
    assert "\x1b" not in run.stdout


def test_table_with_wide_and_long_names(classify: Run, photos: Path) -> None:
    (photos / "b.jpg").rename(photos / "写真.jpg")
    (photos / "d").rename(photos / ("long" * 20 + ".bmp"))
    lines = classify("photos", "-k", 1).stdout.splitlines()
    assert "photos/" + "long" * 20 + ".bmp" in lines  # on a line of its own
    from rich.cells import cell_len

    assert len({cell_len(line) for line in lines if line.endswith("%")}) == 1


@pytest.mark.parametrize("ending", ["json", "csv", "parquet", "txt"])
def test_the_ending_of_output_says_the_format(classify: Run, photos: Path, ending: str) -> None:
    run = classify("photos", "-o", f"out.{ending}")
    assert (run.exit_code, run.stdout) == (0, "")
    assert run.stderr == f"nbhd: wrote out.{ending}\n"
    data = Path(f"out.{ending}").read_bytes()
    assert data.startswith({"json": b"[\n{", "csv": b"path,rank,", "parquet": b"PAR1", "txt": b"picture"}[ending])
    assert sorted(os.listdir(".")) == [f"out.{ending}", "photos"]


def test_format_wins_over_the_ending(classify: Run, photos: Path) -> None:
    assert classify("photos", "-o", "out.csv", "--format", "json").exit_code == 0
    assert len(json.loads(Path("out.csv").read_text())) == 4


def test_output_and_standard_output_hold_the_same(classify: Run, photos: Path) -> None:
    for written_as in ("json", "csv", "table"):
        assert classify("photos", "-o", "out", "-f", written_as).exit_code == 0
        assert Path("out").read_text() == classify("photos", "-f", written_as).stdout


def test_output_dash_is_standard_output(classify: Run, photos: Path) -> None:
    assert len(json.loads(classify("photos", "-o", "-", "-f", "json").stdout)) == 4


# Inputs


def test_every_kind_of_failure_is_named_and_the_rest_classified(classify: Run, photos: Path) -> None:
    jpeg = encode(noise(), "JPEG")
    bad = {
        "01_truncated.jpg": jpeg[: len(jpeg) // 2],
        "02_corrupt.png": encode(noise(), "PNG")[:60] + bytes(200),
        "03_text.jpg": b"hello",
        "04_empty.jpg": b"",
        "05_bomb.png": bombs()["png"],
        "06_bomb.jpg": bombs()["jpg"],
    }
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    (photos / "07_link.jpg").symlink_to("gone")
    (photos / "08_folder.jpg").mkdir()
    expected = [*bad, "07_link.jpg"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(photos / "09_pipe.jpg")
        expected.append("09_pipe.jpg")
    run = classify("photos", "none.png", "*.xyz", "--format", "json")
    assert run.exit_code == 1
    assert "Traceback" not in run.stderr
    records = json.loads(run.stdout)
    assert [r["path"] for r in records if r["error"] is None] == NAMES
    failed = {r["path"]: r["error"] for r in records if r["error"] is not None}
    assert list(failed) == [*(f"photos/{name}" for name in expected), "none.png", "*.xyz"]
    assert run.stderr.splitlines() == [
        *(f"nbhd: {path}: {error}" for path, error in failed.items()),
        f"nbhd: {len(failed)} of {len(records)} could not be classified",
    ]
    reasons = list(failed.values())
    assert "cut short" in reasons[0]
    assert "too large" in reasons[4]
    assert "too large" in reasons[5]


def test_order_in_is_order_out(classify: Run, photos: Path) -> None:
    names = ["photos/d", "photos/b.jpg", "none", "photos/deep/c.webp", "photos/a.png"]
    records = json.loads(classify(*names, "-f", "json", "--batch-size", 2).stdout)
    assert [record["path"] for record in records] == names


def test_a_file_named_twice_is_classified_once(classify: Run, photos: Path) -> None:
    run = classify("photos/b.jpg", "photos", "photos/./b.jpg", "-f", "json")
    assert run.exit_code == 0
    assert [r["path"] for r in json.loads(run.stdout)] == [
        "photos/b.jpg",
        "photos/a.png",
        "photos/d",
        "photos/deep/c.webp",
    ]
    assert run.stderr == "nbhd: 2 files are named more than once; each is classified once\n"


def test_globs_are_expanded_where_the_shell_did_not(classify: Run, photos: Path) -> None:
    records = json.loads(classify("photos/**/*.[wj]*", "-f", "json").stdout)
    assert [record["path"] for record in records] == ["photos/b.jpg", "photos/deep/c.webp"]


WEIRD = ["größe 写真 🏔.jpg", "a\nb.jpg", "\x1b[31mred.jpg", "[bold]x.jpg", "q\"uo'te, a.jpg", "%s{0}.jpg", " .jpg"]


@pytest.mark.parametrize("name", WEIRD)
def test_weird_names(classify: Run, photos: Path, name: str) -> None:
    (photos / "b.jpg").rename(photos / name)
    (photos / f"bad{name}").touch()
    for written_as in ("json", "csv", "table"):
        run = classify(f"photos/{name}", f"photos/bad{name}", "-f", written_as)
        assert run.exit_code == 1
        assert "\x1b" not in run.stderr
        assert len(run.stderr.splitlines()) == 2
        if written_as == "json":
            assert json.loads(run.stdout)[0]["path"] == f"photos/{name}"
        elif written_as == "csv":
            assert next(iter(csv.DictReader(io.StringIO(run.stdout, newline=""))))["path"] == f"photos/{name}"
        else:
            assert "\x1b" not in run.stdout
            assert len(run.stdout.splitlines()) == 6
    assert classify(f"photos/{name}", "-o", "out.parquet").exit_code == 0
    assert pq.read_table("out.parquet")["path"].to_pylist() == [f"photos/{name}"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not text")
def test_names_that_are_not_text(classify: Run, photos: Path) -> None:
    (photos / "b.jpg").rename(photos / os.fsdecode(b"caf\xe9.jpg"))
    run = classify("photos", "-f", "json")
    assert run.exit_code == 0
    assert os.fsencode(json.loads(run.stdout)[1]["path"]) == b"photos/caf\xe9.jpg"
    for written_as in ("csv", "table"):
        run = classify("photos", "-f", written_as)
        assert run.exit_code == 0
        assert "caf\\udce9.jpg" in run.stdout
    assert classify("photos", "-o", "out.parquet").exit_code == 0
    assert pq.read_table("out.parquet")["path"].to_pylist()[1] == "photos/caf\\udce9.jpg"


def test_a_name_that_begins_with_a_dash(classify: Run, photos: Path) -> None:
    (photos / "b.jpg").rename("-x.jpg")
    assert classify("-f", "json", "--", "-x.jpg").exit_code == 0


def test_a_file_that_may_not_be_read(classify: Run, photos: Path, tiny_model: Path) -> None:
    (photos / "b.jpg").chmod(0)
    classify("photos/d")  # imports happen while they still may
    for file in tiny_model.iterdir():
        file.chmod(0o644)
    with as_ordinary_user(photos, tiny_model):
        run = classify("photos", "--format", "json")
    assert run.exit_code == 1, run.stderr
    assert [record["error"] for record in json.loads(run.stdout)] == [None, "permission denied", None, None]


# Wrong calls


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing argument"),
        (("photos", "--top-k", "0"), "'--top-k'"),
        (("photos", "--top-k", "many"), "'--top-k'"),
        (("photos", "--batch-size", "0"), "'--batch-size'"),
        (("photos", "--batch-size", "-4"), "'--batch-size'"),
        (("photos", "--format", "xml"), "'--format'"),
        (("photos", "--nonsense"), "--nonsense"),
        (("photos", "--device", "gpu"), "nbhd: device 'gpu': not a name torch knows. Use one of"),
        (("photos", "--device", ""), "nbhd: device '': not a name torch knows"),
        (("photos", "--model", "./none"), "nbhd: model './none': there is no such folder."),
        (("photos", "--model", ""), "nbhd: model must be named, got ''."),
        (("photos", "--model", "none.onnx"), "nbhd: model 'none.onnx': there is no such file."),
        (("photos", "--model", "some/none.pth"), "nbhd: model 'some/none.pth': there is no such file."),
        (("photos", "--model", "photos"), "nbhd: photos is not a model: photos holds no config.json."),
        (("photos", "--model", "photos/a.png"), "nbhd: model 'photos/a.png' is a file."),
        (("photos", "--format", "parquet"), "nbhd: --format parquet goes into a file. Give --output FILE."),
        (("photos", "--output", "out.xyz"), "nbhd: --output out.xyz: its ending does not say in which format."),
        (("photos", "--output", "none/out.json"), "nbhd: --output none/out.json: the folder none does not exist."),
        (("photos", "--output", ""), "nbhd: --output must name a file, got ''."),
        (("photos", "--output", "photos"), "nbhd: --output photos: this is a folder."),
        (("photos", "--output", "photos", "-f", "json"), "nbhd: --output photos: this is a folder."),
        (
            ("photos", "--output", "photos/a.png/x.json"),
            "nbhd: --output photos/a.png/x.json: the folder photos/a.png does not",
        ),
        (
            ("photos", "--output", "photos/a.png", "-f", "json"),
            "nbhd: --output photos/a.png: this is one of the inputs",
        ),
        (("photos/d", "--output", "./photos/d", "-f", "csv"), "nbhd: --output ./photos/d: this is one of the inputs"),
    ],
)
def test_wrong_calls(classify: Run, photos: Path, args: tuple[str, ...], message: str) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    run = classify(*args)
    assert run.exit_code == 2
    assert run.stdout == ""
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before
    assert os.listdir(".") == ["photos"]


def test_original_weights_are_not_a_model_yet(classify: Run, photos: Path) -> None:
    Path("a folder").mkdir()
    Path("a folder/nat.pth").write_bytes(b"weights")
    for named in ("a folder/nat.pth", "a folder"):
        run = classify("photos", "--model", named)
        assert (run.exit_code, run.stdout) == (2, "")
        assert "`nbhd convert 'a folder/nat.pth' FOLDER` makes a model of it" in run.stderr


def test_damaged_weights_are_named(photos: Path, tmp_path: Path) -> None:
    weights = write_classifier(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for args in (("classify", "photos", "--model", "model"), ("export", "model", "--to", "onnx", "-o", "x.onnx")):
        run = nbhd(*args)
        assert (run.exit_code, run.stdout) == (2, "")
        assert "model/model.safetensors is damaged or cut short. Get it again." in run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 99_999_999_999}, "size must be at most 178,956,970 pixels (a side of 13,377 in a square), got 9999"),
        ({"size": {"height": 10, "width": 20_000_000}}, "size must be at most 178,956,970 pixels"),
        ({"crop_size": [20_000, 20_000]}, "crop_size must be at most 178,956,970 pixels"),
        ({"size": {"height": -5, "width": 5}, "image_processor_type": "ViTImageProcessor"}, "pixels of at least 1"),
        ({"rescale_factor": "x"}, "does not work: could not convert string to float"),
        (
            {"image_mean": [0.5, 0.5], "image_std": [1, 1]},
            "does not work: image_mean and image_std must have one entry for each channel",
        ),
    ],
)
def test_an_image_processor_that_makes_no_pixels_is_a_bad_model(
    photos: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    settings = write_classifier(tmp_path / "model") / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | change))
    run = nbhd("classify", "--model", "model", "--device", "cpu", "photos")
    assert (run.exit_code, run.stdout) == (2, "")
    assert message in run.stderr
    assert "the image processor of model, model/preprocessor_config.json" in run.stderr


def test_no_name_is_said_to_be_none(classify: Run, photos: Path) -> None:
    assert classify("").stderr.startswith("nbhd: '': the name is empty")


@pytest.mark.skipif(cpu.why_unusable() is not None, reason=f"no native core: {cpu.why_unusable()}")
def test_an_unknown_instruction_set_is_said(classify: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBHD_CPU_ISA", cpu.loaded_library().isa)
    assert classify("photos").stderr == ""
    monkeypatch.setenv("NBHD_CPU_ISA", "foo")
    monkeypatch.setattr(cpu, "why_unusable", lambda: "there are no kernels for NBHD_CPU_ISA='foo'.")
    run = classify("photos")
    assert run.exit_code == 0
    assert run.stderr.startswith("nbhd: warning: there are no kernels for NBHD_CPU_ISA='foo'. Attention on the CPU")
    assert len(run.stderr.splitlines()) == 1
    for name in INSTRUCTION_SETS:
        assert f" {name}" in run.stderr


def test_every_instruction_set_is_named() -> None:
    sets = re.findall(r'^    {"(\w+)", ', (ROOT / "csrc/src/dispatch.cpp").read_text(), re.MULTILINE)
    assert list(INSTRUCTION_SETS) == sets


def test_an_output_without_permission(classify: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    run = classify("photos", "--output", "out.json")
    assert run.exit_code == 2
    assert "no permission to write" in run.stderr


def test_more_labels_than_there_are(classify: Run, photos: Path) -> None:
    run = classify("photos/d", "--top-k", 1000, "-f", "json")
    assert run.exit_code == 0
    assert len(json.loads(run.stdout)[0]["predictions"]) == 10


def test_without_a_default_checkpoint_it_says_what_to_do(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbhd import checkpoints

    monkeypatch.setattr(checkpoints.resources, "files", lambda _: photos)
    run = nbhd("classify", "photos")
    assert run.exit_code == 2
    assert "the default checkpoint is not in this installation" in run.stderr


# Outputs


def test_results_left_in_the_folder_by_an_earlier_run_are_replaced(classify: Run, photos: Path) -> None:
    for _ in range(2):
        run = classify("photos", "-o", "photos/labels.json")
        assert (run.exit_code, run.stderr) == (0, "nbhd: wrote photos/labels.json\n")
        assert [record["path"] for record in json.loads((photos / "labels.json").read_text())] == NAMES


def test_an_output_is_written_whole_or_not_at_all(classify: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.json").write_text("earlier")

    def stop(*_: object) -> Iterator[object]:
        yield from list(original(*_))[:2]
        raise KeyboardInterrupt

    original = Classifier._stream
    monkeypatch.setattr(Classifier, "_stream", stop)
    for ending in ("json", "csv", "parquet"):
        run = classify("photos", "-o", f"out.{ending}")
        assert run.exit_code == 130
        assert run.stderr == "nbhd: interrupted\n"
    assert Path("out.json").read_text() == "earlier"
    assert sorted(os.listdir(".")) == ["out.json", "photos"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_an_output(classify: Run, photos: Path) -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for written_as, start in (("json", b"[\n{"), ("csv", b"path,rank,"), (None, b"picture")):
            run = classify("photos/d", "-k", 1, "-o", "pipe", *(("-f", written_as) if written_as else ()))
            assert run.exit_code == 0, run.stderr
            assert os.read(reader, 1 << 16).startswith(start)
    finally:
        os.close(reader)
    assert sorted(os.listdir(".")) == ["photos", "pipe"]


def test_a_device_needs_no_permission_for_its_folder(
    classify: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert classify("photos/d", "-o", os.devnull).exit_code == 0


def test_a_regressor_is_refused(photos: Path, tmp_path: Path) -> None:
    write_classifier(tmp_path / "model", problem_type="regression")
    run = nbhd("classify", "--model", "model", "--device", "cpu", "photos")
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr.startswith(
        "nbhd: the model model is a regressor (problem_type 'regression' in its configuration)"
    )


def test_a_fault_of_ours_is_called_one(classify: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Classifier, "_scores", fail)
    run = classify("photos", "-o", "out.json")
    assert run.exit_code == 1
    assert "nbhd: internal error: ZeroDivisionError: oops" in run.stderr
    assert not Path("out.json").exists()


def test_debug_brings_the_traceback_back(photos: Path) -> None:
    run = nbhd("--debug", "classify", "photos", "--device", "gpu")
    assert type(run.exception).__name__ == "ArgumentError"


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "after", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)])
def test_a_bar_on_a_terminal_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, after: float, shown: bool
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(_console, "PROGRESS_AFTER_S", after)
    monkeypatch.setenv("TERM", "xterm")
    assert list(_console.track(iter(range(50)), 50, "classifying")) == list(range(50))
    assert ("classifying" in stream.getvalue()) is shown
    assert bool(stream.getvalue()) is shown
