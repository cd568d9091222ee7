"""Recipes: the shipped ones, and what is wrong with a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbhd.errors import RecipeError
from nbhd.tasks.classification.train import build_model
from nbhd.tasks.recipe_sections import SECTIONS
from nbhd.tasks.recipes import HEADER_KEYS, find_recipe, load_recipe, parse_recipe, recipe_header, recipe_names

NAMES = recipe_names()


def test_the_recipes_that_were_promised_are_there() -> None:
    variants = {f"classification/imagenet1k_nat_{size}" for size in ("mini", "tiny", "small", "base")}
    assert variants | {"classification/imagenette128_nat", "classification/cifar10_quick"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_makes_a_model(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = build_model(recipe, ["a", "b", "c"])
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_says_what_it_is(name: str) -> None:
    header = recipe_header(find_recipe(name))
    assert set(header) == {"title", *HEADER_KEYS}
    assert all(header.values())
    assert header["reproduced"].startswith(("yes", "no"))
    assert f"--config {name}" in header["command"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_has_its_sections_in_order(name: str) -> None:
    lines = find_recipe(name).read_text().splitlines()
    present = [line.removesuffix(":") for line in lines if line.removesuffix(":") in SECTIONS]
    assert present == [section for section in SECTIONS if section in present]
    assert {"model", "data", "optim", "schedule"} <= set(present)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mini", 19_984_174), ("tiny", 27_901_582), ("small", 50_743_297), ("base", 89_769_652)],
)
def test_imagenet_recipes_train_the_published_models(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build_model(load_recipe(f"imagenet1k_nat_{name}"), [str(i) for i in range(1000)])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_resolved_recipe_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe.to_yaml())
    assert load_recipe(saved) == recipe


def test_overrides_apply_in_order_and_are_typed() -> None:
    recipe = load_recipe(
        "cifar10_quick",
        ["optim.lr=1e-3", "optim.lr=5e-4", "model.depths=[1, 1, 1]", "run.compile=true", "data.name=null"],
    )
    assert (recipe.optim.lr, recipe.model.depths, recipe.run.compile, recipe.data.name) == (5e-4, [1, 1, 1], True, None)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optim": {"learning_rate": 1}}, "unknown key 'learning_rate'"),
        ({"optim": {"weight_decy": 1}}, "nearest known one is 'weight_decay'"),
        ({"optin": {}}, "nearest known one is 'optim'"),
        ({"task": "regression"}, "task must be one of classification"),
        ({"optim": 3}, "section optim must hold keys"),
        ({"optim": {"lr": "fast"}}, "optim.lr must be a finite number, got 'fast'"),
        ({"optim": {"lr": float("nan")}}, "optim.lr must be a finite number"),
        ({"optim": {"lr": True}}, "optim.lr must be a finite number"),
        ({"optim": {"lr": None}}, "optim.lr must be a finite number"),
        ({"optim": {"batch_size": 1.5}}, "optim.batch_size must be a whole number"),
        ({"optim": {"batch_size": 0}}, "optim.batch_size must be at least 1, got 0"),
        ({"model": {"depths": []}}, "model.depths must be a list with at least one value"),
        ({"model": {"depths": [2, "3"]}}, r"model.depths\[1\] must be a whole number"),
        ({"model": {"dilations": [[1], [0]]}}, "model.dilations must be at least 1"),
        ({"model": {"patch_size": 3}}, "model.patch_size must be one of 2, 4, 8"),
        ({"run": {"plot": "yes please"}}, "run.plot must be true or false"),
        ({"data": {"name": 3}}, "data.name must be text"),
        ({"data": {"resize": "stretch"}}, "data.resize must be one of crop, squash"),
        ({"data": {"std": [0.2, 0.2, 0.0]}}, "data.std must be above 0"),
        ({"data": {"mean": [0.5]}}, "data.mean must have three values"),
        ({"augment": {"crop_scale": [0.9, 0.5]}}, r"augment.crop_scale must be \[least, most\]"),
        ({"augment": {"hflip_prob": 1.5}}, "augment.hflip_prob must be between 0 and 1"),
        ({"schedule": {"epochs": 3, "warmup_epochs": 4}}, "more than schedule.epochs 3"),
        ({"schedule": {"image_sizes": [[1, 64]]}}, r"schedule.image_sizes must be \[first epoch, size\] pairs"),
        ({"schedule": {"image_sizes": [[0, 64], [0, 96]]}}, "rising epochs"),
        ({"schedule": {"image_sizes": [[0]]}}, "pairs"),
        ({"task": ["classification"]}, r"task must be one of classification, got \['classification'\]"),
        ({"optim": {"lr": 10**400}}, r"optim.lr must be a finite number, got 10{59}\.\.\.$"),
        ({"optim": {"lr": 10**5000}}, "optim.lr must be a finite number, got a number of 16610 bits"),
        ({"schedule": {"epochs": 10**400}}, r"schedule.epochs must be a whole number below 2\*\*63, got 10{59}\.\.\.$"),
    ],
)
def test_bad_recipe_is_an_error_that_names_the_key(tree: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(tree)


def test_model_that_cannot_be_is_an_error_of_the_recipe() -> None:
    recipe = load_recipe("cifar10_quick", ["model.num_heads=[3, 4, 8]"])
    with pytest.raises(RecipeError, match=r"model: num_heads must divide"):
        build_model(recipe, ["a", "b"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "wants section.key=value"),
        ("lr=3", "wants section.key=value"),
        ("optin.lr=3", "nearest known one is 'optim'"),
        ("optim.lrr=3", "nearest known one is 'lr'"),
        ("optim.lr=[", "the value is not YAML"),
        ("optim.lr=2020-13-45", "the value is not YAML"),
    ],
)
def test_bad_override_is_an_error(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("cifar10_quick", [override])


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'classification/cifar10_quick'"):
        find_recipe("classification/cifar10_quik")


@pytest.mark.parametrize(
    "content", [b"a: [", b"- a\n- b\n", b"\xff\xfe", b"!!python/object/apply:os.system ['true']", b"task: 2020-13-45"]
)
def test_file_that_is_no_recipe_is_an_error(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(file)


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert load_recipe(file) == parse_recipe({})
