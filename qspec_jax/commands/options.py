"""Options that several commands have: their spelling, choices and defaults, written once.

What their help says differs where a command uses them differently. Imports no JAX: commands answer ``--help`` at once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qspec_jax.decoding.plan import (
    AUTO,
    DRAFTS,
    MAX_DRAFT_LENGTH,
    MODES,
    VERIFY,
    check_draft_context,
    check_verify,
    drafts_that_gain,
)
from qspec_jax.decoding.values import MAX_COUNT
from qspec_jax.device.mesh import parse_mesh
from qspec_jax.errors import UsageError
from qspec_jax.files.whole import check_writable
from qspec_jax.model.config import (
    DRAFT_HEADS,
    DTYPES,
    GROUP_SIZES,
    HEAD_BITS,
    KV_NAMES,
    WHOLE_ROW,
    QuantConfig,
    parse_group_size,
)
from qspec_jax.weights.resolve import check_model_name

KERNELS = ("auto", "reference", "triton", "mosaic", "tpu")
GROUP_SIZE_CHOICES = (*map(str, GROUP_SIZES), WHOLE_ROW)
PROCESSES = ("--coordinator", "--num-processes", "--process-id")  # of commands that several processes run
_DTYPE_HELP = "default: float32 on the CPU, bfloat16 elsewhere"

# Fields of `SamplingParams`: type, default, help.
SAMPLING: dict[str, tuple[type, float, str]] = {
    "temperature": (float, 0.0, "divides the logits; 0 is greedy"),
    "top-k": (int, 0, "draw from the X most likely tokens; 0 is all"),
    "top-p": (float, 1.0, "draw from the fewest tokens of this probability together"),
    "min-p": (float, 0.0, "draw from tokens this likely, relative to the most likely one"),
    "repetition-penalty": (float, 1.0, "weakens tokens of prompt and output"),
    "presence-penalty": (float, 0.0, "taken from the logits of tokens in the output"),
    "frequency-penalty": (float, 0.0, "the same, for every time a token is there"),
    "seed": (int, 0, "of the noise, counted up from prompt to prompt"),
    "min-new-tokens": (int, 0, "tokens before a stop token or string ends the text"),
}

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def text_of(argument: str) -> str:
    """The type of an argument that is a text, which is UTF-8 whatever the locale (``LANG=C``) takes its bytes for.

    Raises:
        argparse.ArgumentTypeError: it is neither UTF-8 nor of the locale's encoding.
    """
    try:
        argument.encode()
        return argument
    except UnicodeEncodeError:  # Python keeps bytes that it could not decode as halves of characters
        try:
            return os.fsencode(argument).decode("utf-8")
        except UnicodeError:
            raise argparse.ArgumentTypeError(
                "it is not UTF-8; give it in UTF-8, or write it to a file in UTF-8 and use --prompt-file"
            ) from None


def add_model(parser: Parser) -> None:
    """``--model``."""
    text = "hub id, Hugging Face directory, GGUF file or checkpoint (default: SmolLM2-135M-Instruct)"
    parser.add_argument("--model", help=text)


class _ModelOnce(argparse.Action):
    """Takes the model from either of two arguments."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest, None) is not None:
            parser.error(f"{self.metavar} is given twice: {getattr(namespace, self.dest)} and {values}")
        setattr(namespace, self.dest, values)


def add_model_first(parser: argparse.ArgumentParser, text: str) -> None:
    """``MODEL``, which may be left out; ``--model MODEL``, as other commands have it, is understood as well."""
    # Without a default of its own a MODEL that is not there leaves alone what --model has set.
    parser.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, action=_ModelOnce, help=text)
    parser.add_argument("--model", metavar="MODEL", action=_ModelOnce, help="the same, as other commands take it")


