"""``python -m qspec_jax.bench speedup``: where speculation wins, by batch and context. Parses and prints."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.bench.decode.request import NEW_TOKENS
from qspec_jax.bench.models import ModelRequest, asked_model, chosen_model
from qspec_jax.bench.presets import PRESETS
from qspec_jax.commands import options as shared
from qspec_jax.commands.output import say, show
from qspec_jax.commands.processes import add_processes
from qspec_jax.commands.prompt_files import read_prompt_file
from qspec_jax.decoding.plan import AUTO_LENGTHS, DecodingPlan, Lookup, drafts_that_gain, static
from qspec_jax.errors import UsageError
from qspec_jax.files.whole import write_picture

if TYPE_CHECKING:
    from qspec_jax.bench.speedup.grid import Cell
    from qspec_jax.engine.language_model import LanguageModel

_DESCRIPTION = """
For every batch and context: what plain decoding at the target serves, the fastest plan, what a draft step (c_d) and a
verification (c_v) take of a plain step, the tokens that a cycle yields (E), and the speed-up E / (gamma c_d + c_v) with
its limit by bytes. E follows from an acceptance that is given, or measured on the prompts of a real model.
"""
_COLUMNS = "{:>6} {:>8} {:>10}  {:<{plan}} {:>5} {:>5} {:>5} {:>8} {:>6}"
_NOT = "plain, not "


def add_command(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = commands.add_parser("speedup", help="map where speculation wins", description=_DESCRIPTION)
    add = parser.add_argument
    shared.add_preset(parser, PRESETS)
    add("--batch", default="1,4,16,64", metavar="B,...", help="sequences (default: 1,4,16,64)")
    add("--context", default="512,2048,8000", metavar="N,...", help="tokens of each (default: 512,2048,8000)")
    shared.add_draft(parser)
    lengths = ",".join(map(str, AUTO_LENGTHS))
    add("--draft-length", default=lengths, metavar="N,...", help=f"drafts per cycle (default: {lengths})")
    contexts = "tokens of the cache that drafts read: full, auto, or numbers (default: full,auto)"
    add("--draft-context", default="full,auto", metavar="N,...", help=contexts)
    chances = "chance of the first, second, ... draft, once those before were accepted (default: 0.95 of each)"
    add("--acceptance", metavar="A,...", help=chances)
    looked_up = "the same of drafts that are looked up in the text (default: these are left out)"
    add("--lookup-acceptance", metavar="A,...", help=looked_up)
    add("--prompt-file", type=Path, metavar="FILE", help="prompts to measure the acceptance of a model with instead")
    shared.add_verify(parser)
    shared.add_kernels(parser)
    shared.add_kv(parser)
    shared.add_mesh(parser)
    shared.add_group_size(parser, "inputs per weight scale, as in decode")
    shared.add_asymmetric(parser)
    shared.add_dtype(parser)
    add("--repeats", type=int, default=3, metavar="N", help="timed dispatches, of which the median counts (default: 3)")
    add("--steps", type=int, metavar="N", help="repetitions in a dispatch (default: a quarter of a second of them)")
    shared.add_report(parser, "the speed-up by batch and context")
    add_processes(parser)
    shared.add_debug(parser)
    parser.set_defaults(run=run)


@dataclasses.dataclass(frozen=True)
class SpeedupRequest(ModelRequest):
    """What is asked for, checked.

    Attributes:
        batches, contexts, lengths, draft_contexts, draft: what to combine.
        chances, lookup_chances: by place; the first is None where prompts tell, the second where nobody looks up.
        prompts: to measure acceptance with.
    """

    batches: Sequence[int]
    contexts: Sequence[int]
    lengths: Sequence[int]
    draft_contexts: Sequence[str | int]
    draft: str
    chances: Sequence[float] | None
    lookup_chances: Sequence[float] | None
    prompts: Sequence[str]

    def plans(self, model: LanguageModel) -> list[DecodingPlan]:
        """All plans with drafts."""
        target = static(model.plan(draft_length=1, verify=self.verify)).verify
        combined = itertools.product([self.draft], self.draft_contexts)
        gaining = drafts_that_gain(combined, target.name, draft_head=model.draft_head)
        drafting = [
            static(model.plan(draft=draft, draft_length=length, draft_context=context, verify=self.verify))
            for (draft, context), length in itertools.product(gaining, self.lengths)
        ]
        looking_up = [] if self.lookup_chances is None else [DecodingPlan(target, Lookup(), n) for n in self.lengths]
        return [*drafting, *looking_up]


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 if something is missing."""
    request = read_request(arguments)
    from qspec_jax.bench.decode.parts import Setting
    from qspec_jax.bench.description import describe_model
    from qspec_jax.bench.environment import environment, header
    from qspec_jax.bench.speedup.grid import measure_cell

    facts = environment(arguments.argv)
    show(header(facts))
    say(f"{request.name}: {'making' if request.path is None else 'loading'} weights ...")
    model = request.load(floating_point=False)
    report = {"environment": facts, "model": describe_model(model, synthetic=request.path is None), "cells": []}
    plans = request.plans(model)
    tokens_per_cycle = _tokens_per_cycle(model, plans, request)
    width = plan_width(plans)
    show(table_head(width))
    cells: list[Cell] = []
    for batch, context in itertools.product(request.batches, request.contexts):
        setting = Setting.create(batch=batch, context=context, longest_draft=max(request.lengths))
        settings = {"repeats": arguments.repeats, "repetitions": arguments.steps}
        cells.append(measure_cell(model, plans, setting, tokens_per_cycle, **settings))
        report["cells"] = [cell.to_dict() for cell in cells]
        options.write_report(arguments.json, report)
        show(table_row(cells[-1], width))
    show(f"\n{matrix(cells)}")
    if arguments.plot is not None:
        plot_cells(arguments.plot, cells, title=f"{request.name}, {facts['device']}, jax {facts['jax']}")
    for reason in dict.fromkeys(cell.reason for cell in cells if cell.reason):
        say(f"-: {reason}")
    return 1 if any(cell.reason for cell in cells) else 0


