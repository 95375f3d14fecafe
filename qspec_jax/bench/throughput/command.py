"""``python -m qspec_jax.bench throughput``: what a batch that requests enter and leave serves per second.

Parses and prints; :mod:`qspec_jax.bench.throughput.measure` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.bench.models import ModelRequest, asked_model, chosen_model, verification
from qspec_jax.bench.presets import PRESETS
from qspec_jax.commands import options as shared
from qspec_jax.commands.output import say, show
from qspec_jax.commands.processes import add_processes
from qspec_jax.commands.prompt_files import read_prompt_file
from qspec_jax.decoding.plan import AUTO, LOOKUP_MODES, MODES, missing_drafts
from qspec_jax.errors import UsageError
from qspec_jax.evaluation.sharegpt import PACKAGE, Conversation, sharegpt
from qspec_jax.files.whole import write_picture

if TYPE_CHECKING:
    from qspec_jax.bench.throughput.measure import ReadyBatch, ThroughputRun
    from qspec_jax.decoding.plan import Plan
    from qspec_jax.engine.language_model import LanguageModel
    from qspec_jax.engine.requests import Request
    from qspec_jax.engine.results import GenerationResult

_BURST_S, _BURST_S_AT_A_RATE = 0.5, 0.05
_CHARACTERS_PER_TOKEN = 4  # of English, about; for models without a tokenizer
_DESCRIPTION = f"""
Tokens per second over all requests and of each, time to the first token, inter-token latency, acceptance, occupancy and
the share of the time that the device waits for the host, for every mode and size of the batch. Prompts are first turns
of ShareGPT (package {PACKAGE}); the new tokens of each are as many as its answer there has, up to --max-new-tokens, or
fewer where a real model stops (--ignore-eos: it does not). Synthetic weights read noise of the same lengths (a token
for four characters), and their drafts are accepted as noise is: that says nothing about a real model. The share of the
prompts' tokens that were reused is that of system prompts: conversations have them in --prompt-file, noise with
--system-tokens.
"""
_COLUMNS = (
    "{:<12} {:<{drafts}} {:>5} {:>5} {:>5} {:>9} {:>8}" + " {:>7}" * 4 + " {:>6} {:>6} {:>5} {:>7} {:>6} {:>6} {:>8}"
)


def add_command(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = commands.add_parser("throughput", help="serve many requests at once", description=_DESCRIPTION)
    add = parser.add_argument
    shared.add_preset(parser, PRESETS)
    shared.add_batch_size(parser, "rows of the batch: requests that run together (default: 8)", several=True)
    add("--mode", default="w4a16,qspec,auto", metavar="MODE,...", help="as in generate (default: w4a16,qspec,auto)")
    shared.add_draft(parser)
    shared.add_draft_length(parser)
    shared.add_draft_context(parser)
    add("--num-prompts", type=int, default=100, metavar="N", help="requests (default: 100)")
    add("--prompt-file", type=Path, metavar="FILE", help="other prompts than those of ShareGPT, as in generate")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="at most, per request (default: 256)")
    shared.add_ignore_eos(parser)
    add("--max-prompt-tokens", type=int, default=1024, metavar="N", help="longer prompts are left out (default: 1024)")
    add("--system-tokens", type=int, default=0, metavar="N", help="noise in front of noise prompts (default: 0)")
    add("--system-prompts", type=int, default=1, metavar="N", help="different ones of these, by turns (default: 1)")
    add("--rate", type=float, metavar="R", help="requests per second, Poisson (default: all at once)")
    load = "then also at these shares of the requests per second that all at once had, Poisson (such as 0.5,0.8)"
    add("--load", metavar="SHARE,...", help=load)
    burst = f"that the device runs before the host looks (default: {_BURST_S}, at a rate {_BURST_S_AT_A_RATE})"
    add("--burst", "--chunk", type=float, metavar="SECONDS", help=burst)
    add("--repeats", type=int, default=1, metavar="N", help="runs of each mode, by turns (default: 1)")
    shared.add_verify(parser)
    shared.add_kernels(parser)
    shared.add_kv(parser)
    shared.add_mesh(parser)
    shared.add_group_size(parser, "inputs per weight scale, as in decode")
    shared.add_asymmetric(parser)
    shared.add_dtype(parser)
    shared.add_report(parser, "tokens/s over the size of the batch")
    add_processes(parser)
    shared.add_debug(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 if a prompt could not run."""
    request, all_modes, rows = _read(arguments)
    conversations = _conversations(arguments)  # nothing is printed before they are there
    from qspec_jax.bench.description import describe_model
    from qspec_jax.bench.environment import environment, header

    facts = environment(arguments.argv)
    show(header(facts))
    runs: list[ThroughputRun] = []
    failed: dict[str, None] = {}
    report: dict[str, Any] = {"environment": facts, "models": [], "runs": []}
    for modes in request.passes(all_modes):
        say(f"{request.name}: {'making' if request.path is None else 'loading'} weights ...")
        model = request.load(floating_point=modes == ["float"] and request.verify != "float")
        report["models"].append(describe_model(model, synthetic=request.path is None))
        weights = "synthetic weights" if request.path is None else "its own weights"
        cache = "" if model.decoder.kv == "model" else f", {model.decoder.kv} cache"
        show(f"{request.name}, {weights}, {model.decoder.dtype}{cache}, kernels {model.kernels}")
        width = draft_width(model.plan(mode, **_plan_options(arguments, mode)) for mode in modes)
        show(table_head(width))
        for one in _measure(model, modes, rows, conversations, arguments, failed):
            runs.append(one)
            report["runs"].append(one.to_dict())
            report["failed"] = list(failed)
            options.write_report(arguments.json, report)
            show("\n".join([table_row(one, width), *choice_rows(one)]))
    if arguments.repeats > 1:
        show("\n".join(median_rows(runs)))
    if arguments.plot is not None:
        plot_throughput(arguments.plot, runs, title=f"{request.name}, {facts['device']}, jax {facts['jax']}")
    for reason in failed:
        say(reason)
    return 1 if failed else 0


