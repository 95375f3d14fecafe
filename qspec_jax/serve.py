"""``python -m qspec_jax.serve``: a server that clients of OpenAI's API talk to. Parses and starts only.

Everything that it says goes to the standard error stream. Exit codes: 0 it was asked to end and did, 1 failure, 2 a
usage error, 130 interrupted before it served.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import contextlib
import importlib.util
import logging
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qspec_jax.commands import options
from qspec_jax.commands.output import say
from qspec_jax.commands.processes import add_processes, run_together
from qspec_jax.commands.run import end_at_once, event_teller, exit_code, load_and_compile
from qspec_jax.decoding.plan import AUTO, LOOKUP_MODES, MODES
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.weights.resolve import check_model_name

if TYPE_CHECKING:
    from qspec_jax.engine.language_model import LanguageModel
    from qspec_jax.engine.service import Service
    from qspec_jax.serving.limits import Limits
    from qspec_jax.serving.metrics import Metrics

KEY_VARIABLE = "QSPEC_JAX_API_KEY"
_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
_CLOSE_S = 10.0  # that the engine may take to stop
_ROWS = 8
# Each step of a CPU reads the whole cache, which of 8 rows of 4,096 positions is 8 times as much.
_ROWS_OF_A_CPU, _LENGTH_ON_A_CPU = 4, 1024


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.serve", description="Serve a model to clients of OpenAI's API."
    )
    add = parser.add_argument
    model = "hub id, Hugging Face directory, GGUF file or checkpoint (default: SmolLM2-135M-Instruct)"
    options.add_model_first(parser, model)
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="0 is any that is free (default: 8000)")
    key = f"what clients have to send as their key; else the variable {KEY_VARIABLE} (default: none)"
    add("--api-key-file", type=Path, metavar="FILE", help="a file with " + key)
    add("--name", metavar="NAME", help="of the model, for clients (default: that of its file or directory)")
    modes = (*MODES, *LOOKUP_MODES, AUTO)
    add("--mode", choices=modes, default=AUTO, help="auto: the fastest, as measured (default: auto)")
    options.add_draft(parser)
    options.add_draft_length(parser)
    options.add_draft_context(parser)
    options.add_verify(parser)
    add(
        "--max-seq-len",
        type=int,
        metavar="N",
        help=f"cache positions of a row (default: the context, up to 4096; on a CPU up to {_LENGTH_ON_A_CPU})",
    )
    text = f"rows of the batch: answers that are made together (default: {_ROWS}; on a CPU {_ROWS_OF_A_CPU})"
    add("--batch-size", "--slots", type=int, metavar="N", help=text)
    options.add_dtype(parser)
    options.add_group_size(parser, "inputs per weight scale where the checkpoint is not 4-bit already (default: 32)")
    options.add_kernels(parser)
    options.add_kv(parser)
    options.add_mesh(parser)
    ahead = "compile at the start what sampling needs; all has penalties, biases and log-probabilities (default: usual)"
    add("--compile", choices=("usual", "all"), default="usual", help=ahead)
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--max-waiting", type=int, default=64, metavar="N", help="answers that wait for a row (default: 64)")
    add("--max-body", type=int, default=2**20, metavar="BYTES", help="of a request (default: 1048576)")
    add("--max-prompt-tokens", type=int, metavar="N", help="of a prompt (default: what a row holds)")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (default: what a row holds)")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds for a request (default: 600)")
    add("--body-timeout", type=float, default=30.0, metavar="S", help="seconds for its body to come (default: 30)")
    add("--grace", type=float, default=30.0, metavar="S", help="seconds for what runs at the end (default: 30)")
    add_processes(parser)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser(), argv)


def run(arguments: argparse.Namespace) -> int:
    """Checks the arguments, loads the model and serves it; the exit code."""
    return run_together("serve", _run, arguments, check=_check)


def _run(arguments: argparse.Namespace) -> int:
    check_model_name(arguments.model)
    api_key = _api_key(arguments.api_key_file)
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise QSpecError(f"a server needs {missing[0]}: pip install 'qspec-jax[serve]'")
    from qspec_jax.serving.listening import bind

    with contextlib.closing(bind(arguments.host, arguments.port)) as listening:
        return _serve(arguments, listening, api_key)


def _serve(arguments: argparse.Namespace, listening: socket.socket, api_key: str | None) -> int:
    for said in options.without_effect(arguments):
        say(said)
    say("starting ...")
    from qspec_jax.serving.api import Api
    from qspec_jax.serving.listening import address_of, is_loopback
    from qspec_jax.serving.metrics import Metrics
    from qspec_jax.serving.server import Server

    metrics, limits = Metrics(), _limits(arguments)
    model, service = _load(arguments, metrics)
    name = arguments.name or model.name
    metrics.watch(service)
    server = Server(Api(service, metrics, model=name, limits=limits, api_key=api_key), limits, say=say)
    if api_key is None and not is_loopback(listening):
        say(f"warning: whoever reaches {address_of(listening)} may use it; --api-key-file FILE asks for a key")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # nothing of each client that left
    server.listen(listening)
    say(f"serving {name} at {address_of(listening)}/v1; Ctrl-C ends it")
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn raises the signal again that ended it
        if not server.started:
            raise
    finally:
        service.close(_CLOSE_S)
    say("ended")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what makes no sense for any model, before one is loaded."""
    options.check_positive(arguments, "batch_size", "max_seq_len", "max_body", "max_prompt_tokens", "max_new_tokens")
    options.check_counts(arguments, "batch_size", "max_waiting")
    options.check_draft_length(arguments.draft_length)
    options.check_weights(arguments)
    options.check_drafts(arguments, [arguments.draft], [arguments.draft_context], [arguments.mode])
    if arguments.max_waiting < 0:
        raise UsageError(f"--max-waiting {arguments.max_waiting} must be at least 0")
    if not 0 <= arguments.port <= 65535:
        raise UsageError(f"--port {arguments.port} must be between 0 and 65535")
    for name in ("timeout", "body_timeout", "grace"):
        value, least = getattr(arguments, name), 0 if name == "grace" else 0.001
        if not least <= value <= 1e6 or math.isnan(value):
            raise UsageError(f"{options.option_of(name)} {value:g} must be between {least:g} and 1e6")
    if arguments.name is not None and not arguments.name.strip():
        raise UsageError("--name is empty; give one, or leave it out")