def read_request(arguments: argparse.Namespace) -> SpeedupRequest:
    """Checks everything that can be wrong before a weight is made or a program compiled.

    Raises:
        UsageError: an argument makes no sense.
        CheckpointError, UnsupportedModelError: a checkpoint cannot be opened.
    """
    options.check_report(arguments)
    options.check_at_least(arguments.repeats, 1, option="--repeats")
    options.check_at_least(arguments.steps, 1, option="--steps")
    lengths = options.parse_numbers(arguments.draft_length, option="--draft-length")
    shared.check_draft_length(max(lengths))
    contexts = options.parse_numbers(arguments.context, option="--context")
    prompts = [] if arguments.prompt_file is None else read_prompt_file(arguments.prompt_file)
    if prompts and arguments.model is None:
        raise UsageError("--prompt-file measures the acceptance of a real model; give --model")
    if prompts and arguments.acceptance is not None:
        raise UsageError("--acceptance and --prompt-file both say what drafts are worth; give one of them")
    given = parse_chances(arguments.acceptance or "0.95", option="--acceptance")
    looked_up = arguments.lookup_acceptance
    shared.check_weights(arguments, ["qspec"])
    draft_contexts = [shared.parse_draft_context(one) for one in options.split_list([arguments.draft_context])]
    shared.check_drafts(arguments, [arguments.draft], draft_contexts, ["qspec"])
    name, config, path = chosen_model(arguments)
    if max(contexts) + max(lengths) + 1 > config.max_position_embeddings:
        raise UsageError(
            f"--context {max(contexts)} and {max(lengths) + 1} more tokens do not fit the context of {name}, "
            f"{config.max_position_embeddings}"
        )
    request = SpeedupRequest(
        **asked_model(arguments, name, config, path),
        batches=options.parse_numbers(arguments.batch, option="--batch"),
        contexts=contexts,
        lengths=lengths,
        draft_contexts=draft_contexts,
        draft=arguments.draft,
        chances=None if prompts else given,
        lookup_chances=None if looked_up is None else parse_chances(looked_up, option="--lookup-acceptance"),
        prompts=prompts,
    )
    request.check_device(request.batches, option="--batch")
    return request


def parse_chances(text: str, *, option: str) -> list[float]:
    """Numbers from 0 to 1 with commas between them.

    Raises:
        UsageError: one is no such number, or there is none.
    """
    try:
        chances = [float(part) for part in options.split_list([text])]
    except ValueError:
        chances = []
    if not chances or not all(0 <= chance <= 1 for chance in chances):
        raise UsageError(f"{option} {text} cannot be read; write chances from 0 to 1, such as {option} 0.95,0.9")
    return chances