def _read(arguments: argparse.Namespace) -> tuple[ModelRequest, Sequence[str], list[int]]:
    """Checks everything that can be wrong before a weight is made or a program compiled."""
    options.check_report(arguments)
    for name in ("num_prompts", "max_new_tokens", "max_prompt_tokens", "system_prompts", "repeats"):
        options.check_at_least(getattr(arguments, name), 1, option=f"--{name.replace('_', '-')}")
    shared.check_draft_length(arguments.draft_length)
    options.check_at_least(arguments.system_tokens, 0, option="--system-tokens")
    for name in ("rate", "burst"):
        if (value := getattr(arguments, name)) is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value} must be more than 0")
    arguments.load = _loads(arguments)
    modes = options.parse_names(arguments.mode, option="--mode", known=(AUTO, *MODES, *LOOKUP_MODES))
    shared.check_weights(arguments, modes)
    arguments.verify = shared.verify_of(arguments, modes)
    shared.check_drafts(arguments, [arguments.draft], [arguments.draft_context], modes)
    rows = options.parse_numbers(arguments.batch_size, option="--batch-size")
    name, config, path = chosen_model(arguments)
    if arguments.system_tokens and path is not None:
        raise UsageError("--system-tokens is for --preset; give a --model conversations with system messages instead")
    longest_prompt = arguments.system_tokens + arguments.max_prompt_tokens
    if longest_prompt + arguments.max_new_tokens > config.max_position_embeddings:
        raise UsageError(
            f"--max-prompt-tokens {arguments.max_prompt_tokens}, --system-tokens {arguments.system_tokens} and "
            f"--max-new-tokens {arguments.max_new_tokens} do not fit the context of {name}, "
            f"{config.max_position_embeddings}; lower one of them"
        )
    request = ModelRequest(**asked_model(arguments, name, config, path))
    request.check_device(rows, option="--batch-size")
    return request, modes, rows


def _loads(arguments: argparse.Namespace) -> list[float]:
    if arguments.load is None:
        return []
    if arguments.rate is not None:
        raise UsageError("--load takes the rate from the run of all at once; leave --rate out")
    try:
        loads = [float(share) for share in arguments.load.split(",")]
    except ValueError:
        loads = [math.nan]
    if not all(0 < share < math.inf for share in loads):
        raise UsageError(f"--load {arguments.load} must be numbers of more than 0 with commas between, such as 0.5,0.8")
    return loads


def _conversations(arguments: argparse.Namespace) -> list[Conversation]:
    if arguments.prompt_file is None:
        return sharegpt(2 * arguments.num_prompts)  # some are too long
    prompts = read_prompt_file(arguments.prompt_file)
    if not prompts:
        raise UsageError(f"--prompt-file {arguments.prompt_file} has no prompt")
    return [Conversation(prompt) for prompt in prompts]


