"""``python -m qspec_jax.generate``: generate text at the command line. Parses and prints only.

Generated text and JSON go to the standard output or into a file, everything else to the standard error stream. Exit
codes: 0 success, 1 failure (of one prompt of several, too), 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.commands import options
from qspec_jax.commands.prompt_files import Prompt, PromptLine, ResultFile, line_keys, read_prompt_lines, result_entry
from qspec_jax.commands.run import exit_code, keep_compiled_programs, say
from qspec_jax.decoding.plan import AUTO, LOOKUP_MODES, MODES
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.results import GenerationResult
from qspec_jax.errors import UsageError
from qspec_jax.weights.resolve import check_model_name

if TYPE_CHECKING:
    from qspec_jax.engine.language_model import LanguageModel
    from qspec_jax.engine.pipeline import Pipeline

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
    "min-new-tokens": (int, 0, "tokens before a stop token or string ends the text"),
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
    lines = (
        'a prompt per line, or JSONL with {"prompt": TEXT} or {"messages": [...]}, "id", "kind" and options of its own'
    )
    add("--prompt-file", type=Path, metavar="FILE", help=lines)
    add("--output", type=Path, metavar="FILE", help="write JSONL into a file, or go on with one that was interrupted")
    add("--mode", choices=(*MODES, *LOOKUP_MODES, AUTO), default="qspec", help="auto: the fastest (default: qspec)")
    options.add_draft(parser)
    options.add_draft_length(parser)
    options.add_draft_context(parser)
    add("--max-new-tokens", type=int, default=128, metavar="N", help="per prompt (default: 128)")
    add("--max-seq-len", type=int, metavar="N", help="cache positions per sequence (default: as many as needed)")
    batch = "rows of the batch: prompts that run together; the next one enters as one is finished (default: 8)"
    options.add_batch_size(parser, batch)
    options.add_dtype(parser)
    group = "inputs per weight scale where the checkpoint is not 4-bit already (default: 32)"
    options.add_group_size(parser, group)
    options.add_kernels(parser)
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--stream", action=argparse.BooleanOptionalAction, help="print text as it comes (default: on a terminal)")
    add("--json", action="store_true", help="print one JSON object per prompt instead of text")
    sampling = parser.add_argument_group("sampling", "by default the most likely token is chosen")
    for option, (kind, default, text) in _SAMPLING_OPTIONS.items():
        sampling.add_argument(
            f"--{option}", type=kind, default=default, metavar="X", help=f"{text} (default: {default})"
        )
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; repeatable")
    sampling.add_argument("--num-samples", type=int, default=1, metavar="N", help="per prompt (default: 1)")
    logprobs = "report log-probabilities of each token and the N most likely ones in JSON (default: of none)"
    sampling.add_argument("--logprobs", type=int, metavar="N", help=logprobs)
    typical = "lossy: also accept drafts of this probability, less where many tokens are likely (default: off)"
    sampling.add_argument("--typical-acceptance", type=float, metavar="EPSILON", help=typical)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Checks the arguments, loads the model and generates; the exit code."""
    _check_counts(arguments)
    lines = _read_prompts(arguments)
    defaults = _defaults(arguments)
    check_model_name(arguments.model)
    if arguments.output is not None:
        return _run_to_file(arguments, lines, defaults)
    stream = arguments.stream if arguments.stream is not None else sys.stdout.isatty()
    if stream and not arguments.json:
        start_first = functools.partial(_start, lines=lines[:1], arguments=arguments, defaults=defaults, batch_size=1)
        _stream_text(_load(arguments, start_first), lines, arguments, defaults)
        return 0
    settings = {"lines": lines, "arguments": arguments, "defaults": defaults, "batch_size": arguments.batch_size}
    start = functools.partial(_start, **settings)
    pipeline = start(_load(arguments, start))
    results = pipeline.collect(progress=sys.stderr.isatty())
    for line, result in zip(lines, results, strict=True):
        if arguments.json:
            print(json.dumps(result_entry(result, line), ensure_ascii=False))
            continue
        if len(lines) > 1:
            print(f"### {heading(line.prompt)}")
        print(result.text)
    if not arguments.json:
        say(summary(results, pipeline.totals.decode_s))
    return _complain(results)


def _run_to_file(arguments: argparse.Namespace, lines: list[PromptLine], defaults: dict[str, Any]) -> int:
    names = ("model", "mode", "draft", "draft_length", "draft_context", "max_seq_len", "dtype", "group_size", "kernels")
    settings = {name: getattr(arguments, name) for name in names}
    file = ResultFile(arguments.output, line_keys(lines, defaults, settings))
    try:
        first = file.num_finished
        if first:
            say(f"{first} of {len(lines)} results are in {arguments.output} already")
        if first == len(lines):
            return 0
        given = {"lines": lines, "arguments": arguments, "defaults": defaults, "batch_size": arguments.batch_size}
        start = functools.partial(_start, **given, first=first)
        pipeline = start(_load(arguments, start))
        results = []
        for line, result in zip(lines[first:], pipeline.results(progress=sys.stderr.isatty()), strict=True):
            file.write(result_entry(result, line))
            results.append(result)
        say(summary(results, pipeline.totals.decode_s))
        return _complain(results, first=first)
    except KeyboardInterrupt:
        say(f"{file.num_finished} of {len(lines)} results are in {arguments.output}; the same command goes on with it")
        raise
    finally:
        file.close()


