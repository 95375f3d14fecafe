"""What was typed at earlier conversations: a file that its user alone can read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from qspec_jax.commands.output import say


def history_path() -> Path:
    """``chat-history`` in the user's cache folder.

    Raises:
        OSError: the user has no home directory.
    """
    from qspec_jax.device.compilation_cache import default_folder

    return default_folder().parent / "chat-history"


def open_history(*, is_kept: bool) -> History:
    """The history; of this conversation alone where it is not kept, or cannot be, which is a line and no error."""
    if not is_kept:
        return InMemoryHistory()
    try:
        path = history_path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.chmod(path, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        _say_not_kept(error)
        return InMemoryHistory()
    return _PrivateHistory(str(path))


class _PrivateHistory(FileHistory):
    """A history whose file may not be read, or become full, or go away."""

    _is_kept = True

    def load_history_strings(self) -> Iterable[str]:
        try:
            return super().load_history_strings()
        except OSError as error:
            self._keep_no_more(error)
            return tuple(self._loaded_strings)

    def store_string(self, string: str) -> None:
        if self._is_kept:
            try:
                super().store_string(string.encode(errors="replace").decode())
            except OSError as error:
                self._keep_no_more(error)

    def _keep_no_more(self, error: OSError) -> None:
        if self._is_kept:
            self._is_kept = False
            _say_not_kept(error)


def _say_not_kept(error: OSError) -> None:
    say(f"what you type is not kept for the next time: {error}; --no-history does without")
