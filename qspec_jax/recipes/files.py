"""Recipe files, and group sizes as they and the options of commands write them.

A recipe file (TOML) names a recipe and holds options::

    recipe = "rtn"
    group_size = 64           # 32, 64, 128 or "row"
    symmetric = true
    keep_floats = true        # the model's own floats besides, which verify
    dtype = "float32"         # of what is not quantised
    calibration = "text.txt"  # of gptq, with calibration_tokens = 65536; relative to the recipe file

    [w4a4]                    # activations of W4A4 drafts; [w4a8] likewise
    group_size = 64
    symmetric = false
    clip_ratio = 0.95
    outlier_groups = 1
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

from qspec_jax.errors import UsageError
from qspec_jax.model.config import ActivationQuantization, HeadFields, QuantConfig, parse_group_size
from qspec_jax.recipes.catalogue import RECIPES, Recipe
from qspec_jax.recipes.steps import RecipeOptions


def read_recipe(text: str, *, saved: Callable[[], QuantConfig | None] = lambda: None) -> tuple[Recipe, RecipeOptions]:
    """The recipe that ``text`` names, or that the file ``text`` describes.

    Args:
        text: a name or a path.
        saved: what the model's codes were stored with, if it is a checkpoint; asked where they are kept. It holds as
            far as a file says nothing else.

    Raises:
        UsageError: there is no such recipe, or the file is not understood.
    """
    if text in RECIPES:
        return RECIPES[text], RecipeOptions(_usual(RECIPES[text], saved))
    path = Path(text)
    if path.suffix != ".toml":
        raise UsageError(f"recipe {text!r} is unknown; use {', '.join(RECIPES)}, or the path of a .toml file")
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read recipe {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    try:
        return _parse_recipe(fields, path.parent, saved)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _usual(recipe: Recipe, saved: Callable[[], QuantConfig | None]) -> QuantConfig:
    """What holds where a file says nothing: of codes that are kept, what is stored with them."""
    kept = saved() if recipe.name == "keep" else None
    # Bits are those of the codes, whatever is said; floats are kept where that is asked for.
    return recipe.quantization if kept is None else dataclasses.replace(kept, bits=4, keep_floats=False)


def with_heads(quantization: QuantConfig, **heads: Unpack[HeadFields]) -> QuantConfig:
    """The configuration with what is said of the LM head; one of 4 bits has no upper half for drafts to read."""
    if heads.get("head_bits") == 4:
        heads = {"draft_head": None, **heads}
    return dataclasses.replace(quantization, **heads)


def _parse_recipe(
    fields: Mapping[str, Any], folder: Path, saved: Callable[[], QuantConfig | None]
) -> tuple[Recipe, RecipeOptions]:
    kinds = {"recipe": str, "group_size": (int, str), "symmetric": bool, "dtype": str, "w4a4": dict, "w4a8": dict}
    kinds |= {"bits": int, "head_bits": int, "draft_head": int, "calibration": str, "calibration_tokens": int}
    kinds["keep_floats"] = bool
    _check_fields(fields, kinds, "the recipe")
    if fields.get("recipe") not in RECIPES:
        given = repr(fields["recipe"]) if "recipe" in fields else "none"
        raise UsageError(f'recipe is {given}; write recipe = "NAME" with one of {", ".join(RECIPES)}')
    recipe = RECIPES[fields["recipe"]]
    if "bits" in fields:
        recipe.check_bits()
    usual = _usual(recipe, saved)
    of_weights = ("group_size", "symmetric", "bits", "keep_floats")
    changes: dict[str, Any] = {key: fields[key] for key in of_weights if key in fields}
    if "group_size" in changes:
        changes["group_size"] = parse_group_size(changes["group_size"])
    for precision in ("w4a4", "w4a8"):
        if precision in fields:
            changes[precision] = _parse_activations(fields[precision], getattr(usual, precision), f"[{precision}]")
    others: dict[str, Any] = {key: fields[key] for key in ("dtype", "calibration_tokens") if key in fields}
    if "calibration" in fields:
        others["calibration"] = folder / fields["calibration"]
    heads = {key: None if fields[key] == 16 else fields[key] for key in ("head_bits", "draft_head") if key in fields}
    quantization = dataclasses.replace(with_heads(usual, **heads), **changes)
    return recipe, RecipeOptions(quantization, said=frozenset(changes), **others)


def _parse_activations(
    fields: Mapping[str, Any], default: ActivationQuantization, where: str
) -> ActivationQuantization:
    kinds = {"group_size": (int, str), "symmetric": bool, "clip_ratio": (float, int), "outlier_groups": int}
    _check_fields(fields, kinds, where)
    changes = dict(fields)
    if "group_size" in changes:
        changes["group_size"] = parse_group_size(changes["group_size"])
    if "clip_ratio" in changes:
        changes["clip_ratio"] = float(changes["clip_ratio"])
    try:
        return dataclasses.replace(default, **changes)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _check_fields(fields: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    if unknown := [key for key in fields if key not in kinds]:
        raise UsageError(f"{where} has unknown keys: {', '.join(unknown)}; known: {', '.join(kinds)}")
    for key, value in fields.items():
        allowed = kinds[key] if isinstance(kinds[key], tuple) else (kinds[key],)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise UsageError(f"{where}: {key} = {value!r} must be of type {names}")
