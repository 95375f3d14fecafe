"""``python -m qspec_jax.generate``: generate text at the command line. Parses and prints only.

Generated text and JSON go to the standard output or into a file, everything else to the standard error stream. Exit
codes: 0 success, 1 failure (of one prompt of several, too), 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.commands import options
from qspec_jax.commands.output import is_colored, is_terminal, require_standard_output, say, show, show_json
from qspec_jax.commands.processes import add_processes, run_together
from qspec_jax.commands.prompt_files import (
    Prompt,
    PromptLine,
    ResultFile,
    attempt_line,
    line_keys,
    model_identity,
    read_prompt_lines,
    repeated_ids,
    result_entry,
)
from qspec_jax.commands.run import event_teller, exit_code, leave, load_and_compile
from qspec_jax.decoding.plan import AUTO, LOOKUP_MODES, MODES
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.results import GenerationResult
from qspec_jax.errors import UsageError
from qspec_jax.weights.resolve import check_model_name

if TYPE_CHECKING:
    from qspec_jax.decoding.plan import Plan
    from qspec_jax.engine.language_model import LanguageModel
    from qspec_jax.engine.pipeline import Pipeline
    from qspec_jax.engine.requests import Request


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.generate",
        description="Generate text with QSpec: drafts at a cheap precision, verified at 16-bit activations.",
    )
    add = parser.add_argument
    options.add_model(parser)
    texts: dict[str, Any] = {"type": options.text_of, "action": "append", "default": [], "metavar": "TEXT"}
    add("--prompt", **texts, help="a prompt; repeat for several")
    lines = (
        'a prompt per line, or JSONL with {"prompt": TEXT} or {"messages": [...]}, "id", "kind" and options of its own'
        "; - is the standard input"
    )
    add("--prompt-file", type=Path, metavar="FILE", help=lines)
    add("--output", type=Path, metavar="FILE", help="write JSONL into a file, or go on with one that was interrupted")
    add("--mode", choices=(*MODES, *LOOKUP_MODES, AUTO), default="qspec", help="auto: the fastest (default: qspec)")
    options.add_draft(parser)
    options.add_draft_length(parser)
    options.add_draft_context(parser)
    options.add_verify(parser)
    add("--max-new-tokens", type=int, default=128, metavar="N", help="per prompt (default: 128)")
    add("--max-seq-len", type=int, metavar="N", help="cache positions per sequence (default: as many as needed)")
    batch = "rows of the batch: prompts that run together; the next one enters as one is finished (default: 8)"
    options.add_batch_size(parser, batch)
    options.add_dtype(parser)
    group = "inputs per weight scale where the checkpoint is not 4-bit already (default: 32)"
    options.add_group_size(parser, group)
    options.add_kernels(parser)
    options.add_kv(parser)
    options.add_mesh(parser)
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--stream", action=argparse.BooleanOptionalAction, help="print text as it comes (default: on a terminal)")
    add("--json", action="store_true", help="print one JSON object per prompt instead of text")
    draft_help = "show which drafts were accepted, corrected and rejected; with --json their token ids"
    add("--show-draft", action="store_true", help=draft_help)
    sampling = options.add_sampling(parser)
    options.add_ignore_eos(sampling)
    sampling.add_argument("--stop", **texts, help="ends the text; repeatable")
    sampling.add_argument("--num-samples", type=int, default=1, metavar="N", help="per prompt (default: 1)")
    logprobs = "report log-probabilities of each token and the N most likely ones in JSON (default: of none)"
    sampling.add_argument("--logprobs", type=int, metavar="N", help=logprobs)
    typical = "lossy: also accept drafts of this probability, less where many tokens are likely (default: off)"
    sampling.add_argument("--typical-acceptance", type=float, metavar="EPSILON", help=typical)
    add_processes(parser)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser(), argv)


def run(arguments: argparse.Namespace) -> int:
    """Checks the arguments, loads the model and generates; the exit code."""
    return run_together("generate", _run, arguments, check=_check_counts)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.output is None:
        require_standard_output("give --output FILE")
    lines = _read_prompts(arguments)
    defaults = _defaults(arguments)
    check_model_name(arguments.model)
    _say_what_has_no_effect(arguments, lines)
    if arguments.output is not None:
        return _run_to_file(arguments, lines, defaults)
    stream = arguments.stream if arguments.stream is not None else is_terminal(sys.stdout) and not arguments.show_draft
    if stream and not arguments.json:
        return _run_streaming(arguments, lines, defaults)
    tell = event_teller()
    start = functools.partial(_start, lines=lines, arguments=arguments, defaults=defaults, tell=tell)
    pipeline = start(_load(arguments, start))
    try:
        results = pipeline.collect(progress=is_terminal(sys.stderr))
    except KeyboardInterrupt:
        results = pipeline.interrupt()
    for line, result in zip(lines, results, strict=True):
        if arguments.json:
            show_json(result_entry(result, line))
            continue
        if len(lines) > 1:
            show(f"### {heading(line.prompt)}")
        show(result.show().text(color=is_colored(sys.stdout)) if arguments.show_draft else result.text)
    if not arguments.json:
        say(summary(results, pipeline.totals.decode_s))
    code = _complain(lines, {index: result.error for index, result in enumerate(results)})
    if any(result.finish_reason == "interrupted" for result in results):
        raise KeyboardInterrupt
    return code


def _say_what_has_no_effect(arguments: argparse.Namespace, lines: Sequence[PromptLine]) -> None:
    """Of what is given; it is no error, as commands are compared that differ in one option."""
    for said in options.without_effect(arguments, [line.options.get("temperature", 0.0) for line in lines]):
        say(said)
    is_text = arguments.output is None and not arguments.json
    if arguments.logprobs is not None and is_text:
        say("--logprobs: no effect on text; give --json or --output FILE")
    if arguments.stream and not is_text:
        say("--stream: no effect on JSON, whose lines are whole; leave out --json and --output")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What results depend on besides their lines; what is not given is left out, as files of older versions have it."""
    names = ("mode", "draft", "draft_length", "draft_context", "max_seq_len", "dtype", "group_size", "kernels")
    settings = {"model": model_identity(arguments.model), **{name: getattr(arguments, name) for name in names}}
    if arguments.mesh is not None:
        settings["mesh"] = arguments.mesh
    if arguments.kv == "int8":  # the others are one cache
        settings["kv"] = arguments.kv
    if arguments.show_draft:
        settings["show_draft"] = True
    if arguments.verify != AUTO:
        settings["verify"] = arguments.verify
    if arguments.draft_model is not None:
        settings["draft_model"] = model_identity(arguments.draft_model)
    return settings | options.heads_of(arguments)