def _start(
    model: LanguageModel,
    *,
    lines: list[PromptLine],
    arguments: argparse.Namespace,
    defaults: dict[str, Any],
    batch_size: int,
    first: int = 0,
) -> Pipeline:
    """A pipeline with the prompts from ``first`` on in it, and room for all."""
    from qspec_jax.engine.intake import require_some

    names = ("draft", "draft_length", "draft_context")
    plan = model.plan(arguments.mode, **{name: getattr(arguments, name) for name in names})
    length = {"max_seq_len": arguments.max_seq_len}
    requests = [
        model.attempt(line.prompt, plan, what=f"prompt {index + 1}", **line.resolved(defaults, index), **length)
        for index, line in enumerate(lines)
    ]
    if arguments.output is None:
        require_some(requests)
    settings: dict[str, Any] = {"batch_size": batch_size, "on_event": lambda event: say(f"{event} ...")}
    return model.run(requests, plan, first=first, **settings, **length)


def _complain(results: Sequence[GenerationResult], *, first: int = 0) -> int:
    """Names the prompts that failed; the exit code."""
    for index, result in enumerate(results, first + 1):
        if result.error is not None:
            say(f"prompt {index} failed: {result.error}")
    reasons = {result.finish_reason for result in results}
    if "interrupted" in reasons:
        say("interrupted")
        return 130
    return 1 if "error" in reasons else 0


def _stream_text(
    model: LanguageModel, lines: list[PromptLine], arguments: argparse.Namespace, defaults: dict[str, Any]
) -> None:
    names = ("mode", "draft", "draft_length", "draft_context", "max_seq_len")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    for index, line in enumerate(lines):
        if len(lines) > 1:
            print(f"### {heading(line.prompt)}")
        asked = {**settings, **line.resolved(defaults, index), "on_event": lambda event: say(f"{event} ...")}
        for piece in model.stream(line.prompt, **asked):
            if isinstance(piece, str):
                print(piece, end="", flush=True)
            else:
                print(flush=True)
                say(summary([piece], piece.stats.decode_s))


def heading(prompt: Prompt) -> str:
    """What stands for a prompt above its text."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def summary(results: Sequence[GenerationResult], decode_s: float) -> str:
    """One line of figures over some results; ``decode_s`` are the seconds of their decoding loop."""
    stats = [result.stats for result in results]
    tokens = sum(s.num_tokens for s in stats)
    parts = [f"{tokens} tokens"]
    if decode_s > 0:
        parts.append(f"{(tokens - sum(s.num_tokens > 0 for s in stats)) / decode_s:.1f} tokens/s")
    if drafted := sum(s.drafted for s in stats):
        accepted, cycles = sum(s.accepted for s in stats), sum(s.cycles for s in stats)
        parts.append(f"acceptance {accepted / drafted:.2f}")
        parts.append(f"{1 + accepted / cycles:.2f} tokens/cycle")
        parts.append(f"{stats[0].draft} drafts of {stats[0].draft_length}")
    else:
        parts.append(stats[0].mode)
    return ", ".join([*parts, stats[0].device, f"{stats[0].kernels} kernels"])


def _read_prompts(arguments: argparse.Namespace) -> list[PromptLine]:
    lines = [PromptLine(prompt) for prompt in arguments.prompt]
    if arguments.prompt_file is not None:
        lines += read_prompt_lines(arguments.prompt_file)
    if not lines:
        raise UsageError("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    if len(lines) == 1 and isinstance(lines[0].prompt, str) and not lines[0].prompt.strip():
        raise UsageError("prompt 1 is empty; give it some text")
    return [dataclasses.replace(line, sample=sample) for line in lines for sample in range(arguments.num_samples)]


def _defaults(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a line that has none of its own."""
    names = [option.replace("-", "_") for option in _SAMPLING_OPTIONS]
    sampling = {name: getattr(arguments, name) for name in [*names, "stop", "logprobs", "typical_acceptance"]}
    SamplingParams.of(sampling)  # refuses what makes no sense before a model is loaded
    return {**sampling, "max_new_tokens": arguments.max_new_tokens, "chat": arguments.chat}


def _check_counts(arguments: argparse.Namespace) -> None:
    """Refuses what makes no sense for any model, before one is loaded."""
    names = ("max_new_tokens", "batch_size", "max_seq_len", "num_samples")
    options.check_positive(arguments, *names)
    options.check_draft_length(arguments.draft_length)


def _load(arguments: argparse.Namespace, start: Callable[[LanguageModel], Pipeline]) -> LanguageModel:
    """The model, with the programs that the pipeline of ``start`` will need."""
    say("starting ...")
    store = keep_compiled_programs()
    import qspec_jax

    quantization = None if arguments.mode == "float" else options.quantization_of(arguments.group_size)

    def compile_ahead(model: LanguageModel) -> None:
        model.programs.store = store
        start(model).compile()
        say(f"programs took {model.programs.compile_s:.1f} s")

    model = qspec_jax.load(
        arguments.model,
        quantization=quantization,
        dtype=arguments.dtype,
        kernels=arguments.kernels,
        progress=sys.stderr.isatty(),
        compile_ahead=compile_ahead,
    )
    model.programs.store = store
    return model


if __name__ == "__main__":
    sys.exit(main())
