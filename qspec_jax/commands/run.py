"""What the commands ``python -m qspec_jax.<name>`` share: exit codes, lines on the standard error stream, the
compilation cache.

Exit codes: 0 success, 1 failure, 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qspec_jax.errors import QSpecError, UsageError

if TYPE_CHECKING:
    from qspec_jax.decoding.program_store import ProgramStore


def exit_code(
    run: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace, *, interrupted: str = "interrupted"
) -> int:
    """Runs a command. An error is one line, unless ``arguments.debug`` asks for its traceback.

    Args:
        run: the command; its own exit code, or None for success.
        arguments: parsed.
        interrupted: what to say when the user stops it.
    """
    try:
        return run(arguments) or 0
    except QSpecError as error:
        if arguments.debug:
            raise
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        say(interrupted)
        return 130
    except BrokenPipeError:  # whoever read the output has gone
        sys.stderr.close()
        return 1


def say(message: str) -> None:
    """A line on the standard error stream, above a progress bar that is there."""
    # Imported only by who draws a bar, perhaps in another thread at this moment.
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bars is None:
        print(message, file=sys.stderr, flush=True)
    else:
        bars.write(message, file=sys.stderr)
        sys.stderr.flush()


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