def _api_key(path: Path | None) -> str | None:
    """The key that clients need; None if they need none.

    Raises:
        UsageError: the file cannot be read, or there is no key in it.
    """
    where, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if path is not None:
        try:
            where, key = f"--api-key-file {path}", path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise UsageError(f"cannot read --api-key-file {path}: {error}") from error
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{where} has no key: use printable ASCII characters without blanks")
    return key


def _limits(arguments: argparse.Namespace) -> Limits:
    from qspec_jax.serving.limits import Limits

    return Limits(
        max_waiting=arguments.max_waiting,
        max_body=arguments.max_body,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        request_s=arguments.timeout,
        body_s=arguments.body_timeout,
        grace_s=arguments.grace,
    )


def _size(arguments: argparse.Namespace, model: LanguageModel) -> dict[str, int | None]:
    """Rows of the batch, and positions of each."""
    import jax

    rows, length = _ROWS, None
    if jax.default_backend() == "cpu":
        rows, length = _ROWS_OF_A_CPU, min(_LENGTH_ON_A_CPU, model.config.max_position_embeddings)
    return {"batch_size": arguments.batch_size or rows, "max_seq_len": arguments.max_seq_len or length}


def _load(arguments: argparse.Namespace, metrics: Metrics) -> tuple[LanguageModel, Service]:
    """The model, and a service with the programs that usual requests need."""
    import qspec_jax

    tell = event_teller()

    def service_of(model: LanguageModel) -> Service:
        plan = model.plan(arguments.mode, **options.plan_options(arguments))
        settings = _size(arguments, model)
        return model.service(plan, **settings, on_event=tell, on_end=metrics.count_answer)

    def compile_ahead(model: LanguageModel) -> None:
        service_of(model).compile(everything=arguments.compile == "all")
        say(f"programs took {model.programs.compile_s:.1f} s")

    model = load_and_compile(qspec_jax.load, arguments, compile_ahead)
    service = service_of(model)
    service.compile(everything=arguments.compile == "all")
    service.allocate()
    return model, service


if __name__ == "__main__":
    end_at_once(main())  # nobody can stop a compiler