def _measure(
    model: LanguageModel,
    modes: Sequence[str],
    rows: Sequence[int],
    conversations: Sequence[Conversation],
    arguments: argparse.Namespace,
    failed: dict[str, None],
):
    from qspec_jax.bench.throughput.measure import ready_batch
    from qspec_jax.decoding.chunks import fitting_capacity

    asked = []
    for mode in modes:
        plan = model.plan(mode, **_plan_options(arguments, mode))
        requests = fitting_requests(model, plan, conversations, arguments, failed)
        capacity = fitting_capacity(max(len(request.token_ids) + request.max_new_tokens for request in requests))
        if reason := missing_drafts(plan, capacity):
            say(reason)
        asked.append((plan.in_cache(capacity), requests, capacity))
    for count in rows:
        burst_s = arguments.burst or (_BURST_S if arguments.rate is None else _BURST_S_AT_A_RATE)
        ready: list[ReadyBatch] = []
        for repeat, (place, mode) in itertools.product(range(arguments.repeats), enumerate(modes)):
            if repeat == 0:
                plan, requests, capacity = asked[place]
                say(f"{mode}, batch of {count}, {len(requests)} requests ...")
                ready.append(ready_batch(model, plan, requests, rows=count, capacity=capacity, burst_s=burst_s))
            one = ready[place].serve(burst_s, arguments.rate)
            yield one
            for share in arguments.load:
                burst_at_a_rate_s = arguments.burst or _BURST_S_AT_A_RATE
                yield ready[place].serve(burst_at_a_rate_s, share * one.requests_per_s, load=share)


def _plan_options(arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    return {**shared.plan_options(arguments), **verification(mode, arguments.verify)}


def fitting_requests(
    model: LanguageModel,
    plan: Plan,
    conversations: Sequence[Conversation],
    arguments: argparse.Namespace,
    failed: dict[str, None],
) -> list[Request]:
    """The first conversations whose prompts are short enough, as requests; ``failed`` notes those that cannot run."""
    from qspec_jax.engine.requests import Request

    limit, found, noise = arguments.max_prompt_tokens, [], random.Random(0)
    systems = [_noise_tokens(noise, model, arguments.system_tokens) for _ in range(arguments.system_prompts)]
    too_long = 0
    for number, one in enumerate(conversations, 1):
        prompt, new_tokens = _prompt_and_limit(model, one, arguments, noise)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "sampling": {"ignore_eos": arguments.ignore_eos}}
        request: Request | GenerationResult = model.attempt(prompt, plan, **options)
        if isinstance(request, Request) and len(request.token_ids) <= limit:
            system = systems[len(found) % len(systems)]
            prefix_length = request.prefix_length + len(system)
            prefix_length -= prefix_length % model.intake.restart
            token_ids = [*system, *request.token_ids]
            found.append(dataclasses.replace(request, token_ids=token_ids, prefix_length=prefix_length))
        elif isinstance(request, Request) or _num_tokens(model, prompt) > limit:  # perhaps for the context, too
            too_long += 1
        else:
            failed[f"prompt {number} failed: {request.error}"] = None
        if len(found) == arguments.num_prompts:
            break
    if not found:
        raise UsageError(next(iter(failed), f"no prompt has at most --max-prompt-tokens {limit}; raise it"))
    if too_long:
        say(f"{too_long} prompts of more than --max-prompt-tokens {limit} are left out")
    return found


def _prompt_and_limit(
    model: LanguageModel, one: Conversation, arguments: argparse.Namespace, noise: random.Random
) -> tuple[Any, int]:
    """The prompt of a conversation, or noise as long as it, and how many tokens are to follow."""
    prompt, answer_tokens = one.prompt, arguments.max_new_tokens
    if model.tokenizer is None:
        length = len(str(prompt)) // _CHARACTERS_PER_TOKEN + 1
        prompt = _noise_tokens(noise, model, min(length, arguments.max_prompt_tokens + 1))
        answer_tokens = arguments.max_new_tokens if one.answer is None else len(one.answer) // _CHARACTERS_PER_TOKEN
    elif one.answer is not None:
        answer_tokens = len(model.tokenizer.encode(one.answer))
    return prompt, max(1, min(arguments.max_new_tokens, answer_tokens))


