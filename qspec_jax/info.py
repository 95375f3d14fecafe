"""``python -m qspec_jax.info``: what a model is and takes, what this machine runs, and a self-test of its kernels.

Parses and prints only. Exit codes: 0 success, 1 failure (also a kernel that differs from the reference), 2 a usage
error, 130 interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qspec_jax.commands import options
from qspec_jax.commands.output import require_standard_output, show, show_json
from qspec_jax.commands.run import exit_code, leave
from qspec_jax.decoding.plan import AUTO
from qspec_jax.device.mesh import parse_mesh
from qspec_jax.errors import UsageError
from qspec_jax.files import json_lines
from qspec_jax.files.whole import check_writable, write_whole
from qspec_jax.weights.resolve import check_model_name, resolve_model

_MOST_SECONDS = 480


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.info",
        description="Show what a model is and takes on this machine, without reading its weights; without MODEL, show "
        "versions, devices and kernels.",
    )
    add = parser.add_argument
    model = "hub id, Hugging Face directory, GGUF file, checkpoint, or 'default' for the demo model"
    options.add_model_first(parser, model)
    options.add_dtype(parser)
    options.add_group_size(parser, "as in generate")
    options.add_verify(parser)
    options.add_kernels(parser)
    options.add_kv(parser)
    mesh = "what each of so many devices would hold: data=N,model=N; there need not be so many"
    add("--mesh", metavar="AXES", help=mesh)
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--output", type=Path, metavar="FILE", help="also write the JSON object into a file")
    test = parser.add_argument_group("self-test", "of the kernels, on whatever device is here")
    test.add_argument("--self-test", action="store_true", help="compare every kernel with the reference")
    interpreted = "also run kernels of other devices, in Pallas' interpreter, at the demo model's widths: minutes"
    test.add_argument("--interpreted", action="store_true", help=interpreted)
    test.add_argument("--op", action="append", default=[], metavar="NAME", help="only this operation; repeatable")
    seconds = f"begin no other comparison after these (default: {_MOST_SECONDS})"
    test.add_argument("--max-seconds", type=int, default=_MOST_SECONDS, metavar="N", help=seconds)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser(), argv)


def run(arguments: argparse.Namespace) -> int:
    """Checks the arguments and prints what was asked for; 1 if a kernel is wrong."""
    require_standard_output("send it to a file")
    _check(arguments)
    if arguments.self_test:
        return _self_test(arguments)
    from qspec_jax.inspection import text

    if arguments.model is None:
        from qspec_jax.inspection.machine import describe_machine

        facts = describe_machine()
        _print(arguments, facts, text.machine_text(facts))
        return 0
    from qspec_jax.device.start import start_device
    from qspec_jax.inspection.model import describe_model

    start_device()
    chosen = None if arguments.group_size is None else options.quantization_of(arguments.group_size)
    path = resolve_model(arguments.model)
    mesh = parse_mesh(arguments.mesh or "model=1")
    given = arguments.draft_model
    asked = {"dtype": arguments.dtype, "kernels": arguments.kernels, "kv": arguments.kv, "verify": arguments.verify}
    facts = describe_model(
        path,
        quantization=chosen,
        **asked,
        mesh=mesh,
        draft_path=None if given is None else resolve_model(given, what="draft_model"),
        heads=options.heads_of(arguments),
    )
    _print(arguments, facts, text.model_text(facts))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.self_test and arguments.model is not None:
        raise UsageError("--self-test takes no MODEL: it is of kernels at the widths of models; leave one of them out")
    if not arguments.self_test and (arguments.interpreted or arguments.op):
        raise UsageError("--interpreted and --op are options of --self-test; give that as well")
    if arguments.mesh is not None:
        if arguments.model is None:
            raise UsageError("--mesh is of a MODEL, which is missing: give one, or 'default'")
        parse_mesh(arguments.mesh)
    options.check_positive(arguments, "max_seconds")
    told = arguments.verify != AUTO or arguments.draft_model is not None or options.heads_of(arguments)
    if arguments.model is None and told:
        raise UsageError(
            "--verify, --draft-model, --head-bits and --draft-head are of a MODEL, which is missing: give one, or "
            "'default'"
        )
    options.check_weights(arguments, ["qspec"])
    check_model_name(arguments.model)
    check_writable(arguments.output, option="--output")


def _self_test(arguments: argparse.Namespace) -> int:
    """Prints a line for each comparison as it is made, and the report; 1 if one failed."""
    from qspec_jax.inspection import text
    from qspec_jax.inspection.machine import describe_machine
    from qspec_jax.inspection.self_test import all_cases, compared_with, run_cases, verdict

    known = dict.fromkeys(case.op for case in all_cases(small=True))
    if unknown := [op for op in arguments.op if op not in known]:
        raise UsageError(f"--op {unknown[0]} is no operation; use {', '.join(known)}")
    cases = all_cases(arguments.op, small=arguments.interpreted)
    facts = describe_machine()
    if facts["problem"] is not None:
        from qspec_jax.errors import DeviceError

        raise DeviceError(facts["problem"])
    if not arguments.json:
        show(f"{text.machine_text(facts)}\n")
    outcomes = []
    for one in run_cases(cases, with_interpreted=arguments.interpreted, most_seconds=arguments.max_seconds):
        outcomes.append(one)
        if not arguments.json and (line := text.outcome_line(one)) is not None:
            show(line)
    failed = any(one.ok is False for one in outcomes)
    comparisons = [dataclasses.asdict(one) for one in outcomes]
    about = {"ok": not failed, "verdict": verdict(outcomes), "compared_with": compared_with()}
    report = {**about, "machine": facts, "comparisons": comparisons}
    _print(arguments, report, text.self_test_text(outcomes))
    return int(failed)


def _print(arguments: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    if arguments.output is not None:
        write_whole(arguments.output, json_lines.dumps(facts, "utf-8", indent=1) + "\n")
    if arguments.json:
        show_json(facts, indent=1)
    else:
        show(text)


if __name__ == "__main__":
    leave(main())
