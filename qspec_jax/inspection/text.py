"""The facts of this room as text of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qspec_jax.device.sizes import size_text
from qspec_jax.inspection.self_test import Outcome, verdict

WIDTH = 80
_LABEL = 15


def machine_text(facts: Mapping[str, Any]) -> str:
    """Of :func:`describe_machine`."""
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in facts["versions"].items())
    lines = [
        _row("qspec-jax", f"{facts['qspec_jax']}, Python {facts['python']}"),
        _row("system", facts["system"]),
        _row("versions", versions),
    ]
    for device in facts["devices"]:
        capability = f", compute capability {device['compute_capability']}" if device["compute_capability"] else ""
        memory = f", {size_text(device['memory_bytes'])} for JAX" if device["memory_bytes"] else ""
        platform = "" if device["kind"] == facts["platform"] else f" ({facts['platform']})"
        lines.append(_row("device", f"{device['kind']}{platform}{capability}{memory}"))
    if facts["free_bytes"] is not None:
        lines.append(_row("memory free", size_text(facts["free_bytes"])))
    for name in ("driver", "runtime", "note", "problem"):
        if facts.get(name):
            lines.append(_row(name, facts[name]))
    for name, obstacle in facts["kernels"].items():
        lines.append(_row(f"{name} kernels", "run here" if obstacle is None else f"do not run here: {obstacle}"))
    if facts["devices"]:
        lines.append(_row("reference", "runs here, as everywhere: XLA's own operations"))
    lines.append(_row("programs", facts["compiled_programs"]))
    lines.append(_row("demo model", facts["demo_model"] or "not installed; it is fetched from the hub"))
    lines += [_row("environment", f"{name}={value}") for name, value in facts["environment"].items()]
    return "\n".join(lines)


def model_text(facts: Mapping[str, Any]) -> str:
    """Of :func:`describe_model`."""
    about = [*_identity(facts), *_quantization(facts["quantization"]), *_language(facts)]
    return "\n".join([*about, "", *_memory(facts), "", *_kernels(facts)])


def _identity(facts: Mapping[str, Any]) -> list[str]:
    shapes = facts["shapes"]
    layers = (
        f"{shapes['num_layers']} layers, hidden {shapes['hidden_size']}, MLP {shapes['intermediate_size']}, "
        f"{shapes['num_heads']} heads and {shapes['num_kv_heads']} of keys and values, of {shapes['head_dim']} each"
    )
    window = f", sliding window {shapes['sliding_window']}" if shapes["sliding_window"] else ""
    scaling = f", scaled ({shapes['rope_scaling'].get('kind') or 'rope'})" if shapes["rope_scaling"] else ""
    return [
        _row("model", f"{facts['model']}, {facts['kind']}, {size_text(facts['disk_bytes'])} on disk"),
        _row("family", f"{facts['architecture']}, {shapes['num_parameters'] / 1e6:,.0f} million parameters"),
        _row("shapes", layers),
        _row("text", f"{shapes['max_positions']:,} positions{window}{scaling}, {shapes['vocab_size']:,} tokens"),
    ]


def _quantization(facts: Mapping[str, Any]) -> list[str]:
    formats: dict[tuple[Any, ...], list[str]] = {}
    for name, one in facts["formats"].items():
        formats.setdefault((one["bits"], one["group_size"], one["symmetric"]), []).append(name)
    lines = [_row("linears", "; ".join(f"{count} as {kind}" for kind, count in facts["linears"].items()))]
    for (bits, group_size, symmetric), names in formats.items():
        groups = "a scale per row" if group_size is None else f"groups of {group_size}"
        where = "" if len(formats) == 1 else f" ({', '.join(names)})"
        nested = ", of which drafts read 4" if bits == 8 else ""
        lines.append(_row("weights", f"{bits} bits{nested}, {groups}, {'' if symmetric else 'a'}symmetric{where}"))
    if facts["keeps_floats"]:
        lines.append(_row("verify", "float: the linears in floating point besides, which verify what the 4 bits draft"))
    block = facts["hadamard_block"] or "all"
    rotated = f"rotated, Hadamard transform of {block} values before mlp.down" if facts["rotated"] else "not rotated"
    return [*lines, _row("method", f"{facts['method']}; {rotated}"), _row("head", _head(facts))]


def _head(facts: Mapping[str, Any]) -> str:
    how = "kept in" if facts["keeps_head_codes"] else "rounded to"
    bits = "" if facts["head_bits"] is None else f", {how} {facts['head_bits']} bits"
    return f"{facts['head']}{bits}" + (
        "" if facts["draft_head"] is None else f"; drafts read {facts['draft_head']} bits"
    )


def _language(facts: Mapping[str, Any]) -> list[str]:
    tokenizer, template = facts["tokenizer"], facts["chat_template"]
    ends = ", ".join(f"{token} {text!r}" if text else f"{token}" for token, text in facts["end_tokens"].items())
    if tokenizer["problem"]:
        return [_row("tokenizer", f"none: {tokenizer['problem']}"), _row("end tokens", ends or "none")]
    first = next((line.strip() for line in (template or "").splitlines() if line.strip()), None)
    shown = "none; prompts are read as plain text" if first is None else textwrap.shorten(first, 60, placeholder=" ...")
    return [_row("end tokens", ends or "none"), _row("chat template", shown)]


def _memory(facts: Mapping[str, Any]) -> list[str]:
    memory = facts["memory"]
    batches = [str(batch) for batch in next(iter(memory["cache_bytes"].values()))]
    rows = [["context", *(f"batch {batch}" for batch in batches), "largest batch"]]
    for context, sizes in memory["cache_bytes"].items():
        largest = "unknown" if memory["largest_batch"] is None else str(memory["largest_batch"][context])
        rows.append([f"{context:,}", *map(size_text, sizes.values()), largest])
    free = "" if memory["free_bytes"] is None else f", {size_text(memory['free_bytes'])} free on {facts['device']}"
    note = "Prefill and XLA's temporaries take more; the largest batch leaves them nothing."
    if memory["weights_fit"] is False:
        note = "The weights alone do not fit this device."
    mesh = facts["mesh"]
    several = mesh["data"] * mesh["model"] > 1
    where = f" on each device of data={mesh['data']},model={mesh['model']}" if several else ""
    kv = "int8 " if memory["kv"] == "int8" else ""
    head = f"Memory in {memory['dtype']}{where}: weights {size_text(memory['weight_bytes'])}{free}; {kv}caches:"
    return [*textwrap.wrap(head, WIDTH), *_table(rows), *textwrap.wrap(note, WIDTH)]


def _kernels(facts: Mapping[str, Any]) -> list[str]:
    """A row for each operation, and below each reason why another implementation does not run once."""
    passes = facts["kernels"]
    cells: dict[str, dict[str, str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, choices in passes.items():
        for choice in choices:
            of = "" if choice["part"] == choice["op"] else f" {choice['part']}"
            cells.setdefault(f"{choice['op']}{of}", {})[name] = choice["runs"]
            for other, reason in choice["others"].items():
                reasons.setdefault((other, reason), []).append(choice["part"])
    rows = [["operation", *passes]]
    rows += [[call, *(runs.get(name, "-") for name in passes)] for call, runs in cells.items()]
    lines = [f"Kernels on {facts['device']}:", *_table(rows), "Others do not run:"]
    everywhere = sum(len(choices) for choices in passes.values())
    for (other, reason), parts in reasons.items():
        where = "" if len(parts) == everywhere else f" ({', '.join(dict.fromkeys(parts))})"
        lines += textwrap.wrap(f"  {other}: {reason}{where}", WIDTH, subsequent_indent="    ")
    return lines


def self_test_text(outcomes: Sequence[Outcome]) -> str:
    """The end of a report: what was not served, each reason once, and the verdict."""
    unserved: dict[str, list[str]] = {}
    for one in outcomes:
        if one.ok is None and one.problem is not None:
            unserved.setdefault(f"{one.implementation}: {one.problem}", []).append(one.function)
    lines = []
    for reason, functions in unserved.items():
        count = f" ({len(functions)} calls)" if len(functions) > 1 else ""
        lines += textwrap.wrap(f"not run, {reason}{count}", WIDTH, subsequent_indent="    ")
    return "\n".join([*lines, *textwrap.wrap(verdict(list(outcomes)), WIDTH)])


def outcome_line(one: Outcome) -> str | None:
    """A line of a report; None for a call that the implementation does not serve."""
    if one.ok is None:
        return None
    mark = "ok  " if one.ok else "FAIL"
    name = f"{mark} {one.function}, {one.implementation}, {one.dtype}"
    found = f"{one.error:.1e} of {one.allowed:.0e}" if one.error is not None else f"{one.problem}"
    return f"{name:<58} {found}, {one.seconds or 0:.1f} s\n       {one.shape}"


def _row(label: str, text: str) -> str:
    indent = " " * (_LABEL + 1)
    whole: Any = {"break_on_hyphens": False, "break_long_words": False}  # a path can be copied
    return textwrap.fill(f"{label:<{_LABEL}} {text}", WIDTH, subsequent_indent=indent, **whole)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(_cells(row, widths)).rstrip() for row in rows]


def _cells(row: Sequence[str], widths: Iterable[int]) -> list[str]:
    return [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
