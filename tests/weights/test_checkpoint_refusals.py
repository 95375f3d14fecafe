"""What is refused when a checkpoint is opened, restored or written, and what the message names."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import qspec_jax
from qspec_jax import CheckpointError, QuantConfig, UsageError
from qspec_jax.weights.checkpoint import late_errors, manifest, restore
from qspec_jax.weights.checkpoint import save as save_module
from qspec_jax.weights.checkpoint.manifest import FORMAT_VERSION
from qspec_jax.weights.checkpoint.restore import open_checkpoint, restore_decoder
from qspec_jax.weights.checkpoint.save import save_checkpoint
from qspec_jax.weights.resolve import open_source
from tests import tiny

DOWN = "layers.1.mlp.down.weight.packed"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that no test changes."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(path, tiny.decoder(), tokenizer=None, quantization=QuantConfig())
    return path


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def rewrite(path, change):
    """Changes ``qspec.json`` and gives it the checksum of what it then says."""
    file = path / manifest.FILE_NAME
    content = json.loads(file.read_text())
    change(content)
    content.pop("sha256")
    file.write_text(json.dumps({"sha256": manifest.checksum(content), **content}))


def data_file(path, group):
    """The largest of the files that hold the arrays of a group."""
    return max(path.glob(f"data-*/arrays/{group}/**/d/*"), key=lambda file: file.stat().st_size)


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def assert_holds(path, decoder):
    """The checkpoint restores to the very arrays of a decoder."""
    restored = restore_decoder(open_checkpoint(path))
    found, expected = (jax.tree.leaves_with_path(nnx.state(one)) for one in (restored, decoder))
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def refusal(path):
    """The message with which opening or restoring is refused."""
    with pytest.raises(CheckpointError) as caught:
        restore_decoder(open_checkpoint(path))
    return str(caught.value)


def test_a_newer_format_says_to_upgrade_even_if_nothing_else_is_understood(copy):
    (copy / manifest.FILE_NAME).write_text(
        json.dumps({"format": manifest.FORMAT, "format_version": FORMAT_VERSION + 1, "weights": "elsewhere"})
    )
    message = refusal(copy)
    assert f"written in format {FORMAT_VERSION + 1} by a newer version" in message
    assert "pip install --upgrade qspec-jax" in message


def test_a_directory_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a qspec-jax checkpoint: it has no qspec.json; give a directory that" in refusal(tmp_path)
    assert "is not a qspec-jax checkpoint: it has no qspec.json" in refusal(tmp_path / "absent")
    assert "is not a qspec-jax checkpoint: it has no qspec.json" in refusal(tmp_path / "notes.txt")
    (tmp_path / manifest.FILE_NAME).write_text('{"answer": 42}')
    assert "its qspec.json is something else's" in refusal(tmp_path)


def test_a_truncated_manifest(copy):
    file = copy / manifest.FILE_NAME
    file.write_text(file.read_text()[:-200])
    assert "qspec.json is truncated or damaged (not valid JSON" in refusal(copy)


def test_a_setting_changed_by_hand_is_noticed(copy):
    file = copy / manifest.FILE_NAME
    file.write_text(file.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    assert "qspec.json has been altered: its checksum does not match" in refusal(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("model"),
        lambda content: content["model"].update(num_experts=8),
        lambda content: content["quantization"].update(group_size=48),
        lambda content: content.update(data="../elsewhere"),
        lambda content: content.update(arrays=[1]),
        lambda content: content["formats"].pop("mlp.down"),
        lambda content: content["files"].update({"../../secret": {"num_bytes": 1, "sha256": ""}}),
    ],
)
def test_a_manifest_that_makes_no_sense(copy, change):
    rewrite(copy, change)
    assert "qspec.json cannot be understood" in refusal(copy)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content["model"].update(num_layers=3), "layers.2.attention.output.weight.packed is missing"),
        (lambda content: content["model"].update(num_layers=1), "layers.1.attention.output.weight.packed is unknown"),
        (lambda content: content["model"].update(vocab_size=97), "embedding is [96, 64], expected [97, 64]"),
        (lambda content: content["model"].update(intermediate_size=192), f"{DOWN} is [64, 64], expected [64, 96]"),
        (lambda content: content["model"].update(tie_word_embeddings=True), "lm_head is unknown"),
        (lambda content: content["formats"]["mlp.down"].update(symmetric=True), "mlp.down.weight.offset is unknown"),
        (lambda content: content["formats"]["mlp.down"].update(group_size=64), "is [4, 64], expected [2, 64]"),
        (lambda content: content["arrays"].pop(DOWN), f"{DOWN} is missing"),
        (lambda content: content["arrays"][DOWN].update(dtype="int8"), f"{DOWN} is int8"),
    ],
)
def test_a_config_that_does_not_fit_the_arrays(copy, change, named):
    rewrite(copy, change)
    message = refusal(copy)
    assert "its arrays do not fit its config" in message
    assert named in message


def test_a_missing_file_is_named(copy):
    file = data_file(copy, "layers.1")
    file.unlink()
    assert f"missing: {file.relative_to(next(copy.glob('data-*')))}" in refusal(copy)


def test_a_missing_data_directory(copy):
    shutil.rmtree(next(copy.glob("data-*")))
    assert "is damaged: missing: arrays/" in refusal(copy)


def test_a_truncated_file_is_named(copy):
    file = data_file(copy, "model")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    assert f"{file.name} ({size // 2} of {size} bytes)" in refusal(copy)


def test_an_altered_file_is_named(copy):
    file = data_file(copy, "layers.1")
    flip_a_byte(file)
    message = refusal(copy)
    assert f"{file.name} (hash mismatch)" in message
    assert "fetch the checkpoint again, or write it again" in message


def test_files_too_large_to_check_first_are_noticed_when_they_are_read(copy, monkeypatch):
    monkeypatch.setattr(restore, "_SMALL_BYTES", -1)
    flip_a_byte(data_file(copy, "layers.1"))
    message = refusal(copy)
    assert "layers.1" in message
    assert "hash mismatch" in message or "altered files: arrays/layers.1/" in message


def test_an_altered_array_is_named(copy):
    rewrite(copy, lambda content: content["arrays"][DOWN].update(sha256="0" * 64))
    assert f"altered since it was written (hash mismatch): {DOWN};" in refusal(copy)


def test_arrays_of_another_model_are_noticed_even_where_they_fit(copy, tmp_path):
    """A whole data directory that was exchanged is consistent in itself."""
    other = tmp_path / "other"
    save_checkpoint(other, tiny.decoder(seed=1), tokenizer=None, quantization=QuantConfig())
    (data,) = copy.glob("data-*")
    shutil.rmtree(data)
    shutil.copytree(next(other.glob("data-*")), data)
    assert "is damaged" in refusal(copy)


def test_commands_refuse_in_the_same_words(copy):
    flip_a_byte(data_file(copy, "layers.1"))
    for opening in (qspec_jax.load, open_source):
        with pytest.raises(CheckpointError, match="hash mismatch"):
            opening(copy)


def test_a_checkpoint_is_not_overwritten_unasked(copy):
    before = (copy / manifest.FILE_NAME).read_bytes()
    with pytest.raises(UsageError, match=r"is a checkpoint already; give another path, or --overwrite"):
        save_checkpoint(copy, tiny.decoder(seed=1), tokenizer=None, quantization=QuantConfig())
    assert (copy / manifest.FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("file", ["notes.txt", manifest.FILE_NAME])
def test_what_is_no_checkpoint_is_never_overwritten(tmp_path, file):
    path = tmp_path / "thesis"
    path.mkdir()
    (path / file).write_text("{}")
    with pytest.raises(CheckpointError, match="is not a qspec-jax checkpoint"):
        save_checkpoint(path, tiny.decoder(), tokenizer=None, quantization=QuantConfig(), overwrite=True)
    assert (path / file).read_text() == "{}"


def test_an_empty_directory_may_be_written_to(tmp_path):
    save_checkpoint(tmp_path, tiny.decoder(seed=1), tokenizer=None, quantization=QuantConfig())
    assert_holds(tmp_path, tiny.decoder(seed=1))


def test_a_directory_with_what_a_disk_and_a_killed_writer_leave_counts_as_empty(tmp_path):
    path = tmp_path / "of [mine]"
    left = [path / f".{path.name}.writing-{2**22}-0123abcd", path / f"data-{'0' * 16}"]
    for folder in (*left, path / "lost+found"):
        (folder / "arrays").mkdir(parents=True)
    written = save_checkpoint(path, tiny.decoder(), tokenizer=None, quantization=QuantConfig())
    assert {file.name for file in path.iterdir()} == {manifest.FILE_NAME, written.data, "lost+found"}
    assert_holds(path, tiny.decoder())


@pytest.mark.parametrize("name", ["run [1]", "gs:", "a\\b", "\udcff"])
def test_a_directory_of_any_name_holds_what_was_saved(tmp_path, name):
    save_checkpoint(tmp_path / name, tiny.decoder(), tokenizer=None, quantization=QuantConfig())
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert_holds(tmp_path / name, tiny.decoder())


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stands_for_the_directory_that_it_names(tmp_path, there):
    link, path = tmp_path / "link", tmp_path / "elsewhere" / "checkpoint"
    path.parent.mkdir()
    link.symlink_to(path)
    if there:
        path.mkdir()
    save_checkpoint(link, tiny.decoder(), tokenizer=None, quantization=QuantConfig())
    assert link.is_symlink()
    assert list(path.parent.iterdir()) == [path]
    assert_holds(path, tiny.decoder())


@pytest.mark.parametrize("overwrites", [True, False])
def test_a_directory_may_be_a_disk_of_its_own(copy, monkeypatch, overwrites):
    """Nothing is renamed across its border, and it is not replaced: it is busy."""
    if not overwrites:
        shutil.rmtree(copy)
        copy.mkdir()

    def within(move):
        def call(source, destination):
            inside = [copy in Path(end).parents for end in (source, destination)]
            if not all(inside):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            move(source, destination)

        return call

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, within(getattr(os, name)))
    save_checkpoint(copy, tiny.decoder(seed=1), tokenizer=None, quantization=QuantConfig(), overwrite=overwrites)
    assert_holds(copy, tiny.decoder(seed=1))


def test_overwriting_replaces_the_checkpoint_and_nothing_else(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "data-mine").mkdir()
    written = save_checkpoint(copy, tiny.decoder(seed=1), tokenizer=None, quantization=QuantConfig(), overwrite=True)
    assert {file.name for file in copy.iterdir()} == {"notes.txt", "data-mine", manifest.FILE_NAME, written.data}
    assert list(copy.parent.iterdir()) == [copy]
    assert_holds(copy, tiny.decoder(seed=1))


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_litter(copy, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module, "_flush", full)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*: No space left on device"):
        save_checkpoint(copy, tiny.decoder(seed=1), tokenizer=None, quantization=QuantConfig(), overwrite=True)
    assert list(copy.parent.iterdir()) == [copy]
    assert_holds(copy, tiny.decoder())


@pytest.mark.usefixtures("timers")
def test_what_late_threads_make_anew_after_a_failure_is_removed_too(tmp_path, monkeypatch):
    remove, left = shutil.rmtree, [3]

    def made_anew(folder, **options):
        remove(folder, **options)
        if left[0]:
            left[0] -= 1
            (folder / "data-0").mkdir(parents=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module, "_flush", full)
    monkeypatch.setattr(save_module, "_PAUSE_S", 0)
    monkeypatch.setattr(shutil, "rmtree", made_anew)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(tmp_path / "c", tiny.decoder(), tokenizer=None, quantization=QuantConfig())
    assert (left, list(tmp_path.iterdir())) == ([0], [])


@pytest.fixture
def timers(monkeypatch):
    """What is to be done later on, and is done as a test says so."""
    made = []

    class Timer:
        def __init__(self, seconds, work):
            self.work = work

        def start(self):
            made.append(self.work)

    monkeypatch.setattr(late_errors.threading, "Timer", Timer)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # whatever failed in this process before
    for name in ("asyncio", "absl"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    monkeypatch.setattr(save_module, "_late_errors", late_errors.LateErrors())
    return made


@pytest.mark.parametrize("name", ["asyncio", "absl"])
@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (CheckpointError, "FAILED [os_error_code='28']"),
        (KeyboardInterrupt, 'NOT_FOUND: Error writing "a/0" of local file "/x/.c.writing-1-ab/data-0/manifest.ocdbt"'),
    ],
)
def test_threads_that_end_after_a_failure_print_nothing(monkeypatch, timers, name, failure, text):
    late = RuntimeError("Event loop is closed"), OSError(text)
    other = RuntimeError("other"), OSError("other")
    printed, log = [], logging.getLogger(name)
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    for fails, expected in ((True, 2), (False, 2), (None, 4)):
        if fails is None:
            timers.pop()()
        else:
            with contextlib.suppress(failure), save_module._late_errors.silenced():
                if fails:
                    raise failure
        for raised, logged in (late, other):
            sys.unraisablehook(SimpleNamespace(exc_type=type(raised), exc_value=raised))
            if log.filter(log.makeRecord(name, 40, "", 0, "never retrieved", (), (OSError, logged, None))):
                printed.append(logged)
        assert len(printed) == expected
        assert printed[-1] is other[1]
        printed.clear()


def test_however_many_saves_fail_nothing_stays_silenced(timers):
    log = logging.getLogger("absl")
    before, silenced = (sys.unraisablehook, []), save_module._late_errors.silenced
    for _ in range(3):
        with contextlib.suppress(CheckpointError), silenced():
            raise CheckpointError
    assert len(log.filters) == 1
    for later in timers:
        assert sys.unraisablehook is not before[0]
        later()
    assert (sys.unraisablehook, log.filters) == before


@pytest.mark.parametrize("there", [True, False])
def test_where_nobody_can_write_is_said_before_anything_long(tmp_path, monkeypatch, there):
    path = tmp_path if there else tmp_path / "c"
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)  # whoever runs the tests
    with pytest.raises(CheckpointError, match=rf"cannot write the checkpoint {path}: {tmp_path} cannot be written"):
        save_module.check_destination(path, 1, overwrite=False)


def test_what_would_be_in_the_way_of_the_writer_is_said_before_anything_long(tmp_path, monkeypatch):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refused = {"circle": "symbolic links", "n" * 300: "File name too long", "n" * 250: "File name too long"}
    for name, reason in refused.items():
        with pytest.raises(CheckpointError, match=rf"^cannot write the checkpoint .*{name}: .*{reason}; give another"):
            save_module.check_destination(tmp_path / name, 1, overwrite=False)

    def full(*_, **__):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    save_module.check_destination(tmp_path / "a" / "b", 1, overwrite=False)
    monkeypatch.setattr(Path, "mkdir", full)  # a disk that is read-only, or out of inodes, or a quota
    for path in (tmp_path / "c", tmp_path / "a" / "b"):
        with pytest.raises(CheckpointError, match="quota"):
            save_module.check_destination(path, 1, overwrite=False)
    assert [one.name for one in tmp_path.iterdir()] == ["circle"]


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'file'} is no directory; give another path"):
        save_module.check_destination(tmp_path / "file" / "c", 1, overwrite=False)


def test_a_disk_that_is_too_small_is_refused_with_numbers(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1_000_000))
    with pytest.raises(
        CheckpointError, match=r"needs up to [\d.]+ [kM]B and .* has 1\.00 MB free; free space, or give"
    ):
        save_checkpoint(tmp_path / "c", tiny.decoder(), tokenizer=None, quantization=QuantConfig())
    assert not list(tmp_path.iterdir())
