"""What each of some processes runs: commands one after the other in process 0, whose others do what they need.

A command finds the model that another one has loaded with the same options, and its programs, if rows and positions are
as many. All read prompts in pieces, as on a GPU. Arguments: where process 0 listens, how many there are, which one this
is, a model, a folder with its files.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import qspec_jax
from qspec_jax import chat, evaluate
from qspec_jax.bench import __main__ as bench
from qspec_jax.commands.processes import run_together
from qspec_jax.decoding import packing

WHO, MODEL, FOLDER = sys.argv[1:4], sys.argv[4], Path(sys.argv[5])
OF_MODEL = ["--model", MODEL, "--mesh", "data=2", "--kernels", "reference"]
NO_DRAFTS = [*OF_MODEL, "--mode", "w4a16"]
LOADED = {}


def load_once(load):
    """``qspec_jax.load``, but what was loaded with the same options before is the same model."""
    signature = inspect.signature(load)

    def load_or_find(*arguments, **options):
        given = signature.bind(*arguments, **options)
        given.apply_defaults()
        key = str({name: one for name, one in given.arguments.items() if name not in ("progress", "compile_ahead")})
        if key not in LOADED:
            LOADED[key] = load(*arguments, **options)
        return LOADED[key]

    return load_or_find


def printed(command, *arguments: str) -> tuple[int, str]:
    """Exit code and standard output of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = command.main(arguments)
    return code, out.getvalue()


def run(_: Namespace) -> int:
    """All of them; what they print goes into a file."""
    qspec_jax.load = load_once(qspec_jax.load)
    text, prompts, scores = (str(FOLDER / name) for name in ("text.txt", "prompts.txt", "bench.json"))
    found = {"chat": printed(chat, *NO_DRAFTS, "--max-new-tokens", "6", "--max-seq-len", "64")}
    of_prompts = ["--prompt-file", prompts, "--max-new-tokens", "6"]
    drafts = ["--precisions", "w4a16", "--drafts", "w4a8", "--draft-lengths", "2", "--batch-size", "2"]
    found["evaluate"] = printed(evaluate, *OF_MODEL, "--text", text, *of_prompts, *drafts, "--json")
    shape = ["--batch", "2", "--context", "8", "--repeats", "1", "--steps", "4"]
    found["decode"] = printed(bench, "decode", *NO_DRAFTS, *shape, "--json", scores)
    sizes = ["--max-prompt-tokens", "16", "--batch-size", "2"]
    found["throughput"] = printed(bench, "throughput", *NO_DRAFTS, *of_prompts, *sizes)
    found["likelihood"] = (0, likelihood(Path(text).read_text()))
    found["programs"] = (0, sorted({name[0] for model in LOADED.values() for name in model.programs.compiled}))
    (FOLDER / "found.json").write_text(json.dumps(found))
    return 3


def likelihood(text: str) -> float:
    """Of a text after its first token, as the harness has it."""
    from qspec_jax.evaluation.scores import scores_function

    model = qspec_jax.load(MODEL, mesh="data=2", kernels="reference")
    import numpy as np

    assert model.tokenizer is not None
    tokens = np.asarray([model.tokenizer.encode(text)], np.int32)
    return float(np.asarray(scores_function(model, qspec_jax.Precision.W4A16)(tokens)[0]).sum())


if __name__ == "__main__":
    packing.longest_packed = lambda _: 512
    named = dict(zip(("coordinator", "num_processes", "process_id"), (WHO[0], *map(int, WHO[1:])), strict=True))
    code = run_together("several", run, Namespace(**named, mesh="data=2"))
    sys.stderr.flush()
    os._exit(code)
