"""Writes checkpoints in a process of its own, so that it can be killed at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

AFTER = 1_000_000


def _imports() -> None:
    """Loads what saving needs before the process forks; initialises no backend."""
    import orbax.checkpoint  # noqa: F401

    from qspec_jax.weights.checkpoint import restore, save  # noqa: F401


_imports()


def _save(source: Path, path: Path) -> None:
    from qspec_jax.weights.checkpoint import restore, save

    opened = restore.open_checkpoint(source)
    decoder = restore.restore_decoder(opened, scan_layers=True)
    quantization = opened.manifest.quantization
    save.save_checkpoint(path, decoder, tokenizer=None, quantization=quantization, overwrite=True)


def die_at_event(source: Path, path: Path, event: int | None, sender: Any) -> None:
    """Overwrites a checkpoint and is killed as it opens, makes, lists, renames or removes a file for the n-th time.

    Orbax' threads write on meanwhile, and what they are at is left half done. Counted are files beside and below
    ``path``, once its own folder is made; from ``AFTER`` on those behind the replacement of the manifest. Without an
    event it is not killed, and sends how many there are before that.
    """
    count, before = 0, 0

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, before
        if not (name == "open" or name.startswith(("os.", "shutil."))) or not arguments:
            return
        if not isinstance(arguments[0], str | os.PathLike) or path.parent not in Path(arguments[0]).parents:
            return
        count += count > 0 or (name == "os.mkdir" and f".writing-{os.getpid()}-" in str(arguments[0]))
        if count == event:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "os.rename" and Path(arguments[1]) == path / FILE_NAME:
            count, before = AFTER - 1, count

    from qspec_jax.weights.checkpoint.manifest import FILE_NAME

    sys.addaudithook(watch)
    _save(source, path)
    sender.send(before)


def die_at_step(source: Path, path: Path, step: int) -> None:
    """Writes a checkpoint to ``path`` and is killed just before the ``step``-th rename, replacement or removal."""
    steps = 0

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            if any(Path(argument).parent in (path, path.parent) for argument in arguments):
                steps += 1
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    os.rename, os.replace, shutil.rmtree = counted(os.rename), counted(os.replace), counted(shutil.rmtree)
    _save(source, path)
