"""One of several processes that ends before it has joined the others: they hear of it, instead of waiting for it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from qspec_jax.commands.options import PROCESSES
from qspec_jax.commands.output import say
from qspec_jax.device import processes
from qspec_jax.errors import UsageError


def tell_others(argv: Sequence[str], error: str, code: int) -> None:
    """Has the other processes end with the error that this one ends with; nothing where it is alone, or has joined.

    Args:
        argv: the arguments of this process, of which others may be wrong.
        error: the line that it has said.
        code: its exit code, and theirs.
    """
    if processes.has_met or not any(one.partition("=")[0] == PROCESSES[0] for one in argv):
        return
    from qspec_jax.device import meeting

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in PROCESSES:
        parser.add_argument(option)
    with contextlib.suppress(argparse.ArgumentError, UsageError, KeyboardInterrupt):
        found, _ = parser.parse_known_args(list(argv))
        if found.coordinator == meeting.AUTO:
            return
        count, process = (_number(value) for value in (found.num_processes, found.process_id))
        if process is not None and count is not None and process >= count:
            process = None
        waits = f"telling the other processes, for up to {meeting.TELL_S} s; Ctrl-C ends this"
        meeting.tell_of_failure(found.coordinator, count, process, error, code, waits=lambda: say(waits))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
