"""``python -m qspec_jax.quantize``: write a model as a quantised checkpoint. Parses and prints only.

Progress goes to the standard error stream, the closing line to the standard output. Exit codes: 0 success, 1
failure, 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import dataclasses
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.commands import options
from qspec_jax.commands.output import is_terminal, say, show
from qspec_jax.commands.run import exit_code, keep_compiled_programs, leave
from qspec_jax.device.sizes import size_text
from qspec_jax.model.config import WEIGHT_BITS, QuantConfig, parse_group_size
from qspec_jax.recipes.catalogue import RECIPES, Recipe
from qspec_jax.recipes.files import read_recipe, with_heads
from qspec_jax.recipes.steps import Progress, RecipeOptions
from qspec_jax.weights.resolve import check_model_name

if TYPE_CHECKING:
    from qspec_jax.recipes.convert import Conversion

_SECONDS_BETWEEN_LINES = 30
_ON_ANY_GRID = ("rtn", "gptq")  # others group channels, and rotate by groups
_INTERRUPTED = "interrupted; nothing was changed, and the same command goes on with what is finished"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.quantize",
        description="Write a model as a quantised checkpoint, a directory that every command takes as a model.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id, Hugging Face directory, GGUF file, checkpoint, or 'default'")
    add("output", metavar="OUT", help="directory to write")
    add(
        "--recipe",
        required=True,
        metavar="NAME|FILE.toml",
        help="; ".join(f"{recipe.name}: {recipe.summary}" for recipe in RECIPES.values())
        + "; or a file that names one of them and holds options",
    )
    sizes = (
        "inputs per scale of rounded weights (default: 32; the largest that fits with --bits 8 of rtn and gptq, and "
    )
    sizes += "with --keep-floats)"
    options.add_group_size(parser, sizes)
    bits = "of rounded weights: 4, or 8, of which drafts read the upper 4 (default: 4)"
    add("--bits", type=int, choices=WEIGHT_BITS, help=bits)
    kept = "store the model's own floats besides: they verify what the rounded weights draft (docs/exact.md)"
    add("--keep-floats", action="store_true", help=kept)
    options.add_heads(parser, "16, or with keep as the checkpoint says")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--symmetric", action="store_const", const=True, help="round without an offset")
    either.add_argument(
        "--asymmetric",
        dest="symmetric",
        action="store_const",
        const=False,
        help="round with an offset (default where 32 is that of --group-size)",
    )
    dtype = "of what is not quantised; what 16 bits hold exactly is stored in 16 bits anyway (default: float32)"
    options.add_dtype(parser, dtype)
    add(
        "--outlier-groups",
        type=int,
        metavar="N",
        help="groups of a token's activations that keep 8 bits in W4A4 drafts (default: 1; of resq 10)",
    )
    add("--calibration", type=Path, metavar="FILE", help='text for gptq; JSONL with {"prompt": TEXT} if FILE.jsonl')
    add("--calibration-tokens", type=int, metavar="N", help="of that text (default: 65536)")
    add("--overwrite", action="store_true", help="replace a checkpoint at OUT once the new one is complete")
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser(), argv, interrupted=_INTERRUPTED)


def run(arguments: argparse.Namespace) -> None:
    """Reads the recipe, converts the model and prints what came of it."""
    recipe, given = read_recipe(arguments.recipe, saved=lambda: _saved(arguments.model))
    recipe_options = _override(recipe, given, arguments)
    check_model_name(arguments.model)
    from qspec_jax.recipes.convert import convert

    recipe_options = _with_usual_grid(recipe, recipe_options, arguments.model)
    keep_compiled_programs()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        conversion = convert(
            arguments.model,
            arguments.output,
            recipe=recipe,
            options=recipe_options,
            overwrite=arguments.overwrite,
            progress=Progress(_bar, say),
        )
    show(summary(conversion))


def summary(conversion: Conversion) -> str:
    """The closing line."""
    before, after = size_text(conversion.bytes_before), size_text(conversion.bytes_after)
    return f"{conversion.path}: {before} before, {after} after, {conversion.seconds:.1f} s"


def _saved(model: str) -> QuantConfig | None:
    """What a checkpoint was stored with, its heads and draft activations among it; None of other models."""
    from qspec_jax.weights.checkpoint.manifest import is_checkpoint, read_manifest

    return read_manifest(Path(model)).quantization if is_checkpoint(model) else None


def _with_usual_grid(recipe: Recipe, given: RecipeOptions, model: str) -> RecipeOptions:
    """The options with the grid of :func:`qspec_jax.load` where floats or 8 bits verify, as far as none is asked for.

    Drafts then read the fewest scales, and the fastest kernels read all.
    """
    quantization = given.quantization
    if recipe.name not in _ON_ANY_GRID or not (quantization.bits == 8 or quantization.keep_floats):
        return given
    if "symmetric" not in given.said:
        quantization = dataclasses.replace(quantization, symmetric=True)
    if "group_size" not in given.said:
        from qspec_jax.model.parameters import largest_group_size
        from qspec_jax.weights.resolve import open_source, resolve_model

        config = open_source(resolve_model(model)).config
        quantization = dataclasses.replace(quantization, group_size=largest_group_size(config))
    return dataclasses.replace(given, quantization=quantization)


def _override(recipe: Recipe, given: RecipeOptions, arguments: argparse.Namespace) -> RecipeOptions:
    """The options with what the command line says in their place.

    Raises:
        UsageError: the recipe does not round, and bits are given.
    """
    grid: dict[str, Any] = {}
    if arguments.group_size is not None:
        grid["group_size"] = parse_group_size(arguments.group_size)
    if arguments.symmetric is not None:
        grid["symmetric"] = arguments.symmetric
    quantization = dataclasses.replace(given.quantization, **grid)
    if arguments.bits is not None:
        recipe.check_bits()
        quantization = dataclasses.replace(quantization, bits=arguments.bits)
    heads = {name: None if bits == 16 else bits for name, bits in options.heads_of(arguments).items()}
    quantization = with_heads(quantization, **heads)
    if arguments.keep_floats:
        quantization = dataclasses.replace(quantization, keep_floats=True)
    if quantization.keep_floats:
        recipe.check_floats()
    if arguments.outlier_groups is not None:
        w4a4 = dataclasses.replace(quantization.w4a4, outlier_groups=arguments.outlier_groups)
        quantization = dataclasses.replace(quantization, w4a4=w4a4)
    return dataclasses.replace(
        given,
        quantization=quantization,
        said=given.said.union(grid),
        dtype=arguments.dtype or given.dtype,
        calibration=arguments.calibration or given.calibration,
        calibration_tokens=(
            given.calibration_tokens if arguments.calibration_tokens is None else arguments.calibration_tokens
        ),
    )


def _bar(items: Iterable, what: str) -> Iterable:
    if not is_terminal(sys.stderr):
        return _lines(list(items), what)
    from tqdm import tqdm

    return tqdm(items, desc=what, unit="part", file=sys.stderr, leave=False)


def _lines(items: Sequence, what: str) -> Iterator:
    """The items, with a line at the start and one now and then that says how long they will take."""
    say(f"{what} ...")
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= _SECONDS_BETWEEN_LINES:
            said, left = now, (now - start) / done * (len(items) - done)
            say(
                f"{what}: {done} of {len(items)}, {left / 60:.0f} min left"
                if left >= 60
                else f"{what}: {done} of {len(items)}, {left:.0f} s left"
            )
        yield item


if __name__ == "__main__":
    leave(main())
