"""``python -m qspec_jax.generate``: generate text at the command line. Parses and prints only.

Generated text and JSON go to the standard output, everything else to the standard error stream. Exit
codes: 0 success, 1 failure, 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.command import exit_code, keep_compiled_programs, say
from qspec_jax.errors import UsageError
from qspec_jax.sampling import SamplingParams

if TYPE_CHECKING:
    from qspec_jax.engine import LanguageModel
    from qspec_jax.results import GenerationResult

_WHOLE_ROW = "row"
# The fields of `SamplingParams`: type, default, help.
_SAMPLING_OPTIONS: dict[str, tuple[type, float, str]] = {
    "temperature": (float, 0.0, "divides the logits; 0 is greedy"),
    "top-k": (int, 0, "draw from the X most likely tokens; 0 is all"),
    "top-p": (float, 1.0, "draw from the fewest tokens of this probability together"),
    "min-p": (float, 0.0, "draw from tokens this likely, relative to the most likely one"),
    "repetition-penalty": (float, 1.0, "weakens tokens of prompt and output"),
    "presence-penalty": (float, 0.0, "taken from the logits of tokens in the output"),
    "frequency-penalty": (float, 0.0, "the same, for every time a token is there"),
    "seed": (int, 0, "of the noise, counted up from prompt to prompt"),
}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.generate",
        description="Generate text with QSpec: drafts at a cheap precision, verified at 16-bit activations.",
    )
    add = parser.add_argument
    add("--model", help="hub id, Hugging Face directory, GGUF file or checkpoint (default: SmolLM2-135M-Instruct)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeat for several")
    add("--prompt-file", type=Path, metavar="FILE", help='a prompt per line, or JSONL with {"prompt": TEXT}')
    add("--mode", choices=("qspec", "w4a16", "w4a8", "w4a4", "float"), default="qspec", help="default: qspec")
    add("--draft", choices=("auto", "w4a4", "w4a8"), default="auto", help="draft precision (default: auto)")
    add("--draft-length", type=int, default=3, metavar="N", help="drafts per cycle (default: 3)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="per prompt (default: 128)")
    add("--max-seq-len", type=int, metavar="N", help="cache positions per sequence (default: as many as needed)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts that run together (default: 8)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, bfloat16 elsewhere")
    add(
        "--group-size",
        choices=("32", "64", "128", _WHOLE_ROW),
        help="inputs per weight scale where the checkpoint is not 4-bit already (default: 32)",
    )
    add("--kernels", choices=("auto", "reference", "triton", "mosaic"), default="auto", help="default: auto")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--stream", action=argparse.BooleanOptionalAction, help="print text as it comes (default: on a terminal)")
    add("--json", action="store_true", help="print one JSON object per prompt instead of text")
    sampling = parser.add_argument_group("sampling", "by default the most likely token is chosen")
    for option, (kind, default, text) in _SAMPLING_OPTIONS.items():
        sampling.add_argument(
            f"--{option}", type=kind, default=default, metavar="X", help=f"{text} (default: {default})"
        )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> None:
    """Checks the arguments, loads the model and generates."""
    prompts = _read_prompts(arguments)
    _check_counts(arguments)
    names = [option.replace("-", "_") for option in _SAMPLING_OPTIONS]
    sampling = SamplingParams(**{name: getattr(arguments, name) for name in names})
    model = _load(arguments)
    stream = arguments.stream if arguments.stream is not None else sys.stdout.isatty()
    options: dict[str, Any] = {
        "mode": arguments.mode,
        "draft": arguments.draft,
        "draft_length": arguments.draft_length,
        "max_new_tokens": arguments.max_new_tokens,
        "max_seq_len": arguments.max_seq_len,
        "chat": arguments.chat,
        "sampling": sampling,
        "on_event": lambda event: say(f"{event} ..."),
    }
    if stream and not arguments.json:
        _stream_text(model, prompts, options)
        return
    results = model.generate(prompts, batch_size=arguments.batch_size, **options)
    if arguments.json:
        for result in results:
            print(json.dumps(result.to_dict(), ensure_ascii=False))
        return
    for prompt, result in zip(prompts, results, strict=True):
        if len(prompts) > 1:
            print(f"### {prompt}")
        print(result.text)
    say(summary(results))


def _stream_text(model: LanguageModel, prompts: list[str], options: dict[str, Any]) -> None:
    first = options["sampling"]
    for row, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"### {prompt}")
        options["sampling"] = dataclasses.replace(first, seed=(first.seed + row) % 2**32)  # as a batch would have it
        for piece in model.stream(prompt, **options):
            if isinstance(piece, str):
                print(piece, end="", flush=True)
            else:
                print(flush=True)
                say(summary([piece]))


def summary(results: Sequence[GenerationResult]) -> str:
    """One line of figures over some results."""
    stats = [result.stats for result in results]
    # Sequences of one batch share its times, which count once.
    decode_s = sum(seconds for _, seconds in {(s.prefill_s, s.decode_s) for s in stats})
    tokens = sum(s.num_tokens for s in stats)
    parts = [f"{tokens} tokens"]
    if decode_s > 0:
        parts.append(f"{(tokens - len(stats)) / decode_s:.1f} tokens/s")
    if drafted := sum(s.drafted for s in stats):
        accepted, cycles = sum(s.accepted for s in stats), sum(s.cycles for s in stats)
        parts.append(f"acceptance {accepted / drafted:.2f}")
        parts.append(f"{1 + accepted / cycles:.2f} tokens/cycle")
        parts.append(f"{stats[0].draft} drafts of {stats[0].draft_length}")
    else:
        parts.append(stats[0].mode)
    return ", ".join([*parts, stats[0].device, f"{stats[0].kernels} kernels"])


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompt_file is not None:
        prompts += read_prompt_file(arguments.prompt_file)
    if not prompts:
        raise UsageError("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    if empty := [index for index, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise UsageError(f"prompt {empty[0]} is empty; give it some text")
    return prompts


def read_prompt_file(path: Path) -> list[str]:
    """A prompt per line, or JSONL with a text under ``"prompt"``.

    Raises:
        UsageError: the file cannot be read, or a line has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --prompt-file {path}: {error}") from error
    return [_parse_line(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _parse_line(line: str, path: Path, number: int) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        if path.suffix == ".jsonl":
            raise UsageError(f"{path}:{number} is not JSON: {error}") from error
        return line
    if not isinstance(entry.get("prompt"), str):
        raise UsageError(f'{path}:{number} has no text under "prompt"; a line is {{"prompt": TEXT}}')
    return entry["prompt"]


def _check_counts(arguments: argparse.Namespace) -> None:
    """Refuses what makes no sense for any model, before one is loaded."""
    for option in ("draft_length", "max_new_tokens", "batch_size", "max_seq_len"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if arguments.draft_length > 16:
        raise UsageError(f"--draft-length {arguments.draft_length} must be at most 16")


def _load(arguments: argparse.Namespace) -> LanguageModel:
    say("starting ...")
    keep_compiled_programs()
    import qspec_jax

    quantization: Any = None if arguments.mode == "float" else "auto"
    if quantization and arguments.group_size is not None:
        group_size = None if arguments.group_size == _WHOLE_ROW else int(arguments.group_size)
        quantization = qspec_jax.QuantConfig(group_size=group_size)
    return qspec_jax.load(
        arguments.model,
        quantization=quantization,
        dtype=arguments.dtype,
        kernels=arguments.kernels,
        progress=sys.stderr.isatty(),
    )


if __name__ == "__main__":
    sys.exit(main())