def _run_to_file(arguments: argparse.Namespace, lines: list[PromptLine], defaults: dict[str, Any]) -> int:
    file = ResultFile(arguments.output, line_keys(lines, defaults, _settings(arguments)))
    try:
        first = file.num_finished
        errors: dict[int, str | None] = {**file.errors}
        if first:
            say(f"{first} of {len(lines)} results are in {arguments.output} already")
        if first < len(lines):
            given: dict[str, Any] = {"lines": lines, "defaults": defaults, "first": first, "tell": event_teller()}
            start = functools.partial(_start, arguments=arguments, **given)
            pipeline = start(_load(arguments, start))
            results = []
            for line, result in zip(lines[first:], pipeline.results(progress=is_terminal(sys.stderr)), strict=True):
                file.write(result_entry(result, line))
                errors[first + len(results)] = result.error
                results.append(result)
            say(summary(results, pipeline.totals.decode_s))
        return _complain(lines, errors)
    except KeyboardInterrupt:
        say(f"{file.num_finished} of {len(lines)} results are in {arguments.output}; the same command goes on with it")
        raise
    finally:
        file.close()


def _run_streaming(arguments: argparse.Namespace, lines: list[PromptLine], defaults: dict[str, Any]) -> int:
    """Prompt by prompt, and each as it comes. Those that cannot run are named, as in a batch."""
    from qspec_jax.engine.intake import require_some

    tell = event_teller()
    start = functools.partial(_start, lines=lines, arguments=arguments, defaults=defaults, tell=tell, alone=True)
    model = _load(arguments, start)
    plan = model.plan(arguments.mode, **options.plan_options(arguments))
    requests = _requests(model, plan, lines, arguments, defaults)
    require_some(requests)
    settings = {"mode": arguments.mode, "max_seq_len": arguments.max_seq_len, **options.plan_options(arguments)}
    errors: dict[int, str | None] = {}
    for index, (line, request) in enumerate(zip(lines, requests, strict=True)):
        if len(lines) > 1:
            show(f"### {heading(line.prompt)}")
        if isinstance(request, GenerationResult):
            errors[index] = request.error
            show()
            continue
        asked = {**settings, **line.resolved(defaults, index), "on_event": tell}
        try:
            for piece in model.stream(line.prompt, **asked):
                if isinstance(piece, str):
                    show(piece, end="")
                else:
                    show()
                    say(summary([piece], piece.stats.decode_s))
        except KeyboardInterrupt:
            show()
            raise
    return _complain(lines, errors)


