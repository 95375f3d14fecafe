"""``python -m qspec_jax.bench decode``: what a decode step and a QSpec cycle take, and what speculation can gain.

Parses and prints; :mod:`qspec_jax.bench.decode.measure` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.bench.decode.plot import plot_speedup
from qspec_jax.bench.decode.request import NEW_TOKENS, DecodeRequest, fitting_prompts, read_request
from qspec_jax.bench.decode.speedup import Speculation
from qspec_jax.bench.decode.tables import (
    breakdown_table,
    model_line,
    name_widths,
    speculation_table,
    table_head,
    table_row,
)
from qspec_jax.bench.options import no_acceptance, write_report
from qspec_jax.bench.presets import PRESETS
from qspec_jax.commands import options as shared
from qspec_jax.commands.output import say, show
from qspec_jax.commands.processes import add_processes
from qspec_jax.errors import UsageError
from qspec_jax.model.config import WHOLE_ROW

if TYPE_CHECKING:
    from qspec_jax.bench.decode.measure import Measurement
    from qspec_jax.bench.decode.parts import Part
    from qspec_jax.engine.language_model import LanguageModel
    from qspec_jax.evaluation.scores import DraftScore

_DEFAULT_MODES = "w4a16,w4a8,w4a4,qspec"
_DESCRIPTION = """
Milliseconds of a plain step at each precision, of a draft step, of the verification of a draft and of a whole QSpec
cycle, each repeated by the generation loop on the device at a fixed context; their bytes against the copy bandwidth
measured in the same run; and the speed-up over plain decoding at the target by acceptance. Weights are synthetic
unless a model is given, whose acceptance is then measured as well.
"""


def add_command(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = commands.add_parser("decode", help="time decode steps and QSpec cycles", description=_DESCRIPTION)
    add = parser.add_argument
    shared.add_preset(parser, PRESETS)
    add("--batch", default="1", metavar="B,...", help="sequences (default: 1)")
    add("--context", default="512", metavar="N,...", help="tokens in the cache of each (default: 512)")
    modes = f"{_DEFAULT_MODES.replace(',', ', ')}, lookup: drafts"
    modes += " looked up in the text, w8a16, and float: weights in floating point (default: all but these three)"
    add("--mode", default=_DEFAULT_MODES, metavar="MODE,...", help=modes)
    add("--draft", default="auto", metavar="P,...", help="precisions: auto, w4a16, w4a8, w4a4 (default: auto)")
    add("--draft-length", default="3", metavar="N,...", help="drafts per cycle (default: 3)")
    context = "tokens of the cache that drafts read: full, auto, or numbers, as in generate (default: full)"
    add("--draft-context", default="full", metavar="N,...", help=context)
    shared.add_verify(parser)
    shared.add_kernels(parser)
    shared.add_kv(parser)
    shared.add_mesh(parser)
    group = "inputs per weight scale (default: of a model, as in generate; of a preset, the largest that divides them)"
    shared.add_group_size(parser, group)
    shared.add_asymmetric(parser)
    hadamard = f"synthetic weights of a rotated model: values of each transform before down, or {WHOLE_ROW}"
    add("--hadamard-block", metavar="SIZE", help=hadamard)
    shared.add_dtype(parser)
    add("--prompt-file", type=Path, metavar="FILE", help="prompts to measure the acceptance of a model with")
    add("--repeats", type=int, default=5, metavar="N", help="timed dispatches, of which the median counts (default: 5)")
    add("--steps", type=int, metavar="N", help="repetitions in a dispatch (default: a quarter of a second of them)")
    add("--breakdown", action="store_true", help="print the kernels of every plain step; needs CUPTI")
    shared.add_report(parser, "speed-up over acceptance")
    add_processes(parser)
    shared.add_debug(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 if something failed."""
    request = read_request(arguments)
    from qspec_jax.bench.environment import environment, header
    from qspec_jax.bench.kernels.ceilings import measure_copy
    from qspec_jax.bench.timing import WALL_NOTICE, kernel_clock_works

    if arguments.breakdown and not kernel_clock_works():
        raise UsageError("--breakdown needs an NVIDIA GPU whose profiler (CUPTI) works; leave it out")
    facts = environment(arguments.argv)
    show(header(facts))
    if not kernel_clock_works():
        show(f"{WALL_NOTICE}; idle: -")
    say("copy bandwidth ...")
    report = _Report(arguments, facts, request, measure_copy(repeats=arguments.repeats))
    for modes in request.passes(request.modes):
        gc.collect()  # the other model, whose modules refer to each other
        measure(request, modes, report)
    if report.speculations:
        show(speculation_table(report.speculations))
    if arguments.plot:
        title = f"{request.name}, {facts['device']}, jax {facts['jax']}"
        plot_speedup(arguments.plot, report.speculations, title=title)
    return report.complain()