def _num_tokens(model: LanguageModel, prompt: Any) -> int:
    """Of a prompt that cannot run; 0 where it has none."""
    try:
        ((token_ids,),) = model.intake.encode_prompts([prompt])[1:]
    except UsageError:
        return 0
    return len(token_ids)


def _noise_tokens(noise: random.Random, model: LanguageModel, length: int) -> list[int]:
    return [noise.randrange(model.config.vocab_size) for _ in range(length)]


def draft_width(plans: Iterable[Plan]) -> int:
    """How wide the column is that names the drafts of some plans."""
    return max(6, *(len(plan.draft_source or "-") for plan in plans))


def table_head(width: int) -> str:
    """The names of the columns; ``width`` is that of :func:`draft_width`."""
    return _COLUMNS.format(
        *("mode", "drafts", "gamma", "batch", "rate", "tokens/s", "per req.", "TTFT50", "TTFT99", "ITL50", "ITL99"),
        *("accept", "occup.", "gap", "prefill", "reused", "sec.", "compile s"),
        drafts=width,
    )


def table_row(one: ThroughputRun, width: int) -> str:
    """A run as a line: tokens per second in total and of the median request, latencies in milliseconds."""
    speeds, first, between = one.request_tokens_per_s, one.first_token_s, one.inter_token_s
    return _COLUMNS.format(
        *(one.mode, one.draft or "-", one.draft_length or "-", one.rows, _number(one.rate, ".3g")),
        *(f"{one.tokens_per_s:.1f}", _number(speeds.get("p50"), ".1f")),
        *(_milliseconds(first, "p50"), _milliseconds(first, "p99")),
        *(_milliseconds(between, "p50"), _milliseconds(between, "p99")),
        *(_number(one.acceptance_rate, ".2f"), _number(one.occupancy, ".0%"), f"{one.gap_share:.1%}"),
        *(f"{one.prefill_share:.0%}", f"{one.num_reused_tokens / one.num_prompt_tokens:.0%}"),
        *(f"{one.seconds:.1f}", f"{one.compile_s:.1f}"),
        drafts=width,
    )


def choice_rows(one: ThroughputRun) -> list[str]:
    """Of a run that chose, a line for each plan that ran: its share of the time, what it yielded, and why."""
    if one.draft != AUTO:
        return []
    total_s = sum(choice.seconds for choice in one.choices.values()) or 1.0
    return [
        f"  {name}: {choice.seconds / total_s:.0%} of the time in {choice.bursts} bursts, "
        f"{_number(choice.tokens_per_cycle, '.2f')} tokens per cycle; {choice.why}"
        for name, choice in sorted(one.choices.items(), key=lambda item: -item[1].seconds)
    ]


def median_rows(runs: Sequence[ThroughputRun]) -> list[str]:
    """Of runs that were repeated, a line for what was measured alike: the median of tokens per second, and the ends."""
    alike: dict[tuple[Any, ...], list[float]] = {}
    for one in runs:
        place = f" at {one.load:g} of the load" if one.load else ""
        alike.setdefault((one.mode, one.draft, one.rows, place), []).append(one.tokens_per_s)
    return [
        f"median of {len(speeds)}: {mode}{f' {draft}' if draft not in (None, mode) else ''}, batch {rows}{place}: "
        f"{statistics.median(speeds):.1f} tokens/s ({min(speeds):.1f} to {max(speeds):.1f})"
        for (mode, draft, rows, place), speeds in alike.items()
    ]


def plot_throughput(path: Path, runs: Sequence[ThroughputRun], *, title: str) -> None:
    """Draws tokens per second over the size of the batch, a line per mode, into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for mode in dict.fromkeys(one.mode for one in runs):
        speeds: dict[int, list[float]] = {}
        for one in runs:
            if one.mode == mode and one.load is None:
                speeds.setdefault(one.rows, []).append(one.tokens_per_s)
        points = sorted((rows, statistics.median(values)) for rows, values in speeds.items())
        axes.plot([rows for rows, _ in points], [speed for _, speed in points], marker="o", label=mode)
    axes.set(xlabel="batch size", ylabel="tokens per second, all requests")
    axes.set_title(title, fontsize="small")
    axes.grid(visible=True, alpha=0.2)
    axes.legend(fontsize="small")
    write_picture(path, figure, dpi=150)


def _milliseconds(percentiles: dict[str, float], name: str) -> str:
    return _number(1e3 * percentiles[name] if name in percentiles else None, ".0f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
