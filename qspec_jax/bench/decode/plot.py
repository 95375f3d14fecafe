"""What speculation gains, by acceptance, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qspec_jax.bench.decode.speedup import Speculation, targets_of
from qspec_jax.decoding.speedup import expected_tokens
from qspec_jax.files.whole import write_picture


def plot_speedup(path: Path, speculations: Sequence[Speculation], *, title: str) -> None:
    """Draws speed-up over acceptance, a line per speculation with its measured acceptance marked, into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    acceptances = [step / 100 for step in range(101)]
    for one in speculations:
        tokens = [expected_tokens(acceptance, one.draft_length) for acceptance in acceptances]
        loop, parts = ([one.speedups(count)[kind] for count in tokens] for kind in ("loop", "parts"))
        label = f"{one.draft} x {one.draft_length}, batch {one.batch}, context {one.context}"
        (line,) = axes.plot(acceptances, loop, label=label)
        axes.plot(acceptances, parts, color=line.get_color(), linestyle=":", linewidth=1)
        if one.accepted is not None and one.accepted_alpha is not None:
            reached = one.speedups(one.accepted.tokens_per_cycle)["loop"]
            axes.plot([one.accepted_alpha], [reached], color=line.get_color(), marker="o", linestyle="none")
    axes.axhline(1, color="black", linewidth=1)
    axes.set(
        xlabel="acceptance of a draft whose predecessors are accepted",
        ylabel=f"speed-up over plain {targets_of(speculations)}",
    )
    axes.set_title(f"{title}\nloop; dotted: sum of its parts; dots: measured acceptance", fontsize="small")
    axes.grid(visible=True, alpha=0.2)
    axes.legend(fontsize="small")
    write_picture(path, figure, dpi=150)
