"""What the commands ``python -m qspec_jax.<name>`` share: exit codes, lines on the standard error stream, the
compilation cache.

Exit codes: 0 success, 1 failure (also where nobody reads the output any more), 2 a usage error, 130 interrupted, and
143 or 129 where SIGTERM or SIGHUP interrupted it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from qspec_jax.commands.absence import tell_others
from qspec_jax.commands.environment import without_settings_of_others
from qspec_jax.commands.options import PROCESSES, weights_of
from qspec_jax.commands.output import discard, finish, is_terminal, open_standard_streams, say, show
from qspec_jax.commands.signals import minded_no_more, taken_as_interruptions
from qspec_jax.decoding.plan import MISSING_DRAFTS
from qspec_jax.device import processes
from qspec_jax.device.failures import explained
from qspec_jax.errors import CheckpointWarning, DeviceWarning, QSpecError, RequantizationWarning, UsageError

if TYPE_CHECKING:
    from qspec_jax.decoding.program_store import ProgramStore
    from qspec_jax.engine.language_model import LanguageModel

_VARIABLE = "QSPEC_JAX_CACHE"
INTERRUPTED = (130, 143, 129)  # by Ctrl-C, SIGTERM and SIGHUP


def exit_code(
    run: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Runs a command. An error is one line, unless ``--debug`` asks for its traceback.

    Args:
        run: the command; its own exit code, or None for success.
        parser: of its arguments.
        argv: not parsed yet; None for those of the process.
        interrupted: what to say when the user stops it.

    Raises:
        SystemExit: the arguments are wrong, or ask for help.
    """
    asked = argparse.Namespace(debug=False)
    given = list(sys.argv[1:] if argv is None else argv)

    def parse_and_run() -> int | None:
        _parse(parser, given, asked)
        return run(asked)

    return guarded(parse_and_run, given, debug=lambda: asked.debug, interrupted=interrupted)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str], into: argparse.Namespace) -> None:
    """Parses arguments. Processes that would wait for this one hear of what is wrong.

    Raises:
        SystemExit: the arguments are wrong, or ask for help.
    """
    helped, said = io.StringIO(), io.StringIO()  # argparse would pass over that it cannot be printed
    of_one_process: list[str] = []
    try:
        with contextlib.redirect_stdout(helped), contextlib.redirect_stderr(said):
            found, unknown = parser.parse_known_args(argv)
            into.__dict__.update(vars(found))
            of_one_process = [name for name in PROCESSES if any(one.partition("=")[0] == name for one in unknown)]
            asked = _asked_of(parser, argv)
            if of_one_process:
                named = ", ".join(of_one_process)
                asked.error(f"this command runs in one process, without {named}: start it once (docs/mesh.md)")
            if unknown:
                asked.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown, asked)}")
    except SystemExit as end:
        if text := said.getvalue():
            say(text.rstrip())
        if end.code and not of_one_process:
            tell_others(argv, said.getvalue().partition(": error: ")[2].strip(), 2)
        raise
    finally:
        if text := helped.getvalue():
            show(text, end="")