def add_sampling(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group of the options in :data:`SAMPLING`, to which a command may add others."""
    group = parser.add_argument_group("sampling", "by default the most likely token is chosen")
    for option, (kind, default, text) in SAMPLING.items():
        group.add_argument(f"--{option}", type=kind, default=default, metavar="X", help=f"{text} (default: {default})")
    return group


def add_ignore_eos(parser: Parser) -> None:
    """``--ignore-eos``."""
    text = "go on past the model's stop tokens, so that texts have as many tokens as they may"
    parser.add_argument("--ignore-eos", action="store_true", help=text)


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options of :data:`SAMPLING` say, by the names of ``SamplingParams``."""
    return {name: getattr(arguments, name) for name in (option.replace("-", "_") for option in SAMPLING)}


def add_draft(parser: Parser) -> None:
    """``--draft``; see :func:`check_drafts`."""
    text = "draft precision; w4a16 gains where drafts read less than what verifies (default: auto)"
    parser.add_argument("--draft", choices=DRAFTS, default="auto", help=text)


def without_effect(arguments: argparse.Namespace, temperatures: Iterable[float] = ()) -> list[str]:
    """What is to be said of options that are given and change nothing, with the way to have them do something.

    Args:
        arguments: with ``mode`` and options of drafts, and perhaps of sampling.
        temperatures: of the prompts that have one of their own.
    """
    mode = arguments.mode
    found: list[tuple[str, tuple[str, ...]]] = []
    if mode == AUTO and arguments.draft_length != AUTO:
        found = [("--mode auto, which chooses it; give --mode qspec", ("draft_length",))]
    elif mode == "lookup":
        found = [("--mode lookup, whose drafts are looked up; give --mode lookup-qspec", _OF_THE_MODELS_DRAFTS)]
    elif mode in MODES and mode != "qspec":
        names = (*_OF_THE_MODELS_DRAFTS, "draft_length", "typical_acceptance")
        found = [(f"--mode {mode}, which makes no drafts; give --mode qspec", names)]
    if not any((getattr(arguments, "temperature", 1.0), *temperatures)):
        found.append(("--temperature 0, which takes the most likely token; give a higher one", _OF_DRAWING))
    said = []
    for reason, names in found:
        given = [name for name in names if getattr(arguments, name, None) not in (None, _NOTHING[name])]
        if given:
            said.append(f"{', '.join(map(option_of, given))}: no effect with {reason}")
    return said


_OF_THE_MODELS_DRAFTS = ("draft", "draft_context", "draft_head")
_OF_DRAWING = ("top_k", "top_p", "min_p")
# Their defaults.
_NOTHING: dict[str, Any] = {
    **{"draft": "auto", "draft_context": "auto", "draft_head": None, "draft_length": 3, "typical_acceptance": None},
    **{"top_k": 0, "top_p": 1.0, "min_p": 0.0},
}


def add_draft_length(parser: Parser) -> None:
    """``--draft-length``; see :func:`check_draft_length`."""
    text = "drafts per cycle, or auto for the fastest with --mode qspec (default: 3)"
    parser.add_argument("--draft-length", type=_draft_length, default=3, metavar="N", help=text)


def _draft_length(text: str) -> int | str:
    return AUTO if text == AUTO else int(text)


def add_draft_context(parser: Parser) -> None:
    """``--draft-context``."""
    text = "tokens of the cache that a draft reads: full, auto (those that matter of a long text) or N (default: auto)"
    parser.add_argument("--draft-context", type=_draft_context, default="auto", metavar="N", help=text)


def _draft_context(text: str) -> str | int:
    try:
        return parse_draft_context(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_draft_context(text: str) -> str | int:
    """``full``, ``auto`` or a number of tokens.

    Raises:
        UsageError: it is none of these, or too few tokens.
    """
    value = int(text) if re.fullmatch("[0-9]{1,18}", text.strip()) else text.strip()
    check_draft_context(value)
    return value


def add_verify(parser: Parser) -> None:
    """``--verify``, ``--draft-model``, ``--head-bits`` and ``--draft-head``; see :func:`check_weights`."""
    text = (
        "what verifies drafts: float (a model's own weights, kept beside a 4-bit copy), w8a16 (8-bit weights, of which "
        "drafts read the upper 4 bits), w4a16, or auto (default: auto)"
    )
    parser.add_argument("--verify", choices=VERIFY, default=AUTO, help=text)
    draft_model = "with --verify float, a 4-bit checkpoint of the same model to draft from (default: rounded at load)"
    parser.add_argument("--draft-model", metavar="CHECKPOINT", help=draft_model)
    add_heads(parser)


def add_heads(parser: Parser, usual: str = "as the checkpoint says, or 16") -> None:
    """``--head-bits`` and ``--draft-head``."""
    heads = f"LM head: 16 as it is, 8 or 4 rounded (default: {usual})"
    parser.add_argument("--head-bits", type=int, choices=(16, *HEAD_BITS), help=heads)
    draft_head = "LM head of drafts: the upper half of one in 8 bits, or a copy (default: the one that verifies)"
    parser.add_argument("--draft-head", type=int, choices=DRAFT_HEADS, help=draft_head)


def heads_of(arguments: argparse.Namespace) -> dict[str, int | None]:
    """``head_bits`` and ``draft_head`` of :func:`qspec_jax.load`, as far as they are given."""
    given = {name: getattr(arguments, name, None) for name in ("head_bits", "draft_head")}
    return {name: bits for name, bits in given.items() if bits is not None}


def check_weights(arguments: argparse.Namespace, modes: Iterable[str] = ()) -> None:
    """Refuses, before a model is opened, weights that contradict each other or none of the modes.

    Raises:
        UsageError: that is so.
        CheckpointError: there is no such draft model.
    """
    modes = list(modes) or [arguments.mode]
    problems = []
    for mode in modes:
        try:
            check_verify(arguments.verify, mode)
        except UsageError as error:
            problems.append(error)
    if len(problems) == len(modes):
        raise problems[0]
    if arguments.verify == "float" and "w8a16" in modes:
        raise UsageError("--mode w8a16 reads 8-bit weights, and --verify float a 4-bit copy; leave one of them out")
    if arguments.verify == AUTO and set(modes) == {"float"} and heads_of(arguments):
        raise UsageError("--head-bits and --draft-head are of quantised models; leave them out with --mode float")
    if arguments.draft_model is not None and arguments.verify != "float":
        raise UsageError("--draft-model is of --verify float, whose drafts it makes; add that, or leave it out")
    check_model_name(arguments.draft_model, what="draft_model")


def check_drafts(
    arguments: argparse.Namespace, drafts: Iterable[str], contexts: Iterable[str | int], modes: Iterable[str]
) -> None:
    """Refuses, before a model is opened, drafts of the model of which none reads less than its verification.

    What ``--verify auto`` is, only the model tells. A checkpoint may have an LM head of 4 bits for its drafts.

    Raises:
        UsageError: that is so.
    """
    if {AUTO, "qspec", "lookup-qspec"}.isdisjoint(modes):
        return
    head = getattr(arguments, "draft_head", None)
    try:
        drafts_that_gain(itertools.product(drafts, contexts), arguments.verify, draft_head=head)
    except UsageError:
        named = getattr(arguments, "model", None)
        if not any(map(_may_have_a_head_for_drafts, named if isinstance(named, list) else [named])):
            raise


def _may_have_a_head_for_drafts(model: str | None) -> bool:
    from qspec_jax.weights.checkpoint.manifest import is_checkpoint  # imports JAX

    return model is not None and is_checkpoint(model)


def verify_of(arguments: argparse.Namespace, modes: Iterable[str]) -> str:
    """``--verify``, which ``--mode w8a16`` says as well."""
    return "w8a16" if arguments.verify == AUTO and "w8a16" in modes else arguments.verify


def weights_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """``quantization``, ``verify``, ``draft_model`` and what is given of heads of :func:`qspec_jax.load`.

    ``--mode float`` alone needs no 4-bit weights; as the yardstick of ``--verify float`` it reads what verifies there.
    ``--mode w8a16`` is that of ``--verify w8a16``.
    """
    if arguments.mode == "float" and arguments.verify == AUTO:
        return {"quantization": None}
    given = {
        "verify": verify_of(arguments, [arguments.mode]),
        "draft_model": arguments.draft_model,
        **heads_of(arguments),
    }
    return {"quantization": quantization_of(arguments.group_size), **given}


def plan_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of ``LanguageModel.plan``."""
    return {name: getattr(arguments, name) for name in ("draft", "draft_length", "draft_context", "verify")}


def add_group_size(parser: Parser, text: str) -> None:
    """``--group-size``; see :func:`quantization_of`."""
    parser.add_argument("--group-size", choices=GROUP_SIZE_CHOICES, help=text)


def add_kernels(parser: Parser) -> None:
    """``--kernels``."""
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="default: auto")


def add_mesh(parser: Parser) -> None:
    """``--mesh``."""
    text = "devices that share the rows of a batch, and the model: data=N,model=N, or one of them (default: one device)"
    parser.add_argument("--mesh", type=_mesh, metavar="AXES", help=text)


def _mesh(text: str) -> str:
    try:
        return str(parse_mesh(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_dtype(parser: Parser, text: str = _DTYPE_HELP) -> None:
    """``--dtype``."""
    parser.add_argument("--dtype", choices=DTYPES, help=text)


def add_kv(parser: Parser) -> None:
    """``--kv``."""
    text = "keys and values in the cache: in the dtype of the model (bf16 if that is its dtype), or int8 in about half "
    text += "of the memory (default: model)"
    parser.add_argument("--kv", choices=KV_NAMES, default="model", help=text)


def add_batch_size(parser: Parser, text: str, *, several: bool = False) -> None:
    """``--batch-size``, for which ``--slots`` is the older word: a number, or text with ``several`` of them."""
    given: dict[str, Any] = {"type": int, "default": 8, "metavar": "N"}
    if several:
        given = {"default": "8", "metavar": "N,..."}
    parser.add_argument("--batch-size", "--slots", **given, help=text)


def add_preset(parser: Parser, presets: Any) -> None:
    """``--preset`` and ``--model`` of benchmarks of one model."""
    text = f"shape of a model with synthetic weights: {', '.join(presets)}"
    parser.add_argument("--preset", metavar="NAME", help=text)
    parser.add_argument("--model", metavar="CHECKPOINT", help="a real model instead, as in generate")


def add_asymmetric(parser: Parser, text: str = "synthetic weights with zero points (default: symmetric)") -> None:
    """``--asymmetric`` of benchmarks."""
    parser.add_argument("--asymmetric", action="store_true", help=text)


def add_report(parser: Parser, plot: str) -> None:
    """``--json`` and ``--plot`` of benchmarks."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"draw {plot}; needs matplotlib")


def add_debug(parser: Parser) -> None:
    """``--debug``; see :func:`qspec_jax.commands.run.exit_code`."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def option_of(name: str) -> str:
    """The spelling of an attribute of the parsed arguments."""
    return f"--{name.replace('_', '-')}"


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for a whole number below 1; None is one that was not given."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"{option_of(name)} {value} must be at least 1")


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for more than the host can hold one by one."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value > MAX_COUNT:
            raise UsageError(f"{option_of(name)} {value} must be at most {MAX_COUNT}")


def check_draft_length(length: int | str) -> None:
    """Raises UsageError for fewer or more drafts than a cycle may have."""
    if isinstance(length, str):
        return
    if length < 1:
        raise UsageError(f"--draft-length {length} must be at least 1")
    if length > MAX_DRAFT_LENGTH:
        raise UsageError(f"--draft-length {length} must be at most {MAX_DRAFT_LENGTH}")


def check_plot(path: Path | None, *, option: str) -> None:
    """Raises UsageError where a picture could not be written, or not in the format that its name says."""
    check_writable(path, option=option)
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise UsageError(f"{option} {path}: {path.suffix} is no format of pictures; use {', '.join(sorted(formats))}")


def quantization_of(group_size: str | None) -> Any:
    """``quantization`` of :func:`qspec_jax.load` for a ``--group-size``."""
    return "auto" if group_size is None else QuantConfig(group_size=parse_group_size(group_size))
