"""Writes checkpoints in a process of its own, so that it can be killed at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any


def _imports() -> None:
    """Loads what saving needs before the process forks; initialises no backend."""
    import orbax.checkpoint  # noqa: F401

    import qspec_jax.weights.checkpoint  # noqa: F401


_imports()


def _save(source: Path, path: Path) -> None:
    from qspec_jax.weights.checkpoint import restore, save

    opened = restore.open_checkpoint(source)
    decoder = restore.restore_decoder(opened, scan_layers=True)
    quantization = opened.manifest.quantization
    save.save_checkpoint(path, decoder, tokenizer=None, quantization=quantization, overwrite=True)


def overwrite_forever(sources: list[Path], path: Path, ready: Any) -> None:
    """Writes one checkpoint after the other to ``path`` until killed; first sends the seconds that a write takes."""
    for _ in range(2):
        start = time.perf_counter()
        _save(sources[0], path.parent / "warm-up")
    ready.send(time.perf_counter() - start)
    while True:
        for source in sources:
            _save(source, path)


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
