"""What ``bench decode`` prints, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qspec_jax.bench.decode.speedup import ACCEPTANCES, Speculation, targets_of
from qspec_jax.decoding.speedup import acceptance_for, expected_tokens
from qspec_jax.device.sizes import size_text

if TYPE_CHECKING:
    from qspec_jax.bench.decode.measure import Measurement
    from qspec_jax.bench.decode.parts import Part

_COLUMNS = "{:<7} {:<{view}} {:<{drafts}} {:>5} {:>5} {:>7} {:>9} {:>9} {:>7} {:>6} {:>6} {:>9}"
_CURVE = "{:<{draft}} {:>5} {:>5} {:>7} {:>6} {:>6} {:>8} {:<6} {:>6} {:>10}" + " {:>6}" * len(ACCEPTANCES) + "  {}"
_CURVE_TITLE = """
Speed-up over plain {} decoding by acceptance, the chance of a draft whose predecessors were accepted: tokens per
cycle over the cost of a cycle in plain steps, by the sum of its parts and as the loop runs it.
"""
_MAX_NAME = 90
_NARROWEST = 9  # of a column of names
_SYMMETRY = {True: "(symmetric)", False: "(asymmetric)"}


def model_line(model: Mapping[str, Any], copy_tb_per_s: float) -> str:
    """The model as it was measured, and the bandwidth that its bytes are held against."""
    weights = "synthetic weights" if model["weights"] == "synthetic" else "its own weights"
    kinds = [
        f"{one['bits']}-bit in groups of {one['group_size']} {_SYMMETRY[one['symmetric']]}" for one in model["formats"]
    ]
    told = model["quantization"] or {"keep_floats": True}
    form = " and ".join([*(["in floating point"] if told["keep_floats"] else []), *kinds])
    heads = {"LM head of": told.get("head_bits"), "LM head of drafts of": told.get("draft_head")}
    form += "".join(f", {name} {bits} bits" for name, bits in heads.items() if bits)
    cache = "" if model.get("kv", "model") == "model" else f", {model['kv']} cache"
    return (
        f"{model['name']}, {weights}, {form}, {size_text(model['num_bytes'])}, {model['dtype']}{cache}, "
        f"kernels {model['kernels']}; copy {copy_tb_per_s:.3g} TB/s"
    )


def name_widths(parts: Iterable[Part]) -> dict[str, int]:
    """How wide the columns of names are of a table of some parts; the empty one is of the usual ones."""
    names = {"view": [], "drafts": []}
    for part in parts:
        names["view"].append(part.view.name)
        names["drafts"].append(part.source or "-")
    return {column: max([_NARROWEST, *map(len, given)]) for column, given in names.items()}


def table_head(widths: Mapping[str, int]) -> str:
    """The names of the columns; ``widths`` are those of :func:`name_widths`."""
    names = ("part", "precision", "drafts", "gamma", "batch", "context")
    return _COLUMNS.format(*names, "ms", "tokens/s", "GB", "bound", "idle", "compile s", **widths)


def table_row(one: Measurement, copy_tb_per_s: float, widths: Mapping[str, int], *, on_mesh: bool = False) -> str:
    """A measurement as a line; ``bound`` is the share of the time that its bytes take at the copy bandwidth.

    On a mesh the bytes are those of one device, and the time in collectives stands behind, where kernels have a clock.
    """
    figures = one.to_dict(copy_tb_per_s)
    line = _COLUMNS.format(
        one.part,
        one.precision,
        one.draft or "-",
        one.draft_length or "-",
        one.batch,
        one.context,
        _number(one.milliseconds, ".3f"),
        _number(one.tokens_per_s, ".1f"),
        _number(sum(one.num_bytes.values()) / 1e9 if one.num_bytes else None, ".3g"),
        _number(figures["share_of_bound"], ".0%"),
        _number(one.idle_share, ".0%"),
        _number(one.compile_s, ".1f"),
        **widths,
    )
    if one.status == "ok" and on_mesh and one.collective_ms is not None:
        line = f"{line}  {one.collective_ms:.3f} ms in collectives"
    return line if one.status != "failed" else f"{line}  FAILED"


def breakdown_table(one: Measurement) -> str:
    """The kernels of a step, the longest in sum first."""
    if one.kernels is None:
        return "  the profiler (CUPTI) recorded no kernel of this loop"
    lines = [f"  {'us':>9} {'count':>7}  kernel, per step"]
    for name, count, microseconds in one.kernels:
        lines.append(f"  {microseconds:>9.2f} {count:>7.4g}  {name[:_MAX_NAME]}")
    return "\n".join(lines)


def speculation_table(speculations: Sequence[Speculation]) -> str:
    """Two lines per speculation: by the sum of its parts, and as the loop runs it."""
    points = [f"{acceptance:.0%}" for acceptance in ACCEPTANCES]
    names = ("draft", "gamma", "batch", "context", "c_d", "c_v", "gap ms", "by", "cost", "break-even")
    width = max([_NARROWEST, *(len(one.draft) for one in speculations)])
    head = _CURVE.format(*names, *points, "measured", draft=width)
    lines = [_CURVE_TITLE.format(targets_of(speculations)), head.rstrip()]
    for one in speculations:
        for kind, cost in one.costs.items():
            even = acceptance_for(cost, one.draft_length)
            cells = (
                *(one.draft, one.draft_length, one.batch, one.context),
                *(f"{one.draft_ratio:.2f}", f"{one.verify_ratio:.2f}", f"{one.gap_ms:.3f}", kind, f"{cost:.2f}"),
                "never" if even is None else f"{even:.0%}",
                *(f"{one.speedups(expected_tokens(point, one.draft_length))[kind]:.2f}" for point in ACCEPTANCES),
            )
            lines.append(_CURVE.format(*cells, _measured(one, kind), draft=width).rstrip())
    return "\n".join(lines)


def _measured(one: Speculation, kind: str) -> str:
    if one.accepted is None or one.accepted_alpha is None:
        return ""
    tokens = one.accepted.tokens_per_cycle
    return f"{one.speedups(tokens)[kind]:.2f} at {one.accepted_alpha:.0%} ({tokens:.2f} tokens per cycle)"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
