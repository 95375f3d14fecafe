"""Paths that Orbax and TensorStore take for what they are."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

_PLAIN = re.compile(r"[\w /.,+=@~%-]+")


@contextlib.contextmanager
def plain_path(folder: Path) -> Generator[Path]:
    """A path of a folder: its own where that is plain, else a link's that is gone afterwards.

    Below a folder ``[1]`` Orbax writes files and does not find them again to complete them, without an error. It takes
    ``gs:`` for a bucket and a backslash for a slash, and names that are no UTF-8 for none.
    """
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="qspec-jax-") as temporary:
        link = Path(temporary) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link