def _asked_of(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command among arguments, where there are several; else the one that is given."""
    several = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return next((one.choices[name] for one in several for name in argv if name in one.choices), parser)


def _meant(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What to do about arguments that a parser does not know, if they are like some that it knows."""
    if (bare := unknown[0])[:1] != "-":
        is_model = bare.endswith(".gguf") or os.path.sep in bare or os.path.exists(bare)
        option = "--model" if is_model else "--prompt"
        return f"; give {option} {shlex.quote(bare)}" if option in parser._option_string_actions else ""
    known = {name.lstrip("-"): name for name in parser._option_string_actions}
    meant: dict[str, None] = {}
    for argument in unknown:
        option = argument.partition("=")[0] if argument.startswith("-") else ""
        if option in parser._option_string_actions:  # before the name of a command
            return f"; give {option} after {parser.prog.rpartition(' ')[2]}"
        near = difflib.get_close_matches(option.lstrip("-"), known, 1, cutoff=0.75)
        meant.update({known[name]: None for name in near})
    return f"; did you mean {', '.join(meant)}?" if meant else ""


def guarded(
    work: Callable[[], int | None],
    argv: Sequence[str] = (),
    *,
    debug: Callable[[], bool] = lambda: False,
    interrupted: str = "interrupted",
) -> int:
    """The exit code of some work. What is known to go wrong is one line; a reader who has gone is none.

    Args:
        work: its own exit code, or None for success.
        argv: the arguments of the process, of which some may say that others wait for it.
        debug: whether to raise errors instead.
        interrupted: what to say when the user stops it.
    """
    open_standard_streams()
    with taken_as_interruptions() as signals:
        try:
            with _plain_warnings(), without_settings_of_others():
                code = work() or 0
            finish()
            return code
        except BrokenPipeError:  # whoever read the output has gone
            discard(sys.stdout)
            return 1
        except (QSpecError, OSError) as error:
            code = 2 if isinstance(error, UsageError) else 1
            if not debug():
                say(f"error: {error}")
            tell_others(argv, str(error), code)
            return _raised(error) if debug() else code
        except Exception as error:
            known = explained(error)
            is_shown = known is None or debug()
            if not is_shown:
                say(f"error: {known}")
            tell_others(argv, str(known or f"{type(error).__name__}: {error}"), 1)
            return _raised(error) if is_shown else 1
        except KeyboardInterrupt:
            say(interrupted)
            return 128 + signals[0] if signals else 130


def _raised(error: Exception) -> int:
    """Raises an error; of several processes says it, and returns the code of a failure.

    An exit that waits for devices may wait for the other processes, which have ended.
    """
    if processes.current is None:
        raise error
    say("".join(traceback.format_exception(error)).rstrip())
    return 2 if isinstance(error, UsageError) else 1


@contextlib.contextmanager
def _plain_warnings() -> Generator[None]:
    """Warnings of this library are one line, without the place in its code; so is JAX's of programs it cannot keep."""
    usual = warnings.formatwarning
    told: set[str] = set()

    def line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        if (unkept := _unkept_program(str(message))) is not None:
            first = unkept not in told
            told.add(unkept)
            return f"{unkept}\n" if first else ""
        own = issubclass(category, (CheckpointWarning, DeviceWarning, RequantizationWarning))
        return f"warning: {message}\n" if own else usual(message, category, *place, **more)

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _unkept_program(message: str) -> str | None:
    """What JAX's warning of a program that its cache does not take or give means; None for any other."""
    matched = re.match(
        r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", message, re.DOTALL
    )
    if matched is None:
        return None
    from qspec_jax.device.compilation_cache import forget, is_own  # imports JAX, which has warned

    reason, is_read = matched[3].splitlines()[0], matched[1] == "reading"
    event = "a compiled program cannot be read, and is compiled again" if is_read else "compiled programs are not kept"
    if not is_own():
        remedy = "; name another folder by JAX_COMPILATION_CACHE_DIR, which JAX is told to use, or unset it"
    elif is_read:
        remedy = "" if forget(matched[2]) else f"; delete the folder of {_VARIABLE}"
    else:
        remedy = f"; {_VARIABLE}=FOLDER names another folder, {_VARIABLE}=off none"
    return f"{event}: {reason}{remedy}"


def leave(code: int, *, at_once: bool = False) -> NoReturn:
    """Ends the process. After an interruption no thread is waited for: nobody can stop a compiler.

    Nor is one of several processes held up: JAX would wait for the others.

    Args:
        code: of the exit.
        at_once: wait for no thread in any case; somebody waits at a terminal.

    Raises:
        SystemExit: unless no thread is waited for.
    """
    if at_once or code in INTERRUPTED or processes.current is not None:
        end_at_once(code)
    minded_no_more(lambda: end_at_once(code))
    sys.exit(code)


def end_at_once(code: int) -> NoReturn:
    """Ends the process, and waits for no thread."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def event_teller() -> Callable[[str], None]:
    """Says what a model reports; once what a plan lacks, which is found out before its weights are read and after."""
    said: set[str] = set()

    def tell(event: str) -> None:
        if not event.startswith(MISSING_DRAFTS):
            say(f"{event} ...")
        elif event not in said:
            said.add(event)
            say(event)

    return tell


def load_and_compile(
    load: Callable[..., LanguageModel], arguments: argparse.Namespace, compile_ahead: Callable[[LanguageModel], None]
) -> LanguageModel:
    """The model of a command that generates; programs are found again, or compiled while its weights are read.

    Args:
        load: :func:`qspec_jax.load`.
        arguments: ``model``, ``mode``, ``dtype``, ``kernels``, ``kv``, ``mesh`` and those of :func:`weights_of`.
        compile_ahead: compiles what will be needed, with a model whose weights are not there yet.

    Raises:
        QSpecError: as ``load``.
    """
    store = keep_compiled_programs()

    def with_store(model: LanguageModel) -> None:
        model.programs.store = store
        compile_ahead(model)

    model = load(
        arguments.model,
        **weights_of(arguments),
        dtype=arguments.dtype,
        kernels=arguments.kernels,
        kv=arguments.kv,
        mesh=arguments.mesh,
        progress=is_terminal(sys.stderr),
        compile_ahead=with_store,
    )
    model.programs.store = store
    return model


def keep_compiled_programs() -> ProgramStore | None:
    """Switches the compilation cache on; a folder that cannot be written is a line, not an error.

    Returns:
        a store beside the cache, for ``model.programs.store``; None if programs are not kept, or if JAX was configured
        to use a cache, which then has all of them.
    """
    import jax

    from qspec_jax.decoding.program_store import ProgramStore
    from qspec_jax.device.compilation_cache import OFF, VARIABLE, enable_compilation_cache

    config: Any = jax.config
    configured = config.jax_compilation_cache_dir
    try:
        folder = enable_compilation_cache()
        if folder is None or configured:
            return None
        decoders = folder / "decoders"
        decoders.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        say(f"compiled programs are not kept: {error}; {VARIABLE}=FOLDER names another folder, {VARIABLE}={OFF} none")
        return None
    # Where it is another user's, JAX's own cache serves this one.
    return ProgramStore(decoders) if os.access(decoders, os.R_OK | os.W_OK | os.X_OK) else None
