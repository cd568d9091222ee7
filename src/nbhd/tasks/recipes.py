"""Recipes: one YAML file that says everything about a training run, found, read and checked.

A recipe has flat sections in a fixed order: ``model, data, augment, optim, schedule, eval, run``. Every key has a
default (`recipe_sections`), an unknown key is an error that names the nearest known one, and the resolved recipe is
saved beside the checkpoint, so that a run can be repeated from its output folder alone. The comment at the head of the
file says what the recipe is and what it gives; `recipe_header` reads it for ``nbhd recipes``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from nbhd.errors import RecipeError
from nbhd.tasks.recipe_sections import SECTIONS, Recipe

HEADER_KEYS = ("source", "command", "hardware", "hours", "expected", "reproduced")


TASKS: dict[str, type[Recipe]] = {"classification": Recipe}


def load_recipe(name_or_file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by name (``classification/imagenette128_nat``) or from a YAML file.

    Args:
        name_or_file: a file wins over a name; the part after the last ``/`` of a name is enough.
        overrides: ``section.key=value``, the value in YAML; applied in order.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, a value of the wrong kind or out of range.
    """
    import yaml

    path = find_recipe(name_or_file)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no recipe: it is not text in UTF-8. Name a YAML file.") from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that is none, or too deep
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: a recipe is sections of keys, got a {type(tree).__name__}. Sections: {', '.join(SECTIONS)}."
        )
    for override in overrides:
        _apply_override(tree, override)
    return parse_recipe(tree, where=str(name_or_file))


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Build a `Recipe` from nested dicts as a YAML file has them."""
    _check_keys(tree, ("task", *SECTIONS), where, "section")
    task = tree.get("task", "classification")
    if not isinstance(task, str) or task not in TASKS:
        raise RecipeError(f"{where}: task must be one of {', '.join(TASKS)}, got {task!r}")
    hints = typing.get_type_hints(TASKS[task])
    sections = {}
    for name in SECTIONS:
        values = tree.get(name)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: section {name} must hold keys, got {values!r}")
        sections[name] = _parse_section(hints[name], values, f"{where}: {name}")
    recipe = TASKS[task](task=task, **sections)
    _check_together(recipe, where)
    return recipe


def _parse_section(kind: type, values: dict[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _check_keys(values, tuple(fields), where, "key")
    hints = typing.get_type_hints(kind)
    parsed = {}
    for key, value in values.items():
        parsed[key] = _coerce(value, hints[key], f"{where}.{key}")
        _check_range(parsed[key], fields[key].metadata, f"{where}.{key}")
    return kind(**parsed)


def _check_keys(values: dict[str, Any], known: tuple[str, ...], where: str, what: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
            raise RecipeError(
                f"{where}: unknown {what} {key!r}. The nearest known one is {near[0]!r}; all: {', '.join(known)}."
            )


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotated type, or an error. Integers pass as floats, and so does ``1e-3``, text in YAML 1.1."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), where)
    if origin is list:
        if not isinstance(value, (list, tuple)) or not value:
            raise RecipeError(f"{where} must be a list with at least one value, got {value!r}")
        return [_coerce(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if hint is float:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                if math.isfinite(value):
                    return float(value)
        raise RecipeError(f"{where} must be a finite number, got {_shown(value)}")
    if hint is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if abs(value) >= 2**63:
                raise RecipeError(f"{where} must be a whole number below 2**63, got {_shown(value)}")
            return value
        raise RecipeError(f"{where} must be a whole number, got {value!r}")
    if not isinstance(value, hint):
        kind = {bool: "true or false", str: "text"}[hint]
        raise RecipeError(f"{where} must be {kind}, got {value!r}")
    return value


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not spell out numbers of more than 4300 digits
        return f"a number of {value.bit_length()} bits"
    return f"{text[:60]}..." if len(text) > 60 else text


def _check_range(value: Any, metadata: Any, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check_range(item, metadata, where)
        return
    if value is None or not metadata:
        return
    if metadata["one_of"] is not None and value not in metadata["one_of"]:
        raise RecipeError(f"{where} must be one of {', '.join(map(str, metadata['one_of']))}, got {value!r}")
    low, high = metadata["low"], metadata["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        limits = (
            f"at least {low}" if high is None else f"at most {high}" if low is None else f"between {low} and {high}"
        )
        raise RecipeError(f"{where} must be {limits}, got {value!r}")


def _check_together(recipe: Recipe, where: str) -> None:
    schedule, augment = recipe.schedule, recipe.augment
    if schedule.warmup_epochs + schedule.cooldown_epochs > schedule.epochs:
        raise RecipeError(
            f"{where}: schedule.warmup_epochs + schedule.cooldown_epochs is "
            f"{schedule.warmup_epochs + schedule.cooldown_epochs:g}, more than schedule.epochs {schedule.epochs}"
        )
    for key in ("crop_scale", "crop_aspect", "erase_scale"):
        pair = getattr(augment, key)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise RecipeError(f"{where}: augment.{key} must be [least, most], got {pair}")
    if schedule.image_sizes is not None:
        epochs = [pair[0] for pair in schedule.image_sizes]
        if (
            any(len(pair) != 2 or pair[1] < 8 for pair in schedule.image_sizes)
            or epochs != sorted(set(epochs))
            or epochs[0]
        ):
            raise RecipeError(
                f"{where}: schedule.image_sizes must be [first epoch, size] pairs with rising epochs, the first 0, "
                f"and sizes of at least 8, got {schedule.image_sizes}"
            )
    for key in ("mean", "std"):
        if len(getattr(recipe.data, key)) != 3:
            raise RecipeError(
                f"{where}: data.{key} must have three values, one a channel, got {getattr(recipe.data, key)}"
            )
    if min(recipe.data.std) <= 0:
        raise RecipeError(f"{where}: data.std must be above 0, got {recipe.data.std}")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    import yaml

    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"--set wants section.key=value, got {override!r}. For example: --set optim.lr=0.0005")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    _check_keys({section: None}, SECTIONS, f"--set {override!r}", "section")
    branch = tree.get(section)
    if branch is None:
        branch = tree[section] = {}
    if isinstance(branch, dict):
        branch[key] = value


# ---------------------------------------------------------------------------------------------- recipes as files


def recipe_names() -> list[str]:
    """Names of the recipes in the package, found by descending: ``classification/imagenette128_nat``, ..."""
    root = _root()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def find_recipe(name_or_file: str | Path) -> Path:
    """Path of a recipe given by name or file; a file wins over a name."""
    path = Path(name_or_file)
    if path.is_file():
        return path
    if path.suffix not in (".yaml", ".yml"):
        shipped = _root() / f"{name_or_file}.yaml"
        if str(name_or_file) in recipe_names():
            return shipped
        short = [name for name in recipe_names() if name.rpartition("/")[2] == str(name_or_file)]
        if len(short) == 1:
            return _root() / f"{short[0]}.yaml"
    near = difflib.get_close_matches(str(name_or_file), recipe_names(), n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"no recipe file or recipe called {str(name_or_file)!r}.{hint} `nbhd recipes` lists them.")


def recipe_header(path: Path) -> dict[str, str]:
    """The comment at the head of a recipe: ``title`` (its first line) and the ``key: value`` lines of `HEADER_KEYS`."""
    header: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        name, colon, value = text.partition(":")
        if "title" not in header:
            header["title"] = text
        elif colon and name in HEADER_KEYS:
            key, header[name] = name, value.strip()
        elif key and text:
            header[key] += " " + text
    return header


def _root() -> Path:
    return Path(str(resources.files("nbhd") / "recipes"))