def _start(
    model: LanguageModel,
    *,
    lines: list[PromptLine],
    arguments: argparse.Namespace,
    defaults: dict[str, Any],
    tell: Callable[[str], None],
    first: int = 0,
    alone: bool = False,
) -> Pipeline:
    """A pipeline with the prompts from ``first`` on, and room for all; ``alone``, with the first that can run."""
    from qspec_jax.engine.intake import require_some
    from qspec_jax.engine.requests import Request

    plan = model.plan(arguments.mode, **options.plan_options(arguments))
    requests = _requests(model, plan, lines, arguments, defaults)
    if arguments.output is None:
        require_some(requests)
    if alone:
        requests = [next(request for request in requests if isinstance(request, Request))]
    settings: dict[str, Any] = {
        "batch_size": 1 if alone else arguments.batch_size,
        "max_seq_len": arguments.max_seq_len,
        "keep_drafts": arguments.show_draft,
        "on_event": tell,
    }
    return model.run(requests, plan, first=first, **settings)


def _requests(
    model: LanguageModel,
    plan: Plan,
    lines: list[PromptLine],
    arguments: argparse.Namespace,
    defaults: dict[str, Any],
) -> list[Request | GenerationResult]:
    """What is asked for each line, or why it cannot run."""
    numbers = _numbers(lines)
    return [
        attempt_line(
            model,
            plan,
            line,
            what=f"prompt {number}",
            max_seq_len=arguments.max_seq_len,
            **line.resolved(defaults, index),
        )
        for index, (line, number) in enumerate(zip(lines, numbers, strict=True))
    ]


def _numbers(lines: Sequence[PromptLine]) -> list[int]:
    """The place of each line's prompt among the prompts, whose samples are one after the other."""
    return list(itertools.accumulate(int(line.sample == 0) for line in lines))


def _complain(lines: Sequence[PromptLine], errors: Mapping[int, str | None]) -> int:
    """Names the prompts that failed, each once; the exit code."""
    numbers = _numbers(lines)
    failed = {index: error for index, error in sorted(errors.items()) if error is not None}
    for number, index in sorted({numbers[index]: index for index in reversed(failed)}.items()):
        where = lines[index].where
        say(f"prompt {number} failed: {failed[index]}" + (f" ({where})" if where else ""))
    return 1 if failed else 0


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
    if arguments.output is None and all(line.error is not None for line in lines):
        raise UsageError(f"{lines[0].where}: {lines[0].error}")
    if len(lines) == 1 and lines[0].error is None and not lines[0].prompt:
        raise UsageError("prompt 1 is empty; give it some text")
    for repeated in repeated_ids(lines):
        say(f"{' and '.join(repeated)} have the same id; results are told apart by their order alone")
    return [dataclasses.replace(line, sample=sample) for line in lines for sample in range(arguments.num_samples)]


def _defaults(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a line that has none of its own."""
    own = {name: getattr(arguments, name) for name in ("ignore_eos", "stop", "logprobs", "typical_acceptance")}
    sampling = {**options.sampling_of(arguments), **own}
    SamplingParams.of(sampling)  # refuses what makes no sense before a model is loaded
    return {**sampling, "max_new_tokens": arguments.max_new_tokens, "chat": arguments.chat}


def _check_counts(arguments: argparse.Namespace) -> None:
    """Refuses what makes no sense for any model, before one is loaded."""
    names = ("max_new_tokens", "batch_size", "max_seq_len", "num_samples")
    options.check_positive(arguments, *names)
    options.check_counts(arguments, "batch_size", "num_samples")
    options.check_draft_length(arguments.draft_length)
    options.check_weights(arguments)
    options.check_drafts(arguments, [arguments.draft], [arguments.draft_context], [arguments.mode])
    if arguments.show_draft and arguments.stream and not arguments.json and arguments.output is None:
        raise UsageError("--show-draft shows a text that is complete, and not as it comes; leave --stream out")


def _load(arguments: argparse.Namespace, start: Callable[[LanguageModel], Pipeline]) -> LanguageModel:
    """The model, with the programs that the pipeline of ``start`` will need."""
    say("starting ...")
    import qspec_jax

    def compile_ahead(model: LanguageModel) -> None:
        start(model).compile()
        say(f"programs took {model.programs.compile_s:.1f} s")

    return load_and_compile(qspec_jax.load, arguments, compile_ahead)


if __name__ == "__main__":
    leave(main())
