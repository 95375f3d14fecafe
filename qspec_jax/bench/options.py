"""What the commands have in common: the options that choose shapes, and the reading of lists."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qspec_jax.bench.presets import PRESETS, MatmulShape, distinct, linear_shapes
from qspec_jax.commands import options as shared
from qspec_jax.errors import UsageError
from qspec_jax.files.whole import check_writable, write_whole
from qspec_jax.model.config import parse_group_size
from qspec_jax.weights.resolve import open_source, resolve_model

_SHAPE = re.compile(r"([0-9]{1,9})\s*[x×*]\s*([0-9]{1,9})", re.IGNORECASE)


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose weights: where their shapes come from, and how they are grouped."""
    add = parser.add_argument
    add("--preset", action="append", default=[], metavar="NAME", help=f"{', '.join(PRESETS)}; repeatable")
    add("--model", action="append", default=[], metavar="CHECKPOINT", help="the linears of a checkpoint; repeatable")
    add("--shape", action="append", default=[], metavar="KxN", help="inputs x outputs, e.g. 4096x28672; repeatable")
    add(
        "--group-size",
        action="append",
        default=[],
        metavar="SIZE",
        help=f"inputs per weight scale: {', '.join(shared.GROUP_SIZE_CHOICES)}; repeatable or with commas "
        "(default: the largest of 128, 64 and 32 that divides K)",
    )
    shared.add_asymmetric(parser, "weights with zero points (default: symmetric)")
    shared.add_debug(parser)


def default_preset() -> str:
    """The one that suits this device."""
    import jax

    from qspec_jax.device.start import start_device

    start_device()
    return "llama-3-8b" if jax.default_backend() == "gpu" else "smollm2-135m"


def selected_shapes(arguments: argparse.Namespace, *, default: str | None = None) -> list[MatmulShape]:
    """The shapes of all presets, checkpoints and single shapes that were asked for, each once.

    Args:
        arguments: parsed.
        default: the preset where none of them is given; None for that of the device.

    Raises:
        UsageError: a name is unknown or a shape cannot be read.
        CheckpointError, UnsupportedModelError: a checkpoint cannot be opened.
    """
    presets = arguments.preset
    if not (presets or arguments.model or arguments.shape):
        presets = [default or default_preset()]
    shapes: list[MatmulShape] = []
    for name in presets:
        if name not in PRESETS:
            raise UsageError(f"--preset {name} is unknown; use one of {', '.join(PRESETS)}, or --shape KxN")
        shapes += linear_shapes(PRESETS[name], prefix=f"{name} ")
    for text in arguments.shape:
        shapes.append(parse_shape(text))
    for model in arguments.model:
        path = resolve_model(model)
        shapes += linear_shapes(open_source(path).config, prefix=f"{path.name} ")
    return distinct(shapes)


def parse_shape(text: str) -> MatmulShape:
    """``KxN``, such as ``4096x28672``.

    Raises:
        UsageError: it reads otherwise, or K does not split into two nibble planes.
    """
    match = _SHAPE.fullmatch(text.strip())
    k, n = (0, 0) if match is None else map(int, match.groups())
    if not (k and n):
        raise UsageError(f"--shape {text} cannot be read; write KxN, inputs times outputs, such as 4096x28672")
    if k % 2:
        raise UsageError(f"--shape {text}: K={k} is odd; two 4-bit codes share a byte, so use an even K")
    return MatmulShape(k, n)


def selected_group_sizes(arguments: argparse.Namespace, shape: MatmulShape) -> list[int]:
    """The group sizes that a shape is to have, as numbers of inputs.

    Raises:
        UsageError: a size is unknown or does not divide K.
    """
    texts = split_list(arguments.group_size)
    if not texts:
        return [next((size for size in (128, 64, 32) if shape.k % size == 0), shape.k)]
    sizes = []
    for text in texts:
        if text not in shared.GROUP_SIZE_CHOICES:
            raise UsageError(f"--group-size {text} is not supported; use {', '.join(shared.GROUP_SIZE_CHOICES)}")
        group_size = parse_group_size(text)
        check_group_size(shape.k, group_size, text=text, what=f"shape {shape}")
        sizes.append(group_size or shape.k)
    return list(dict.fromkeys(sizes))


def check_group_size(k: int, group_size: int | None, *, text: str | None, what: str) -> None:
    """Raises UsageError unless ``k`` inputs split into whole groups; None is one group of all."""
    if k % 2 == 0 and k % (group_size or k) == 0:
        return
    import pallas_kernels

    try:
        pallas_kernels.check_group_size(k, group_size or k, what=what)
    except ValueError as error:
        raise UsageError(f"--group-size {text}: {error}") from error


def parse_numbers(text: str, *, option: str) -> list[int]:
    """Positive whole numbers with commas between them, each once.

    Raises:
        UsageError: one is no such number, or there is none.
    """
    parts = split_list([text])
    if not parts or not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise UsageError(f"{option} {text} cannot be read; write positive whole numbers, such as {option} 1,16,64")
    return list(dict.fromkeys(int(part) for part in parts))


def parse_names(text: str, *, option: str, known: Collection[str]) -> list[str]:
    """Names with commas between them, each once.

    Raises:
        UsageError: one is not known, or there is none.
    """
    names = split_list([text])
    if not names or not all(name in known for name in names):
        given = ", ".join(name for name in names if name not in known) or repr(text)
        raise UsageError(f"{option} {given} is unknown; use some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def split_list(texts: Sequence[str]) -> list[str]:
    """The parts between commas, without blanks."""
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def check_at_least(value: int | float | None, least: int, *, option: str) -> None:
    """Raises UsageError for a number below the least that makes sense."""
    if value is not None and not value >= least:
        raise UsageError(f"{option} {value:g} must be at least {least:g}")


def no_acceptance(draft: str) -> str:
    """What is said of drafts that read a part of longer texts than the prompts and their new tokens are."""
    return f"acceptance of {draft} is not measured: no prompt is so long that its drafts read less than all of it"


def check_report(arguments: argparse.Namespace) -> None:
    """Raises UsageError where ``--json`` or ``--plot`` of :func:`shared.add_report` could not be written."""
    check_writable(arguments.json, option="--json")
    check_matplotlib(arguments.plot)
    shared.check_plot(arguments.plot, option="--plot")


def write_report(path: Path | None, report: Mapping[str, Any]) -> None:
    """Writes everything measured so far, each time: a run that is killed leaves what it measured.

    Raises:
        QSpecError: it cannot be written; what was written before is there.
    """
    if path is not None:
        write_whole(path, f"{json.dumps(report, indent=1, allow_nan=False)}\n")


def check_matplotlib(path: Path | None, *, find: Callable[[str], object] = importlib.util.find_spec) -> None:
    """Raises UsageError where a plot is asked for and cannot be drawn."""
    if path is not None and find("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; run `pip install 'qspec-jax[bench]'`, or leave --plot out")
