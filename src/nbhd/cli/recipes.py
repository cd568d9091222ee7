"""``nbhd recipes``."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from nbhd._text import printable
from nbhd.cli._console import check_output, note
from nbhd.cli._errors import WRONG_CALL
from nbhd.errors import ArgumentError, RecipeError


class Action(StrEnum):
    """What to do with recipes."""

    list = "list"
    show = "show"
    copy = "copy"
    check = "check"
    keys = "keys"


class Format(StrEnum):
    """How the list is written."""

    table = "table"
    json = "json"


def recipes(
    action: Annotated[Action, typer.Argument(help="What to do; list is the default.")] = Action.list,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME|FILE]...", help="Recipes, by name or file.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="With copy: where to; by default NAME.yaml here."),
    ] = None,
    format: Annotated[Format | None, typer.Option("--format", "-f", help="With list: how; by default a table.")] = None,
) -> None:
    r"""List the training recipes with their results; show, copy or check them; explain their keys.

    A recipe is a YAML file with the sections model, data, augment, optim, schedule, eval and run. `show` prints one
    with every default spelled out, `copy` puts one (comments and all) where it can be edited, `check` says what is
    wrong with one without running it, `keys` lists every key with its default and its meaning.

    \b
    Examples:
      nbhd recipes
      nbhd recipes show imagenette128_nat
      nbhd recipes copy imagenette128_nat --output my.yaml
      nbhd recipes check my.yaml
    """
    for option, value, goes_with in (("--output", output, Action.copy), ("--format", format, Action.list)):
        if value is not None and action is not goes_with:
            raise ArgumentError(
                f"{option} goes with `nbhd recipes {goes_with.value}`, got {option} {value} with `nbhd recipes "
                f"{action.value}`. Leave it out."
            )
    if action is Action.keys:
        if names:
            raise ArgumentError(f"`nbhd recipes keys` takes no names, got {names[0]!r}.")
        _keys()
        return
    if action is Action.list:
        if names:
            raise ArgumentError(
                f"`nbhd recipes list` takes no names, got {names[0]!r}. Did you mean `nbhd recipes show`?"
            )
        _list(format)
    elif not names:
        raise ArgumentError(
            f"`nbhd recipes {action.value}` needs the name or the file of a recipe. `nbhd recipes` lists them."
        )
    elif action is Action.show:
        for name in names:
            _show(name)
    elif action is Action.copy:
        _copy(names, output)
    else:
        _check(names)


def _list(format: Format | None) -> None:
    from nbhd.tasks.recipes import find_recipe, load_recipe, recipe_header, recipe_names

    found = []
    for name in recipe_names():
        header = recipe_header(find_recipe(name))
        found.append({"name": name, "task": load_recipe(name).task, **header})
    if format is Format.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return
    columns = [
        (recipe["name"], recipe.get("title", ""), recipe.get("expected", "-"), recipe.get("reproduced", "no"))
        for recipe in found
    ]
    for name, title, expected, reproduced in columns:
        sys.stdout.write(f"{name}\n    {title}\n    expected: {expected}\n    reproduced: {reproduced}\n")


def _keys() -> None:
    import dataclasses

    import yaml

    from nbhd.tasks.recipe_sections import SECTIONS, Recipe

    recipe = Recipe()
    for name in SECTIONS:
        section = getattr(recipe, name)
        sys.stdout.write(f"{name}: {(type(section).__doc__ or '').strip()}\n")
        for field in dataclasses.fields(section):
            default = (
                yaml.safe_dump(getattr(section, field.name), default_flow_style=True).removesuffix("\n...\n").strip()
            )
            sys.stdout.write(f"  {field.name} ({default}): {field.metadata['doc']}\n")


def _show(name: str) -> None:
    from nbhd.tasks.recipes import load_recipe

    sys.stdout.write(load_recipe(name).to_yaml())


def _copy(names: list[str], output: str | None) -> None:
    from nbhd._files import is_special, write_whole
    from nbhd.tasks.recipes import find_recipe

    if len(names) != 1:
        raise ArgumentError(f"`nbhd recipes copy` copies one recipe, got {len(names)} names.")
    source = find_recipe(names[0])
    if output == "-":
        sys.stdout.write(source.read_text(encoding="utf-8"))
        return
    target = source.name if output is None else output
    check_output(target)
    if os.path.exists(target) and not is_special(target):
        raise ArgumentError(f"{target} exists already. Name another file with --output.")
    with write_whole(target, "wb") as stream:
        stream.write(source.read_bytes())
    note(f"copied {names[0]} to {target}")


def _check(names: list[str]) -> None:
    from nbhd.tasks.classification.train import build_model
    from nbhd.tasks.recipes import load_recipe

    bad = 0
    for name in names:
        try:
            recipe = load_recipe(name)
            if recipe.model.pretrained is None:
                import torch

                with torch.device("meta"):
                    build_model(recipe, ["a", "b"])
        except RecipeError as error:
            note(str(error))
            bad += 1
        else:
            sys.stdout.write(f"{printable(name)}: fine\n")
    if bad:
        raise typer.Exit(WRONG_CALL)
