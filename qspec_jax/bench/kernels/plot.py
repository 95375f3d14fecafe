"""A roofline as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qspec_jax.bench.kernels.ceilings import Ceilings
from qspec_jax.bench.kernels.measure import Measurement
from qspec_jax.files.whole import write_picture


def plot_roofline(path: Path, measurements: list[Measurement], ceilings: Ceilings, *, title: str) -> None:
    """Draws arithmetic intensity against TOP/s with the ceilings, into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series: dict[str, tuple[list[float], list[float]]] = {}
    for one in measurements:
        if one.top_per_s is not None and one.intensity is not None:
            intensities, rates = series.setdefault(f"{one.op}, {one.implementation}", ([], []))
            intensities.append(one.intensity)
            rates.append(one.top_per_s)
    for (label, points), marker in zip(sorted(series.items()), "osv^D<>pPX*hH" * len(series), strict=False):
        axes.loglog(*points, linestyle="none", marker=marker, markersize=5, alpha=0.75, label=label)
    _draw_ceilings(axes, ceilings, [x for xs, _ in series.values() for x in xs])
    axes.set(xlabel="operations per byte", ylabel="TOP/s", title=title)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
    write_picture(path, figure, dpi=150)


def _draw_ceilings(axes: Any, ceilings: Ceilings, intensities: list[float]) -> None:
    kinds = (("int8", ceilings.int8_top_per_s, "--"), ("bf16", ceilings.bf16_top_per_s, "-"))
    ridges = [rate / ceilings.copy_tb_per_s for _, rate, _ in kinds]
    left = min([*intensities, *ridges]) / 2
    right = max([*intensities, *ridges]) * 2
    for (name, rate, style), ridge in zip(kinds, ridges, strict=True):
        corner = [left, ridge, right], [left * ceilings.copy_tb_per_s, rate, rate]
        axes.loglog(*corner, color="black", linewidth=1, linestyle=style, label=f"{name} matmul {rate:.3g} TOP/s")
    axes.annotate(
        f"copy {ceilings.copy_tb_per_s:.3g} TB/s",
        (left, left * ceilings.copy_tb_per_s),
        textcoords="offset points",
        xytext=(12, 2),
        fontsize="small",
    )
