"""``python -m tests.golden.make_commands``: writes ``docs/commands.md`` from the commands' own parsers.

What argparse itself prints differs between versions of Python, so the tables are made from the parsers' actions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from qspec_jax import chat, evaluate, generate, info, quantize, serve, texts
from qspec_jax.bench import __main__ as bench

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
_HEAD = """\
# Commands

Every command is a module: `python -m qspec_jax.NAME`. This page is printed from the commands' parsers.

- Results go to the standard output or into a file. Everything else goes to the standard error stream.
- Exit codes: 0 success, 1 failure, 2 a usage error, 130 interrupted, 143 or 129 by SIGTERM or SIGHUP.
- An error is one line. With `--debug` it is a traceback.
- `--help` and wrong options are answered before JAX is imported.
"""
_ABOUT = {
    "python -m qspec_jax.generate": "Generates text. Give `--prompt`, `--prompt-file` or both. "
    "With `--output`, a run that was interrupted goes on where it was.",
    "python -m qspec_jax.chat": "Talks, at a terminal or line by line of the standard input: [Chat](chat.md).",
    "python -m qspec_jax.serve": "Serves a model to clients of OpenAI's API: [Serving](serving.md). It needs "
    "`pip install 'qspec-jax[serve]'`.",
    "python -m qspec_jax.quantize": "Writes a model as a 4-bit checkpoint. Every command takes the checkpoint as a "
    "model. [Quantisation](quantization.md) compares the recipes.",
    "python -m qspec_jax.evaluate": "Scores a text at every precision, and drafts on prompts. "
    "Give `--text`, `--prompt-file` or both.",
    "python -m qspec_jax.texts": "Writes text to calibrate and to evaluate on: `calibration.txt`, `held-out.txt` and "
    "`prompts.jsonl`, and [long prompts](evaluation.md#long-prompts-by-kind-of-task) as `long-2k.jsonl`, "
    "`long-4k.jsonl` and `long-8k.jsonl`. None has a document of `calibration.txt`.",
    "python -m qspec_jax.info": "Shows [what a model is and takes](info.md) on this machine, from its headers. Without "
    "MODEL it shows versions, devices and kernels.",
    "python -m qspec_jax.bench kernels": "Times the kernels alone, against the device's measured ceilings.",
    "python -m qspec_jax.bench decode": "Times decode steps and QSpec cycles. Weights are synthetic unless `--model` "
    "names a real model.",
    "python -m qspec_jax.bench speedup": "Maps where speculation wins: the fastest plan for each batch and context.",
    "python -m qspec_jax.bench throughput": "Serves many requests, and counts tokens per second and latencies. "
    "Acceptance says something about real models only.",
    "python -m qspec_jax.bench tune": "Finds the fastest tiles of the Triton matmuls, and writes their table. It needs "
    "an NVIDIA GPU.",
    "python -m qspec_jax.bench tpu": "Counts cycles of the TPU kernels in the code of the TPU's compiler. It needs "
    "libtpu, and no TPU: [TPU](tpu.md).",
    "python -m qspec_jax.bench scaling": "Predicts memory, traffic and speed on many devices, by formula: "
    "[Scaling](scaling.md). Nothing is run.",
}
_HARNESS = """\
## python -m qspec_jax.harness

Hands over to lm-eval, which then knows the model class `qspec`. It needs `pip install 'qspec-jax[eval]'`.
Its options are those of `lm_eval`, and `--coordinator`, `--num-processes` and `--process-id`, which run it in
[several processes](mesh.md#several-processes):

```
python -m qspec_jax.harness run --model qspec --model_args model=CHECKPOINT,mode=w4a16 --tasks piqa
```
"""


def page() -> str:
    """The whole page."""
    parsers = [module.build_parser() for module in (generate, chat, serve, quantize, evaluate, texts, info)]
    sections = [section(parser) for parser in parsers]
    return "\n".join([_HEAD, *sections, _HARNESS, *(section(parser) for parser in bench_parsers())])


def bench_parsers() -> Iterator[argparse.ArgumentParser]:
    """Those of the commands of ``bench``."""
    for action in bench.build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def section(parser: argparse.ArgumentParser) -> str:
    """A heading, what the command is for, and a table of its options."""
    lines = [f"## {parser.prog}", "", _ABOUT[parser.prog], "", "| option | what |", "| --- | --- |"]
    lines += [row(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return "\n".join([*lines, ""])


def row(action: argparse.Action) -> str:
    """An option with its other spellings and its values, and its help."""
    values = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
    if action.choices is not None:
        values = "{" + ",".join(map(str, action.choices)) + "}"
    names = [f"`{' '.join(filter(None, (name, str(values))))}`" for name in action.option_strings] or [f"`{values}`"]
    needed = " **Required.**" if action.required and action.option_strings else ""
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return f"| {', '.join(names)} | {text}{needed} |".replace("NAME|FILE", r"NAME\|FILE")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
