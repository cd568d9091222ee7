"""``nbhd evaluate`` in this process: wrong calls are refused before any work, outputs and their formats."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbhd.tasks.classification import evaluate as evaluate_module
from tests.commands import nbhd
from tests.pictures import encode, noise
from tests.tasks.test_datasets import write_folder, write_parquet
from tests.tiny import write_classifier

Run = Callable[..., Any]


@pytest.fixture
def evaluate(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The command in a folder with pictures in ``data`` and ``x.parquet``."""
    from transformers.utils import logging

    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", "tench", "church", images=1)
    write_parquet(tmp_path / "x.parquet", ["tench", "church"])
    level = logging.get_verbosity()
    yield lambda *args: nbhd("evaluate", *args, *([] if "--model" in args else ["--model", tiny_model]))
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data", "nope"), "nbhd: --data nope: no such file or folder."),
        (("--data", "./no/data"), "nbhd: --data ./no/data: no such file or folder."),
        (("--data", ""), "nbhd: data must be named, got ''."),
        (("--data", "data", "--model", "nope/nope/nope"), "there is no such folder"),
        (("--data", "data", "-o", "none/x.json"), "nbhd: --output none/x.json: the folder none does not exist."),
        (("--data", "data", "-o", "data"), "nbhd: --output data: this is a folder."),
        (
            ("--data", "data", "--image-column", "x"),
            "nbhd: --image-column x: data is a folder of pictures, which has no",
        ),
        (
            ("--data", "data", "--label-column", "x"),
            "nbhd: --label-column x: data is a folder of pictures, which has no",
        ),
        (("--data", "data/tench/0.png"), "a single data file must be .parquet, got '.png'"),
        (("--data", "data", "-o", "data", "-f", "json"), "nbhd: --output data: this is a folder."),
        (("--data", "data", "-o", "x.csv"), "Give --format table|json or an ending of .json, .txt."),
        (("--data", "data", "-o", "x"), "nbhd: --output x: its ending does not say in which format."),
        (("--data", "x.parquet", "-o", "./x.parquet", "-f", "json"), "this is one of the inputs and would be lost"),
    ],
)
def test_wrong_calls_are_refused_before_any_work(
    args: tuple[str, ...], message: str, evaluate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("not reached")

    monkeypatch.setattr(evaluate_module, "evaluate_images", work)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    run = evaluate(*args)
    assert (run.exit_code, run.stdout) == (2, "")
    assert message in run.stderr
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("settings", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}])
def test_models_that_choose_no_label_are_refused(settings: dict[str, Any], evaluate: Run, tmp_path: Path) -> None:
    run = evaluate("--data", "data", "--model", write_classifier(tmp_path / "model", **settings))
    assert (run.exit_code, run.stdout) == (2, "")
    assert settings["problem_type"] in run.stderr


@pytest.mark.parametrize(
    ("name", "is_json"), [("x.json", True), ("x.JSON", True), ("x.txt", False), (os.devnull, None), ("-", False)]
)
def test_the_ending_of_output_says_the_format(name: str, is_json: bool | None, evaluate: Run) -> None:
    run = evaluate("--data", "data", "-o", name)
    assert run.exit_code == 0, run.stderr
    text = run.stdout if name == "-" else Path(name).read_text()
    assert bool(run.stdout) is (name == "-")
    if is_json:
        assert json.loads(text)["images"] == 2
    elif is_json is not None:
        assert text.startswith("2 images of 2 classes")


def test_json_holds_no_nan(evaluate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from nbhd.tasks.classification import predict

    answer = predict.answer

    def broken(network: Any, pictures: list[Any]) -> torch.Tensor:
        logits = answer(network, pictures).clone()
        logits[0] = torch.nan
        return logits

    monkeypatch.setattr(evaluate_module, "answer", broken)
    run = evaluate("--data", "data", "-f", "json")
    assert run.exit_code == 1
    found = json.loads(run.stdout, parse_constant=lambda name: pytest.fail(name))
    assert (found["images"], found["skipped"], sum(map(sum, found["confusion"]))) == (1, 1, 1)
    assert "church/0.png: the model's answer is not a number" in run.stderr
    monkeypatch.setattr(evaluate_module, "answer", lambda *args: answer(*args) * torch.nan)
    run = evaluate("--data", "data", "-f", "json")
    assert (run.exit_code, run.stdout) == (2, "")
    assert "answers none of 2 pictures" in run.stderr


def test_a_nat_is_made_ready_for_many_pictures(evaluate: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nbhd import optimize

    made_ready: list[tuple[str, Any]] = []
    prepare = optimize.optimize_for_inference

    def spy(model: Any, dtype: Any = "auto") -> Any:
        made_ready.append((type(model).__name__, dtype))
        return prepare(model, dtype)

    monkeypatch.setattr(optimize, "optimize_for_inference", spy)
    fast = json.loads(evaluate("--data", "data", "-f", "json").stdout)
    assert made_ready == [("NatForImageClassification", None)]
    monkeypatch.setattr(optimize, "optimize_for_inference", lambda model, dtype: model)
    plain = json.loads(evaluate("--data", "data", "-f", "json").stdout)
    assert fast["confusion"] == plain["confusion"] and fast["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_links_to_nothing_and_damaged_pictures_are_named(evaluate: Run) -> None:
    Path("data/tench/gone.jpg").symlink_to("nothing")
    Path("data/tench/half.jfif").write_bytes(encode(noise(), "JPEG")[:300])
    run = evaluate("--data", "data", "-f", "json")
    assert run.exit_code == 1
    assert (json.loads(run.stdout)["images"], json.loads(run.stdout)["skipped"]) == (2, 2)
    assert "nbhd: skipped: data/tench/gone.jpg: broken link to nothing\n" in run.stderr
    assert "nbhd: skipped: data/tench/half.jfif: " in run.stderr
