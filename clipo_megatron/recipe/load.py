"""Reading a recipe: YAML, then `key=value` overrides, then every check; all faults are reported together."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from clipo_megatron.errors import ConfigError
from clipo_megatron.recipe.recipe import Recipe
from clipo_megatron.recipe.rules import recipe_problems


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: YAML file.
        overrides: `section.key=value`, the value in YAML syntax; later ones win.

    Raises:
        ConfigError: with every fault found, unknown keys with the nearest known one.
    """
    recipe, problems = read_recipe(path, overrides)
    if problems or recipe is None:
        raise ConfigError(problems)
    return recipe


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe | None, list[str]]:
    """Read a recipe as far as its faults allow, so that later checks can add theirs to the same list.

    Args:
        path: YAML file.
        overrides: `section.key=value`, the value in YAML syntax; later ones win.

    Returns:
        (recipe, problems). With problems the recipe has defaults in place of the faulty keys, and is for further
        checks only; None when a key without default is faulty.
    """
    if not path.is_file():
        return None, [f"recipe {path}: no such file; give the path of a YAML file"]
    try:
        loaded: object = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return None, [f"recipe {path}: not valid YAML: {error}"]
    if not isinstance(loaded, dict):
        return None, [f"recipe {path}: found {type(loaded).__name__}, expected sections such as 'model:' and 'run:'"]
    content = cast("dict[str, Any]", loaded)

    problems = [problem for override in overrides if (problem := _apply(content, override))]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problems += [_explain(fault) for fault in error.errors()]
        recipe = _without_faults(content, error)
    if recipe is not None:
        problems += recipe_problems(recipe)
    return recipe, problems


def _without_faults(content: dict[str, Any], error: ValidationError) -> Recipe | None:
    """The recipe with defaults in place of faulty keys, None when that can't be."""
    for fault in error.errors():
        place: Any = content
        *sections, last = [part for part in fault["loc"] if isinstance(part, str)] or [""]
        for section in sections:
            place = cast("dict[str, Any]", place).get(section) if isinstance(place, dict) else None
        if isinstance(place, dict):
            cast("dict[str, Any]", place).pop(last, None)
    try:
        return Recipe.model_validate(content)
    except ValidationError:
        return None


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """All keys of a recipe, dotted, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _apply(content: dict[str, Any], override: str) -> str:
    """Set one `key=value` in place; returns the fault, "" when there is none."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"override '{override}': must read section.key=value"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *sections, last = key.split(".")
    place = content
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        inner = place[section]
        if not isinstance(inner, dict):
            return f"override '{override}': '{section}' is not a section"
        place = cast("dict[str, Any]", inner)
    place[last] = value
    return ""


def _explain(fault: Any) -> str:  # noqa: ANN401 (pydantic's own dictionary)
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        keys = known_keys()
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        last = [name for name in keys if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        hint = (near or last or [""])[0]
        return f"{key}: unknown key" + (f"; did you mean '{hint}'?" if hint else "")
    if fault["type"] == "missing":
        return f"{key}: missing; it has no default"
    return f"{key} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
