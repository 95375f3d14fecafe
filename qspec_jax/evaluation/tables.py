"""Scores as tables for the eye, and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qspec_jax.evaluation.scores import DraftScore, ModelScore, TextScore
from qspec_jax.files.whole import write_picture

_WIDEST_FIRST = ("w8a16", "w4a16", "w4a8", "w4a4")


def text_table(scores: Sequence[TextScore]) -> str:
    """One line per precision; empty without scores."""
    if not scores:
        return ""
    lines = [f"{'text':10}{'tokens':>8}{'perplexity':>12}{'agreement':>11}{'KL, nats':>10}"]
    for score in scores:
        compared = f"{'-':>11}{'-':>10}"
        if score.agreement is not None and score.kl is not None:
            divergence = round(score.kl, 5) + 0.0  # no minus before a zero
            compared = f"{score.agreement:>11.4f}{divergence:>10.5f}"
        lines.append(f"{score.name:10}{score.num_tokens:>8} {score.perplexity:>11.3f}{compared}")
    return "\n".join(lines)


def draft_table(scores: Sequence[DraftScore]) -> str:
    """One line per draft view and length; empty without scores."""
    return "\n".join(_draft_lines(scores))


def kind_table(model: ModelScore) -> str:
    """The lines of :func:`draft_table` for each kind of task, then for all prompts; empty without kinds."""
    kinds = list(dict.fromkeys(str(score.kind) for score in model.drafts_by_kind))
    if not kinds:
        return ""
    scores = [score for kind in kinds for score in model.drafts_by_kind if score.kind == kind]
    heading, *lines = _draft_lines([*scores, *model.drafts])
    names = ["kind", *(score.kind or "all" for score in [*scores, *model.drafts])]
    width = max(map(len, names)) + 2
    return "\n".join(f"{name:{width}}{line}" for name, line in zip(names, [heading, *lines], strict=True))


def _draft_lines(scores: Sequence[DraftScore]) -> list[str]:
    """A heading and a line per score; none without scores."""
    if not scores:
        return []
    width = max(6, *(len(score.draft) for score in scores)) + 1
    lines = [
        f"{'draft':{width}}{'length':>7}{'accepted':>10}{'tokens/cycle':>14}{'identical':>11}  accepted by position"
    ]
    for score in scores:
        by_position = " ".join(f"{share:.2f}" for share in score.acceptance_by_position)
        identical = f"{score.identical}/{score.num_prompts}"
        figures = f"{score.acceptance_rate:>10.3f}{score.tokens_per_cycle:>14.2f}"
        if not score.num_drafted:  # none could run, or drafts would have been what verifies
            figures, by_position = f"{'-':>10}{'-':>14}", "-"
        lines.append(f"{score.draft:{width}}{score.draft_length:>7}{figures}{identical:>11}  {by_position}")
    return lines


def comparison_table(models: Sequence[ModelScore]) -> str:
    """One line per model: perplexity and KL at the precision named, and of each draft acceptance and tokens per cycle.

    The precision is the widest that was scored. What a model has not, or did not run, is a dash.
    """
    width = max(len(model.name) for model in models) + 2
    drafts = list(dict.fromkeys((score.draft, score.draft_length) for model in models for score in model.drafts))
    names = [f"{draft}, {length}" for draft, length in drafts]
    widths = [max(14, len(name) + 2) for name in names]
    headings = "".join(f"{name:>{wide}}" for name, wide in zip(names, widths, strict=True))
    lines = [f"{'model':{width}}{'text':>6}{'perplexity':>12}{'KL, nats':>10}{headings}"]
    for model in models:
        compared = {score.name: score for score in model.text if score.kl is not None}
        text = f"{'-':>6}{'-':>12}{'-':>10}"
        if (score := next((compared[one] for one in _WIDEST_FIRST if one in compared), None)) is not None:
            text = f"{score.name:>6} {score.perplexity:>11.3f}{round(score.kl or 0.0, 5) + 0.0:>10.5f}"
        ran = {(score.draft, score.draft_length): score for score in model.drafts if score.num_drafted}
        figures = [
            f"{ran[one].acceptance_rate:.3f} {ran[one].tokens_per_cycle:.2f}" if one in ran else "-" for one in drafts
        ]
        cells = "".join(f"{figure:>{wide}}" for figure, wide in zip(figures, widths, strict=True))
        lines.append(f"{model.name:{width}}{text}{cells}")
    return "\n".join(lines)


def plot_acceptance(models: Sequence[ModelScore], path: Path) -> None:
    """Acceptance by position, one line per model, draft precision and length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for model in models:
        for score in filter(lambda score: score.num_drafted, model.drafts):
            positions = range(1, score.draft_length + 1)
            label = f"{score.draft}, drafts of {score.draft_length}"
            label = label if len(models) == 1 else f"{model.name}: {label}"
            axes.plot(positions, score.acceptance_by_position, marker="o", label=label)
    axes.set(xlabel="place in the draft", ylabel="share of cycles in which it is accepted", ylim=(0, 1))
    if axes.get_lines():
        axes.legend(fontsize="small", ncols=2)
    write_picture(path, figure)


def plot_outliers(maxima: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """The largest magnitude of each channel in each layer, as one picture per model on a common logarithmic scale.

    Args:
        maxima: names, and ``[L, K]`` maxima.
        path: of the file.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 2.2 * len(maxima)), layout="constrained")
    norm = LogNorm(max(min(a.min() for _, a in maxima), 1e-2), max(a.max() for _, a in maxima))
    pictures = np.atleast_1d(figure.subplots(len(maxima), sharex=True))
    images = []
    for axes, (name, values) in zip(pictures, maxima, strict=True):
        images.append(axes.imshow(values, norm=norm, aspect="auto", interpolation="nearest"))
        axes.set(title=name, ylabel="layer")
    pictures[-1].set(xlabel="channel")
    figure.colorbar(images[-1], ax=list(pictures), label="largest magnitude")
    write_picture(path, figure)
