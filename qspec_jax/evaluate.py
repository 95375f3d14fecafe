"""``python -m qspec_jax.evaluate``: perplexity by precision, and acceptance by draft. Parses and prints only.

Tables or JSON go to the standard output, progress to the standard error stream. Exit codes: 0 success, 1 failure (of
one prompt, too, which is then in no figure), 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qspec_jax.commands import options
from qspec_jax.commands.output import is_terminal, require_standard_output, say, show, show_json
from qspec_jax.commands.processes import add_processes, run_together
from qspec_jax.commands.prompt_files import PromptLine, read_prompts_alone
from qspec_jax.commands.run import exit_code, keep_compiled_programs, leave
from qspec_jax.decoding.plan import MAX_DRAFT_LENGTH, drafts_that_gain
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.files.text import STANDARD_INPUT, read_text
from qspec_jax.model.config import KV_NAMES
from qspec_jax.weights.resolve import check_model_name

if TYPE_CHECKING:
    from qspec_jax.decoding.plan import DecodingPlan
    from qspec_jax.evaluation.scores import ModelScore

PRECISIONS = ("w4a16", "w4a8", "w4a4")
DRAFTS = ("w4a8", "w4a4", "w4a16")
_USUAL_DRAFTS = DRAFTS[:2]
_WINDOW = "window-"
_Item = TypeVar("_Item")


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.evaluate",
        description="Perplexity of a text at every precision, against a checkpoint in floating point, and the "
        "acceptance of drafts on prompts.",
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        help="as in generate (default: SmolLM2-135M-Instruct); given several times, models are compared, a line each",
    )
    add("--baseline", metavar="MODEL", help="to compare with in floating point (default: the model itself)")
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="a text to score; give this, --prompt-file or both; - is the standard input, of either",
    )
    prompts = 'a prompt per line, or JSONL with {"prompt": TEXT}; lines with a "kind" are scored by kind too'
    add("--prompt-file", type=Path, metavar="FILE", help=prompts)
    add("--precisions", default=",".join(PRECISIONS), metavar="P,...", help="default: %(default)s")
    add("--max-tokens", type=int, default=20000, metavar="N", help="of the text (default: 20000)")
    add("--context", type=int, default=512, metavar="N", help="tokens per window of the text (default: 512)")
    add("--drafts", default=",".join(_USUAL_DRAFTS), metavar="P,...", help="also w4a16 (default: %(default)s)")
    add("--draft-lengths", default="1-7", metavar="N-M", help="default: 1-7; also 3 or 1,3,5")
    contexts = "tokens of the cache that drafts read: full, auto, numbers, or window-N for the newest N (default: full)"
    add("--draft-contexts", default="full", metavar="N,...", help=contexts)
    add("--max-new-tokens", type=int, default=64, metavar="N", help="per prompt (default: 64)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts that run together (default: 8)")
    options.add_verify(parser)
    options.add_dtype(parser)
    options.add_group_size(parser, "as in generate")
    options.add_kernels(parser)
    options.add_kv(parser)
    options.add_mesh(parser)
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--plot", type=Path, metavar="FILE.png", help="draw acceptance by position; needs matplotlib")
    add("--outlier-plot", type=Path, metavar="FILE.png", help="draw how loud the channels in front of the MLPs are")
    add_processes(parser)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser(), argv)


def run(arguments: argparse.Namespace) -> int:
    """Checks the arguments, loads the models and scores them; 1 if a prompt or a figure failed."""
    return run_together("evaluate", _run, arguments)


def _run(arguments: argparse.Namespace) -> int:
    require_standard_output("send it to a file")
    request = _request(arguments)
    say("starting ...")
    keep_compiled_programs()
    from qspec_jax.evaluation import tables

    scores = _score_each(arguments, request)
    failures = {reason: None for score in scores for reason in score.failed}
    try:
        if arguments.json:
            objects = [dataclasses.asdict(score) for score in scores]
            show_json(objects[0] if len(objects) == 1 else {"models": objects}, indent=1)
        else:
            show("\n\n".join(_tables(scores)))
    finally:  # also where nobody reads the tables
        for reason in failures:
            say(reason)
        if arguments.plot is not None:
            tables.plot_acceptance(scores, arguments.plot)
    if arguments.outlier_plot is not None:
        _plot_outliers(arguments, request)
    return 1 if failures else 0


def _score_each(arguments: argparse.Namespace, request: _Request) -> list[ModelScore]:
    """A score of each model; of several, one that cannot be scored has an empty one, and the others are kept.

    Raises:
        QSpecError: none can be scored.
    """
    from qspec_jax.evaluation.scores import ModelScore

    names = arguments.model or [None]
    scores: list[ModelScore] = []
    for name in names:
        try:
            scores.append(_score(name, arguments, request))
        except QSpecError as error:
            if len(scores) == len(names) - 1 and not any(score.text or score.drafts for score in scores):
                for score in scores:
                    say(*score.failed)
                raise
            scores.append(ModelScore(str(name), [], [], failed=[f"model {name} failed: {error}"]))
    return scores


@dataclasses.dataclass(frozen=True)
class _Request:
    """What is to be scored, checked."""

    precisions: list[str]
    drafts: list[str]
    draft_lengths: list[int]
    draft_contexts: list[str | int]
    text: str | None
    prompts: list[PromptLine]

    def plans(self, model: Any, capacity: int) -> list[DecodingPlan]:
        """All combinations of the drafts that are asked for, each once and as what it reads in caches of a capacity.

        On some devices ``auto`` is ``full``, and of a small cache any budget is. Drafts that are none there stay.
        """
        from qspec_jax.evaluation.scores import plans_in_cache

        target = model.plan("qspec").verify.name
        read = itertools.product(self.drafts, self.draft_contexts)
        gaining = drafts_that_gain(read, target, draft_head=model.draft_head)
        combined = itertools.product(gaining, self.draft_lengths)
        plans = [_plan(model, *one, length) for one, length in combined]
        return plans_in_cache(plans, capacity)

    def capacity(self, model: Any, max_new_tokens: int) -> int:
        """Positions of the caches that prompts run in. Refuses those of which none can, before a text is scored.

        Raises:
            UsageError: the error of the first of them.
        """
        from qspec_jax.decoding.chunks import fitting_capacity
        from qspec_jax.engine.intake import require_some
        from qspec_jax.engine.requests import Request

        plan = model.plan("w4a16")
        runnable = [line.prompt for line in self.prompts if line.error is None]
        attempts = [model.attempt(prompt, plan, max_new_tokens=max_new_tokens) for prompt in runnable]
        require_some(attempts)
        return fitting_capacity(
            max(len(one.token_ids) + max_new_tokens for one in attempts if isinstance(one, Request))
        )


def _plan(model: Any, draft: str, context: str | int, length: int) -> DecodingPlan:
    """That of a name, or one with a window of the cache, which has none."""
    if not isinstance(context, str) or not context.startswith(_WINDOW):
        return model.plan(draft=draft, draft_context=context, draft_length=length)
    import qspec_jax

    plan = model.plan(draft=draft, draft_length=length)
    window = int(context.removeprefix(_WINDOW))
    view = dataclasses.replace(plan.draft.in_cache(0), cache_window=window)  # and no budget
    return qspec_jax.DecodingPlan(plan.verify, view, length)


def _request(arguments: argparse.Namespace) -> _Request:
    precisions = _names(arguments.precisions, (*PRECISIONS, "w8a16"), "--precisions")
    drafts = _names(arguments.drafts, DRAFTS, "--drafts")
    lengths = draft_lengths(arguments.draft_lengths)
    contexts = [_draft_context(text.strip()) for text in arguments.draft_contexts.split(",")]
    if arguments.text == arguments.prompt_file == Path(STANDARD_INPUT):
        raise UsageError("--text - and --prompt-file - both read the standard input; give a file for one of them")
    text = _read_text(arguments.text)
    prompts = [] if arguments.prompt_file is None else read_prompts_alone(arguments.prompt_file)
    if prompts and all(line.error is not None for line in prompts):
        raise UsageError(f"{prompts[0].where}: {prompts[0].error}")
    if text is None and not prompts:
        raise UsageError("there is nothing to evaluate; give --text FILE, --prompt-file FILE or both")
    options.check_positive(arguments, "max_tokens", "context", "max_new_tokens", "batch_size")
    options.check_counts(arguments, "batch_size")
    if arguments.outlier_plot is not None and text is None:
        raise UsageError("--outlier-plot shows activations on a text; give --text FILE")
    plots = {"--plot": arguments.plot, "--outlier-plot": arguments.outlier_plot}
    if asked := [option for option, path in plots.items() if path is not None]:
        _require_matplotlib(" and ".join(asked))
    options.check_plot(arguments.plot, option="--plot")
    options.check_plot(arguments.outlier_plot, option="--outlier-plot")
    for model in (*(arguments.model or ()), arguments.baseline):
        check_model_name(model)
    options.check_weights(arguments, ["qspec"])
    options.check_drafts(arguments, drafts, contexts, ["qspec"])
    if arguments.draft_model is not None and len(arguments.model or ()) > 1:
        raise UsageError("--draft-model is of one model; give one --model, or leave it out")
    return _Request(precisions, drafts, lengths, contexts, text, prompts)


def _score(name: str | None, arguments: argparse.Namespace, request: _Request) -> ModelScore:
    import qspec_jax
    from qspec_jax.evaluation.scores import ModelScore, score_drafts, score_text

    model = _load(name, arguments, options.quantization_of(arguments.group_size), arguments.kv)
    text_scores, draft_scores = [], []
    runnable = [line for line in request.prompts if line.error is None]
    failed = [_failure(request, line, line.error) for line in request.prompts if line.error is not None]
    capacity = request.capacity(model, arguments.max_new_tokens) if request.prompts else 0
    if request.text is not None:
        if model.tokenizer is None:
            raise UsageError(f"{model.name} has no tokenizer to read --text with; give a model that has one")
        text_scores = score_text(
            model,
            model.tokenizer.encode(request.text)[: arguments.max_tokens],
            precisions=[qspec_jax.Precision(precision) for precision in _precisions(request, model)],
            baseline=_baseline(name, arguments, model),
            context=arguments.context,
            progress=_progress("text"),
        )
    failed += [
        f"the perplexity of {score.name} is {score.perplexity}: its logits are no numbers, or too large"
        for score in text_scores
        if not math.isfinite(score.perplexity)
    ]
    if request.prompts:
        draft_scores = score_drafts(
            model,
            [line.prompt for line in runnable],
            request.plans(model, capacity),
            kinds=[line.kind for line in runnable],
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            progress=_progress("drafts"),
            on_failure=lambda place, reason: failed.append(_failure(request, runnable[place], reason)),
        )
    of_all = [score for score in draft_scores if score.kind is None]
    by_kind = [score for score in draft_scores if score.kind is not None]
    return ModelScore("default" if name is None else name, text_scores, of_all, by_kind, failed)


def _failure(request: _Request, line: PromptLine, reason: str) -> str:
    """What is said of a prompt that is in no score."""
    number = next(number for number, one in enumerate(request.prompts, 1) if one is line)
    return f"prompt {number} failed: {reason} ({line.where})"


def _precisions(request: _Request, model: Any) -> list[str]:
    """Those asked for, and where nobody said which, the one that verifies nested weights first."""
    is_nested = getattr(getattr(model, "quantization", None), "bits", None) == 8
    if is_nested and model.verify != "w4a16" and request.precisions == list(PRECISIONS):
        return ["w8a16", *PRECISIONS]
    if not is_nested and "w8a16" in request.precisions:
        raise UsageError(f"--precisions w8a16 reads 8-bit weights, which {model.name} has not; add --verify w8a16")
    return request.precisions


def _baseline(name: str | None, arguments: argparse.Namespace, model: Any) -> Any:
    """The model to compare with, of which nothing is rounded: the model itself if it has its floats, and its cache."""
    keeps_floats = getattr(getattr(model, "quantization", None), "keep_floats", False)
    is_its_own = keeps_floats and arguments.baseline is None and arguments.kv == KV_NAMES[0]
    return model if is_its_own else _load(arguments.baseline or name, arguments, None, KV_NAMES[0])


def _load(name: str | None, arguments: argparse.Namespace, quantization: Any, kv: str) -> Any:
    import qspec_jax

    weights: dict[str, Any] = {"verify": arguments.verify, "draft_model": arguments.draft_model}
    weights = {} if quantization is None else {**weights, **options.heads_of(arguments)}
    return qspec_jax.load(
        name,
        quantization=quantization,
        **weights,
        dtype=arguments.dtype,
        kernels=arguments.kernels,
        kv=kv,
        mesh=arguments.mesh,
        progress=is_terminal(sys.stderr),
    )


def _tables(scores: Sequence[ModelScore]) -> list[str]:
    from qspec_jax.evaluation.tables import comparison_table, draft_table, kind_table, text_table

    if len(scores) > 1:
        by_kind = [f"{score.name}\n{kind_table(score)}" for score in scores if score.drafts_by_kind]
        return [comparison_table(scores), *by_kind]
    (score,) = scores
    tables = (text_table(score.text), kind_table(score) or draft_table(score.drafts))
    return [table for table in tables if table]


def _plot_outliers(arguments: argparse.Namespace, request: _Request) -> None:
    import numpy as np

    from qspec_jax.evaluation.tables import plot_outliers
    from qspec_jax.recipes.moments import channel_maxima
    from qspec_jax.weights.resolve import open_source, open_tokenizer, resolve_model

    maxima = []
    for name in arguments.model or [None]:
        path = resolve_model(name)
        tokenizer = open_tokenizer(path)
        assert tokenizer is not None  # the text has been scored
        assert request.text is not None
        tokens = np.asarray(tokenizer.encode(request.text)[: arguments.context], np.int32)[None]
        maxima.append((name or "default", channel_maxima(open_source(path), tokens, "mlp.gate_up")))
    plot_outliers(maxima, arguments.outlier_plot)


def _draft_context(text: str) -> str | int:
    """As of ``--draft-context``, or ``window-N``.

    Raises:
        UsageError: it is neither.
    """
    size = text.removeprefix(_WINDOW)
    if size == text:
        return options.parse_draft_context(text)
    if not re.fullmatch("[0-9]{1,9}", size) or not int(size):
        raise UsageError(f"--draft-contexts {text}: use {_WINDOW}N for the newest N tokens, 1 at least")
    return text


def draft_lengths(text: str) -> list[int]:
    """``"1-7"``, ``"3"`` and ``"1,3,5"`` as numbers, each once.

    Raises:
        UsageError: it is none of these, or a length is not between 1 and 16.
    """
    lengths: list[int] = []
    for part in text.split(","):
        match = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        first, last = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
        if match is None or last < first:
            raise UsageError(f"--draft-lengths {text!r} is not like 1-7, 3 or 1,3,5")
        if first < 1 or last > MAX_DRAFT_LENGTH:
            raise UsageError(f"--draft-lengths {text!r}: lengths must be between 1 and {MAX_DRAFT_LENGTH}")
        lengths += range(first, last + 1)
    return list(dict.fromkeys(lengths))


def _names(text: str, known: Sequence[str], option: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"{option} {text!r} names none; use some of {', '.join(known)}")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{option}: {', '.join(unknown)} is unknown; use {', '.join(known)}")
    return names


def _read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    text = read_text(path, what="--text")
    if not text.strip():
        raise UsageError(f"--text {path} is empty")
    return text


def _require_matplotlib(asked: str) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError(f"for {asked} install matplotlib (`pip install matplotlib`), or leave {asked} out")


def _progress(description: str) -> Any:
    if not is_terminal(sys.stderr):
        return iter

    def wrap(items: Iterable[_Item]) -> Iterable[_Item]:
        from tqdm import tqdm

        return tqdm(items, desc=description, file=sys.stderr, leave=False)

    return wrap


if __name__ == "__main__":
    leave(main())
