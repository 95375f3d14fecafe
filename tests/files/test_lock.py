"""One writer of one output, and writes that are whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.files.lock import locked
from qspec_jax.files.whole import check_writable, write_picture, write_whole


def test_a_lock_that_is_another_file_each_time_is_tried_no_further(tmp_path, monkeypatch):
    """As a file system without numbers of files has it."""
    asked = []
    monkeypatch.setattr("os.path.samestat", lambda *stats: asked.append(stats))
    with pytest.raises(QSpecError, match="is another file each time that it is opened"), locked(tmp_path / "out"):
        pass
    assert 1 < len(asked) <= 100


def test_a_second_writer_is_refused_by_any_name_until_the_first_has_ended(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with locked(tmp_path / "out"):
        for name in ("out", "link", "../" + tmp_path.name + "/out"):
            with pytest.raises(QSpecError, match="is being written by another run"), locked(tmp_path / name):
                pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_directory_is_locked_where_nobody_may_write_beside_it(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    really = os.open

    def refused(path, flags, *mode, **options):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, flags, *mode, **options)

    with locked(tmp_path / "out"):  # by who may
        monkeypatch.setattr(os, "open", refused)
        with pytest.raises(QSpecError, match="is being written by another run"), locked(tmp_path / "out"):
            pass
    with locked(tmp_path / "out"):
        with pytest.raises(QSpecError, match="is being written by another run"), locked(tmp_path / "out"):
            pass
        with pytest.raises(QSpecError, match=r"cannot write .*new: Permission denied"), locked(tmp_path / "new"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_dies_with_its_process(tmp_path):
    hold = "import os, pathlib, sys\nfrom qspec_jax.files.lock import locked\nwith locked(pathlib.Path(sys.argv[1])):"
    source = f"{hold}\n    print('held', flush=True)\n    sys.stdin.read()"
    command = [sys.executable, "-c", source, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(QSpecError, match="is being written by another run"), locked(tmp_path / "out"):
            pass
        process.kill()
    with locked(tmp_path / "out"):  # the file that it left is in nobody's way
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path, linked = tmp_path / "report.json", tmp_path / "linked.json"
    linked.symlink_to(path)
    write_whole(linked, "old")
    path.chmod(0o640)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(QSpecError, match=r"cannot write .*report\.json: No space left on device"):
            write_whole(path, "new")
    assert path.read_text() == "old"
    write_whole(linked, "new \ud800")
    assert (path.read_text(), path.stat().st_mode & 0o777, linked.is_symlink()) == ("new ?", 0o640, True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["linked.json", "report.json"]


def test_a_picture_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    class Figure:
        def savefig(self, file, *, format):
            file.write(format.encode())

    write_picture(tmp_path / "plot.SVG", Figure())
    write_picture(tmp_path / "plot", Figure())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"plot.SVG": "svg", "plot.png": "png"}

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(QSpecError, match=r"cannot write .*plot\.png: No space left on device"):
        write_picture(tmp_path / "plot.png", Figure())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"plot.SVG": "svg", "plot.png": "png"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
def test_a_device_is_written_directly():
    write_whole(Path(os.devnull), "text")
    with pytest.raises(QSpecError, match="cannot write /dev/full: No space left on device"):
        write_whole(Path("/dev/full"), "text")


def test_where_a_file_cannot_be_written_is_said_before_the_work(tmp_path):
    check_writable(None, option="--json")
    check_writable(tmp_path / "new", option="--json")
    with pytest.raises(UsageError, match="is a directory; give the name of a file"):
        check_writable(tmp_path, option="--json")
    with pytest.raises(UsageError, match="there is no directory"):
        check_writable(tmp_path / "a" / "b", option="--json")
