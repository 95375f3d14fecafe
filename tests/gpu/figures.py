"""The figures that this project aims at, measured by its own commands in one go, beside the aims.

``python -m tests.gpu.figures`` lists the groups, ``python -m tests.gpu.figures plain budget --minutes 9`` measures some
of them, on NVIDIA GPUs. What each command prints and measures stays in a folder. A figure counts with its hardware and
version, which are the first line; ``docs/results.md`` has those that are shipped.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Tokens per cycle of real models by drafts, of one more at most: of SmolLM2 with drafts that read a budget of the cache
# (page 033 of the lab notebook), and of Qwen2.5-Coder-0.5B: floats verify drafts of symmetric groups of 128 by GPTQ,
# with a head of 4 bits (page 060), and, simulated, 8 bits in groups of 64 their upper halves.
BUDGET_TOKENS = {3: 3.77, 5: 5.40}
FLOAT_TOKENS = {5: 5.03}
NESTED_TOKENS = {5: 5.36}


class Results:
    """What the commands of a group have measured, in order."""

    def __init__(self, files: Sequence[Mapping[str, Any]]):
        self._files = files

    def one(self, key: str, place: int = 0, **wanted: Any) -> Mapping[str, Any]:
        """The one measurement of a command that has some fields.

        Raises:
            LookupError: there is none, or several.
        """
        rows = self._files[place][key]
        found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
        if len(found) != 1:
            raise LookupError(f"{len(found)} measurements with {wanted}")
        return found[0]

    def speed(self, mode: str, place: int = 0) -> float:
        """Tokens per second of a mode by ``bench throughput``, the median of all runs.

        Raises:
            LookupError: there is no run of it.
        """
        if not (speeds := [run["tokens_per_s"] for run in self._files[place]["runs"] if run["mode"] == mode]):
            raise LookupError(f"no run of {mode}")
        return statistics.median(speeds)

    def ms(self, part: str, batch: int, context: int = 512, place: int = 0, **wanted: Any) -> float:
        """Milliseconds of a part of a cycle by ``bench decode``."""
        found = self.one("measurements", place, part=part, batch=batch, context=context, **wanted)
        if found["status"] != "ok":
            raise LookupError(str(found["reason"]))
        return found["milliseconds"]

    def steps(self, batch: int, context: int = 512, place: int = 0) -> float:
        """Plain steps that the cycle of the only plan costs."""
        return self.ms("cycle", batch, context, place) / self.ms("step", batch, context, place)


class Figure(NamedTuple):
    """What is aimed at; ``sign`` is 1 where more is better, -1 where less is."""

    what: str
    value: Callable[[Results], float]
    aim: float
    sign: int = 1


class Group(NamedTuple):
    """Commands of ``python -m qspec_jax.bench``, or of a module named first, and what follows from their measurements.

    ``{folder}`` in a command is where all that they write stays.
    """

    commands: Sequence[str]
    figures: Sequence[Figure]
    num_gpus: int = 1
    by_processes: bool = False  # a command that asks for a mesh is run by a process for each GPU


def _speedup(what: str, tokens: float, aim: float, batch: int, context: int = 512, place: int = 0) -> Figure:
    return Figure(what, lambda results: tokens / results.steps(batch, context, place), aim)


def _tokens_per_s(what: str, aim: float, batch: int, place: int = 0) -> Figure:
    return Figure(what, lambda results: 1000 * batch / results.ms("step", batch, place=place), aim)


def _run(what: str, field: Callable[[Mapping[str, Any]], float], aim: float, sign: int = 1, **wanted: Any) -> Figure:
    return Figure(what, lambda results: field(results.one("runs", **wanted)), aim, sign)


def _matmul(rows: int, aim: float, by: str) -> Figure:
    wanted = {"op": "w4a16", "rows": rows, "implementation": by}
    value = lambda results: results.one("measurements", **wanted)["microseconds"]  # noqa: E731
    return Figure(f"W4A16 4096 x 28672 by {by}, {rows} rows, us", value, aim, -1)


def _over(batch: int, context: int = 512, part: str = "step") -> Callable[[Results], float]:
    """How many times as fast the second command is."""
    return lambda results: results.ms(part, batch, context, 0) / results.ms(part, batch, context, 1)


_MOSAIC = ("mosaic", "mosaic_pairs")
_LARGEST = "kernels --shape 4096x28672 --group-size 128 --ops w4a16 --rows 96,128,192,256"
_8B, _31 = "decode --preset llama-3-8b", "decode --preset llama-3.1-8b"
_SHARDS = f"{_8B} --mode w4a16 --batch 1,16,64"
_LONG = f"{_31} --mode w4a16,qspec --draft w4a8 --draft-context auto --repeats 3"
_CYCLES = f"{_8B} --mode w4a16,qspec --draft w4a8 --batch 1,16 --repeats 3"
_ON_MESH = [
    _SHARDS,
    f"{_SHARDS} --mesh model=2",
    f"{_8B} --mode w4a16 --batch 128 --mesh data=2",
    "decode --preset llama-3-70b --mode w4a16 --batch 1 --mesh model=2",
    _CYCLES,
    f"{_CYCLES} --mesh model=2",
]
_OF_MESH = [
    *(Figure(f"model=2 over one GPU, batch {n}", _over(n), aim) for n, aim in ((1, 1.35), (16, 1.5), (64, 1.6))),
    Figure("data=2 over one GPU, 64 + 64 rows", lambda r: 2 * r.ms("step", 64) / r.ms("step", 128, place=2), 1.9),
    Figure(
        "70B, model=2, batch 1, share of the limit by bytes", lambda r: r.one("measurements", 3)["share_of_bound"], 0.5
    ),
    *(
        Figure(
            f"QSpec over plain, model=2 over one GPU, batch {n}",
            lambda r, n=n: r.steps(n, place=4) / r.steps(n, place=5),
            0.95,
        )
        for n in (1, 16)
    ),
]
_SERVED = "throughput --preset llama-3-8b --mode w4a16 --batch-size 64"
_MANY = "--num-prompts 512 --max-new-tokens 256"


_STATIC = ("w4a16", "lookup", "qspec")
_MODES = ",".join((*_STATIC, "auto"))
_CELL = f"throughput --model default --mode {_MODES} --draft-length 3 --max-new-tokens 128 --repeats 3"
_LONG_TEXTS = "qspec_jax.texts {folder}/texts --documents 1000000 --long-prompts 40 --long-contexts 2k,8k"
# Requests by rows, enough of them for rows to be filled several times.
_REQUESTS = {
    "512": {1: 24, 4: 48, 16: 128, 64: 256},
    "2k": {1: 12, 4: 24, 16: 64, 64: 200},
    "8k": {1: 12, 4: 24, 16: 64, 64: 128},
}
_MOST_TOKENS = {"512": 512, "2k": 2_200, "8k": 7_930}


def _command_of_cell(context: str, rows: int) -> str:
    """Short texts are first turns of ShareGPT."""
    texts = "" if context == "512" else f" --prompt-file {{folder}}/texts/long-{context}.jsonl"
    sizes = f"--batch-size {rows} --num-prompts {_REQUESTS[context][rows]} --max-prompt-tokens {_MOST_TOKENS[context]}"
    return f"{_CELL} {sizes}{texts}"


def _auto_over(results: Results, place: int, modes: Sequence[str]) -> float:
    """Tokens per second of ``auto``, over the best of some modes: medians of runs by turns."""
    return results.speed("auto", place) / max(results.speed(mode, place) for mode in modes)


def _of_auto(context: str) -> Group:
    return Group(
        [_LONG_TEXTS, *(_command_of_cell(context, rows) for rows in _REQUESTS[context])],
        [
            Figure(
                f"auto over {what}, {rows} x {context}", functools.partial(_auto_over, place=place, modes=modes), aim
            )
            for place, rows in enumerate(_REQUESTS[context], 1)
            for what, modes, aim in (("plain", _STATIC[:1], 0.98), ("the best static mode", _STATIC, 0.97))
        ],
    )


def _decoded_per_s(results: Results, mode: str) -> float:
    """Tokens per second of decoding alone."""
    run = results.one("runs", 1, mode=mode)
    return run["num_tokens"] / sum(one["seconds"] for one in run["choices"].values())


GROUPS = {
    "plain": Group(
        [f"{_8B} --batch 1,16,32 --mode w4a16,qspec", f"{_8B} --batch 1 --mode w4a16 --head-bits 8"],
        [
            _tokens_per_s("plain W4A16, batch 1, tokens/s", 440, 1),
            _tokens_per_s("plain W4A16, batch 16, tokens/s", 5_800, 16),
            _tokens_per_s("plain W4A16 with a head of 8 bits, batch 1, tokens/s", 440, 1, place=1),
            Figure(
                "verification of 4 tokens over a plain step, batch 32",
                lambda results: results.ms("verify", 32) / results.ms("step", 32),
                1.35,
                -1,
            ),
        ],
    ),
    "matmuls": Group(
        [f"{_LARGEST} --implementations {','.join(_MOSAIC)}"],
        [_matmul(*aim, by) for by in _MOSAIC for aim in ((96, 42), (128, 50), (192, 72), (256, 85))],
    ),
    "budget": Group(
        [
            f"{_LONG} --batch 32 --context 4096 --draft-length 3",
            f"{_LONG} --batch 16 --context 8000,16384 --draft-length 5",
            f"{_LONG} --batch 1 --context 32768 --draft-length 3",
        ],
        [
            Figure("draft / step, 32 x 4096", lambda r: r.ms("draft", 32, 4096) / r.ms("step", 32, 4096), 0.45, -1),
            Figure(
                "draft / step, 16 x 8000", lambda r: r.ms("draft", 16, 8000, 1) / r.ms("step", 16, 8000, 1), 0.42, -1
            ),
            _speedup("QSpec over plain, 32 x 4096", BUDGET_TOKENS[3], 1.4, 32, 4096),
            _speedup("QSpec over plain, 16 x 8000", BUDGET_TOKENS[5], 1.6, 16, 8000, 1),
            _speedup("QSpec over plain, 16 x 16384", BUDGET_TOKENS[5], 2.0, 16, 16384, 1),
            _speedup("QSpec over plain, 1 x 32768", BUDGET_TOKENS[3], 1.2, 1, 32768, 2),
        ],
    ),
    "float": Group(
        [f"{_8B} --verify float --draft-head 4 --mode float,qspec --draft-length 5 --batch 1,16"],
        [
            _speedup("floats verify, over plain floats, batch 1", FLOAT_TOKENS[5], 1.7, 1),
            _speedup("floats verify, over plain floats, batch 16", FLOAT_TOKENS[5], 1.45, 16),
        ],
    ),
    "nested": Group(
        [f"{_8B} --verify w8a16 --head-bits 8 --draft-head 4 --mode w8a16,qspec --draft-length 5 --batch 1,16"],
        [
            Figure(
                "plain W8A16, batch 1, share of the limit by bytes",
                lambda results: results.one("measurements", part="step", batch=1)["share_of_bound"],
                0.72,
            ),
            _speedup("8 bits verify, over plain W8A16, batch 1", NESTED_TOKENS[5], 1.3, 1),
            _speedup("8 bits verify, over plain W8A16, batch 16", NESTED_TOKENS[5], 1.15, 16),
        ],
    ),
    "int8-cache": Group(
        [
            f"{_31} --mode w4a16 --batch 32 --context 4096",
            f"{_31} --mode w4a16 --batch 32 --context 4096 --kv int8",
            f"{_31} --mode w4a16 --batch 64 --context 1024",
            f"{_31} --mode w4a16 --batch 64 --context 1024 --kv int8",
            f"{_LONG} --batch 32 --context 4096 --draft-length 3 --kv int8",
        ],
        [
            Figure("plain, int8 cache over bf16, 32 x 4096", _over(32, 4096), 1.35),
            Figure(
                "plain, int8 cache over bf16, 64 x 1024",
                lambda results: results.ms("step", 64, 1024, 2) / results.ms("step", 64, 1024, 3),
                1.2,
            ),
            Figure(
                "budget drafts on the int8 cache over plain with bf16, 32 x 4096",
                lambda results: BUDGET_TOKENS[3] * results.ms("step", 32, 4096) / results.ms("cycle", 32, 4096, 4),
                1.7,
            ),
        ],
    ),
    "prompts": Group(
        [f"{_SERVED} --num-prompts 64 --max-new-tokens 64"],
        [
            _run("64 rows, 64 prompts x 64 tokens, tokens/s", lambda run: run["tokens_per_s"], 7_500),
            _run(
                "prompt tokens/s while reading",
                lambda run: run["num_prompt_tokens"] / (run["prefill_share"] * run["seconds"]),
                30_000,
            ),
        ],
    ),
    "many-prompts": Group(
        [f"{_SERVED} {_MANY}"],
        [
            _run("64 rows, 512 prompts x 256 tokens, tokens/s", lambda run: run["tokens_per_s"], 8_500),
            _run("the same, share of reading", lambda run: run["prefill_share"], 0.12, -1),
        ],
    ),
    "serving": Group(
        [f"{_SERVED} --num-prompts 128 --max-new-tokens 64 --load 0.5,0.8"],
        [
            _run("first token at 80% load, p50, ms", lambda run: 1000 * run["first_token_s"]["p50"], 60, -1, load=0.8),
            _run("first token at 80% load, p99, ms", lambda run: 1000 * run["first_token_s"]["p99"], 250, -1, load=0.8),
        ],
    ),
    "demo": Group(
        ["throughput --model default --mode w4a16 --batch-size 64 --num-prompts 256 --max-new-tokens 128"],
        [_run("demo model, 64 rows, tokens/s", lambda run: run["tokens_per_s"], 30_000)],
    ),
    "torch": Group(
        [f"{_SERVED} {_MANY}", f"tests.gpu.torch_serving {_MANY}"],
        [
            Figure(
                "64 rows, 512 prompts x 256 tokens, over torch's serving in bfloat16",
                lambda r: r.one("runs")["tokens_per_s"] / r.one("runs", 1)["tokens_per_s"],
                2,
            )
        ],
    ),
    "long": Group(
        [
            "qspec_jax.texts {folder}/texts --documents 1000000 --long-prompts 128 --long-contexts 8k",
            "throughput --model default --batch-size 64 --mode w4a16,qspec --draft w4a16 --draft-length 3"
            " --draft-context 512 --prompt-file {folder}/texts/long-8k.jsonl --num-prompts 480"
            " --max-prompt-tokens 7930 --ignore-eos",
        ],
        [
            Figure(
                "SmolLM2, 64 rows of 8k, budget drafts over plain, decoding alone",
                lambda results: _decoded_per_s(results, "qspec") / _decoded_per_s(results, "w4a16"),
                1.7,
            )
        ],
    ),
    **{f"auto-{context}": _of_auto(context) for context in _REQUESTS},
    "mesh": Group(_ON_MESH, _OF_MESH, num_gpus=2),
    "processes": Group(_ON_MESH, _OF_MESH, num_gpus=2, by_processes=True),
}


def run(arguments: Sequence[str], log: Path, count: int, *, seconds: float) -> int | str:
    """Runs a command, by as many processes as there are GPUs where it is more than one; what came of it."""
    # A hang is told by its tracebacks: ABRT has Python write them.
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--num-processes", str(count)]
    processes, until = [], time.monotonic() + seconds
    for index in range(count):
        several = {"CUDA_VISIBLE_DEVICES": str(index)} if count > 1 else {}
        command = [*arguments, *together, "--process-id", str(index)] if count > 1 else arguments
        with open(log if index == 0 else f"{log}.{index}", "w") as file:
            started = subprocess.Popen(command, stdout=file, stderr=file, env={**environment, **several})
        processes.append(started)
    try:
        codes = [one.wait(max(0.1, until - time.monotonic())) for one in processes]
        return next(filter(None, codes), 0)
    except subprocess.TimeoutExpired:
        return "no time left"
    finally:
        for one in processes:
            if one.poll() is None:
                one.send_signal(signal.SIGABRT)
                one.wait()


def arguments_of(command: str, path: str, folder: Path) -> list[str]:
    """Of ``python -m``: the module and what follows, with the file that it is to write its measurements to."""
    words = shlex.split(command.format(folder=folder))
    module = [] if "." in words[0] else ["qspec_jax.bench"]
    return [*module, *words, *([] if words[0] == "qspec_jax.texts" else ["--json", path])]


def measure(name: str, group: Group, folder: Path, until: float) -> None:
    """Runs the commands of a group and prints its figures; what fails, or takes too long, is a line."""
    files = []
    for place, command in enumerate(group.commands):
        path = folder / f"{name}-{place}"
        arguments = [sys.executable, "-m", *arguments_of(command, f"{path}.json", folder)]
        began = time.monotonic()
        count = group.num_gpus if group.by_processes and "--mesh" in command else 1
        code = run(arguments, Path(f"{path}.log"), count, seconds=max(1.0, until - began))
        print(f"  {time.monotonic() - began:4.0f} s  {command}" + (f"  ({code})" if code else ""), flush=True)
        is_there = not code and Path(f"{path}.json").exists()
        files.append(json.loads(Path(f"{path}.json").read_text()) if is_there else {"measurements": [], "runs": []})
        if is_there and "environment" in files[-1] and not any("environment" in one for one in files[:-1]):
            print("  {device}, driver {driver}, jax {jax}, {date}".format(**files[-1]["environment"]))
    results = Results(files)
    for figure in group.figures:
        try:
            value = figure.value(results)
        except (LookupError, TypeError, ZeroDivisionError) as error:
            print(f"  {figure.what}: not measured ({error})", flush=True)
            continue
        reached = "reached" if figure.sign * value >= figure.sign * figure.aim else "open"
        print(
            f"  {figure.what}: {value:.4g} ({'<=' if figure.sign < 0 else '>='} {figure.aim:g}: {reached})", flush=True
        )


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.figures", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", choices=[[], *GROUPS], help=", ".join(GROUPS))
    parser.add_argument("--minutes", type=float, default=60, help="after which nothing more is begun (default: 60)")
    parser.add_argument("--folder", type=Path, help="for what commands print and measure (default: a new one)")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="figures-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"in {os.fspath(folder)}")
    for name in arguments.groups or ():
        if time.monotonic() < until:
            print(name, flush=True)
            measure(name, GROUPS[name], folder, until)
    if not arguments.groups:
        for name, group in GROUPS.items():
            needs = f" ({group.num_gpus} GPUs)" if group.num_gpus > 1 else ""
            modules = ("" if "." in one.split()[0] else "qspec_jax.bench " for one in group.commands)
            commands = (f"  python -m {module}{one}" for module, one in zip(modules, group.commands, strict=True))
            print(f"{name}{needs}", *commands, sep="\n")


if __name__ == "__main__":
    main()