def _tokens_per_cycle(
    model: LanguageModel, plans: Sequence[DecodingPlan], request: SpeedupRequest
) -> Callable[[DecodingPlan], float | None]:
    from qspec_jax.bench.speedup.grid import expected_of

    measured: dict[tuple[str, int], float] = {}
    if request.chances is None:
        from qspec_jax.evaluation.scores import score_drafts, unscored

        say(f"acceptance on {len(request.prompts)} prompts ...")
        drafting = [plan for plan in plans if plan.draft_view is not None]

        def refuse(place: int, reason: str) -> None:
            raise UsageError(f"prompt {place + 1} failed: {reason}; leave it out of --prompt-file")

        settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "on_failure": refuse}
        scores = score_drafts(model, request.prompts, drafting, **settings)
        measured = {(score.draft, score.draft_length): score.tokens_per_cycle for score in scores if score.num_drafted}
        for draft in unscored(drafting, scores):
            say(f"{options.no_acceptance(draft)}; it is left out")

    def tokens_per_cycle(plan: DecodingPlan) -> float | None:
        chances = request.lookup_chances if plan.draft_view is None else request.chances
        if chances is None:
            return measured.get((str(plan.draft_source), plan.draft_length))
        return expected_of(chances, plan.draft_length)

    return tokens_per_cycle


def plan_width(plans: Iterable[DecodingPlan]) -> int:
    """How wide the column is that names one of some plans."""
    return max([18, *(len(f"{_NOT}{plan.label}") for plan in plans)])


def table_head(width: int) -> str:
    """The names of the columns; ``width`` is that of :func:`plan_width`."""
    names = ("batch", "context", "tokens/s", "fastest", "c_d", "c_v", "E", "speed-up", "limit")
    return _COLUMNS.format(*names, plan=width)


def table_row(cell: Cell, width: int) -> str:
    """A setting as a line: the fastest plan, or the one that comes nearest to plain decoding."""
    plain = "-" if cell.tokens_per_s is None else f"{cell.tokens_per_s:.1f}"
    nearest = max(cell.gains, key=lambda gain: gain.speedup, default=None)
    if nearest is None:
        return _COLUMNS.format(cell.batch, cell.context, plain, "-", *["-"] * 5, plan=width).rstrip()
    name = nearest.name if cell.best is not None else f"{_NOT}{nearest.name}"
    ratios = (f"{nearest.draft_ratio:.2f}", f"{nearest.verify_ratio:.2f}", f"{nearest.tokens_per_cycle:.2f}")
    return _COLUMNS.format(
        cell.batch, cell.context, plain, name, *ratios, f"{nearest.speedup:.2f}", f"{nearest.limit:.2f}", plan=width
    )


def matrix(cells: Sequence[Cell]) -> str:
    """The speed-up of the best choice, batches down and contexts across; 1.00 is plain decoding."""
    batches, contexts = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("batch", "context"))
    found = {(cell.batch, cell.context): cell for cell in cells}
    lines = ["speed-up of the fastest plan over plain decoding, which is 1.00"]
    lines.append("".join([f"{'batch':>8}", *(f"{context:>9}" for context in contexts)]))
    for batch in batches:
        row = [found[batch, context] for context in contexts]
        texts = ["-" if cell.plain_ms is None else f"{cell.speedup:.2f}" for cell in row]
        lines.append("".join([f"{batch:>8}", *(f"{text:>9}" for text in texts)]))
    return "\n".join(lines)


def plot_cells(path: Path, cells: Sequence[Cell], *, title: str) -> None:
    """Draws the speed-up as a heat map, with the name of the fastest plan in each cell, into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches, contexts = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("batch", "context"))
    found = {(cell.batch, cell.context): cell for cell in cells}
    speedups = [[found[batch, context].speedup for context in contexts] for batch in batches]
    figure = Figure(figsize=(2 + 1.4 * len(contexts), 1.5 + 0.8 * len(batches)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(speedups, vmin=1.0, vmax=max(1.5, *(max(row) for row in speedups)), cmap="YlGn", aspect="auto")
    for (row, batch), (column, context) in itertools.product(enumerate(batches), enumerate(contexts)):
        cell = found[batch, context]
        name = "plain" if cell.best is None else cell.best.name
        axes.text(column, row, f"{cell.speedup:.2f}\n{name}", ha="center", va="center", fontsize="x-small")
    axes.set_xticks(range(len(contexts)), [str(context) for context in contexts])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set(xlabel="tokens in the cache of each sequence", ylabel="sequences")
    axes.set_title(title, fontsize="small")
    figure.colorbar(image, label="speed-up over plain decoding")
    write_picture(path, figure, dpi=150)