def measure(request: DecodeRequest, modes: Sequence[str], report: _Report) -> None:
    """Loads the model that the modes need, and measures every batch and context."""
    from qspec_jax.bench.decode.measure import measure_parts
    from qspec_jax.bench.decode.parts import Setting, decoding_parts
    from qspec_jax.evaluation.scores import score_drafts, unscored

    say(f"{request.name}: {'making' if request.path is None else 'loading'} weights ...")
    model = request.load(floating_point=list(modes) == ["float"] and request.verify != "float")
    parts = decoding_parts(
        model,
        modes,
        drafts=request.drafts,
        draft_lengths=request.draft_lengths,
        draft_contexts=request.draft_contexts,
        verify=request.verify,
    )
    plans = [part.plan for part in parts if part.name == "cycle"]
    prompts = fitting_prompts(model, request) if plans else []
    report.begin(model, parts, synthetic=request.path is None)
    for batch in request.batches:
        for context in request.contexts:
            setting = Setting.create(batch=batch, context=context, longest_draft=request.longest_draft)
            for one in measure_parts(model, parts, setting, repeats=report.repeats, repetitions=report.steps):
                report.add(one)
    if prompts:
        say(f"acceptance on {len(prompts)} prompts ...")
        scores = score_drafts(model, prompts, plans, max_new_tokens=NEW_TOKENS)
        report.accept([score for score in scores if score.num_drafted])
        for draft in unscored(plans, scores):
            say(no_acceptance(draft))


class _Report:
    """Prints rows as they come, and rewrites the JSON each time, so that a killed run leaves what it measured."""

    def __init__(self, arguments: argparse.Namespace, facts: Mapping[str, Any], request: DecodeRequest, copy: float):
        self.path: Path | None = arguments.json
        self.breakdown: bool = arguments.breakdown
        self.repeats: int = arguments.repeats
        self.steps: int | None = arguments.steps
        self.facts, self.request, self.copy_tb_per_s = facts, request, copy
        self.models: list[dict[str, Any]] = []
        self.widths: Mapping[str, int] = {}
        self.measurements: list[Measurement] = []
        self.accepted: dict[tuple[str, int], DraftScore] = {}
        self.speculations: list[Speculation] = []

    def begin(self, model: LanguageModel, parts: Sequence[Part], *, synthetic: bool) -> None:
        from qspec_jax.bench.description import describe_model

        self.models.append(describe_model(model, synthetic=synthetic))
        show(model_line(self.models[-1], self.copy_tb_per_s))
        self.widths = name_widths(parts)
        show(table_head(self.widths))

    def add(self, one: Measurement) -> None:
        self.measurements.append(one)
        self._update()
        show(table_row(one, self.copy_tb_per_s, self.widths, on_mesh=self.request.mesh is not None))
        if self.breakdown and one.part == "step":
            show(breakdown_table(one))

    def accept(self, scores: Sequence[DraftScore]) -> None:
        self.accepted = {(score.draft, score.draft_length): score for score in scores}
        self._update()

    def complain(self) -> int:
        """Names what was refused, once per reason, and what failed; the exit code."""
        for reason in dict.fromkeys(one.reason for one in self.measurements if one.status == "unsupported"):
            say(f"-: {reason}")
        failed = [one for one in self.measurements if one.status == "failed"]
        for one in failed:
            say(f"failed: {one.part} {one.precision} batch {one.batch} context {one.context}: {one.reason}")
        return 1 if failed else 0

    def _update(self) -> None:
        from qspec_jax.bench.decode.measure import speculations

        self.speculations = speculations(self.measurements, self.accepted)
        report = {
            "environment": self.facts,
            "config": dataclasses.asdict(self.request.config),
            "models": self.models,
            "copy_tb_per_s": self.copy_tb_per_s,
            "measurements": [one.to_dict(self.copy_tb_per_s) for one in self.measurements],
            "speculation": [one.to_dict() for one in self.speculations],
        }
        write_report(self.path, report)
