"""The folder of compiled programs keeps a size: what was not used for longest goes, and nothing else."""

from __future__ import annotations

import os

import pytest

from qspec_jax.decoding.program_store import ProgramStore
from qspec_jax.device.cache_size import VARIABLE, most_bytes, shrink
from qspec_jax.errors import UsageError

KEY = "0123456789abcdef" * 4
OURS = [
    f"jit_loop-{KEY}-cache",
    f"jit_loop-{KEY}-atime",
    f"jit__einsum.1-{KEY}-cache",
    f"decoders/{KEY}",
    "decoders/new-x1y2",
    f"costs/{KEY}.json",
]
OTHERS = ["notes.txt", "thesis-cache", f"{KEY}", f"decoders/{KEY}.txt", "costs/table.json", f"deeper/jit_x-{KEY}-cache"]


@pytest.fixture
def folder(tmp_path):
    """Files of 100 bytes, each used a minute after the one before it."""
    for minute, name in enumerate([*OURS, *OTHERS]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (60 * minute, 60 * minute))
    return tmp_path


def left(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("num_bytes", "kept"), [(None, 6), (600, 6), (599, 5), (250, 2), (1, 0)])
def test_what_was_not_used_for_longest_goes_first(folder, num_bytes, kept):
    assert shrink(folder, num_bytes) == 100 * (len(OURS) - kept)
    assert left(folder) == {*OURS[len(OURS) - kept :], *OTHERS}


def test_a_file_counts_as_used_when_it_was_read_or_written_last(folder):
    os.utime(folder / OURS[0], (3600, 0))
    os.utime(folder / OURS[1], (0, 3600))
    assert shrink(folder, 200) == 400
    assert left(folder) == {*OURS[:2], *OTHERS}


def test_a_file_that_cannot_be_removed_is_left_and_another_one_goes(folder, monkeypatch):
    unlink = type(folder).unlink

    def refuse(path, **options):
        if path.name == f"jit_loop-{KEY}-cache":
            raise PermissionError
        unlink(path, **options)

    monkeypatch.setattr(type(folder), "unlink", refuse)
    assert shrink(folder, 500) == 100
    assert left(folder) == {OURS[0], *OURS[2:], *OTHERS}


def test_a_link_is_not_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model"
    elsewhere.write_bytes(bytes(1000))
    (folder / f"jit_y-{KEY}-cache").symlink_to(elsewhere)
    shrink(folder, 1)
    assert elsewhere.exists()


def test_no_folder_is_no_error(tmp_path):
    assert shrink(tmp_path / "missing", 10) == 0


def test_a_program_that_is_looked_up_counts_as_used(folder):
    ProgramStore(folder / "decoders").load(KEY, None)
    shrink(folder, 100)
    assert left(folder) == {f"decoders/{KEY}", *OTHERS}


@pytest.mark.parametrize(
    ("text", "expected"), [("", 10**10), ("2.5", 2_500_000_000), ("unlimited", None), (" Unlimited ", None)]
)
def test_the_environment_names_the_size(monkeypatch, text, expected):
    monkeypatch.setenv(VARIABLE, text)
    assert most_bytes() == expected


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "5GB", "off"])
def test_a_size_of_no_sense_is_refused(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UsageError, match=r"QSPEC_JAX_CACHE_GB=.*use a number of gigabytes above 0"):
        most_bytes()
