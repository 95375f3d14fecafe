"""A program is taken from the store where everything that makes it is the same, and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import pallas_kernels
import qspec_jax
from qspec_jax.commands.run import keep_compiled_programs
from qspec_jax.decoding import program_store
from qspec_jax.decoding.program_store import ProgramStore, program_keys
from qspec_jax.device import compilation_cache
from qspec_jax.engine.language_model import LanguageModel
from tests import tiny

ROOT = Path(__file__).parents[2]
NAME = ("loop", "plan", "shape")
# As a command does, in another process: prints what is generated, compiled and lowered.
GENERATE = """
import sys
from pathlib import Path
import jax
from qspec_jax.decoding.program_store import ProgramStore
from qspec_jax.decoding.programs import Programs
from tests import tiny
lowered = []
for name in ("lower_prefill", "lower_loop"):
    lower = getattr(Programs, name)
    setattr(Programs, name, lambda *args, lower=lower: lowered.append(1) or lower(*args))
model = tiny.language_model()
model.programs.store = ProgramStore(Path(sys.argv[1]))
(result,) = model.generate([[1, 2, 3]], mode="w4a16", max_new_tokens=9)
print(result.token_ids, model.num_compilations, len(lowered))
"""


def generate(folder: Path, **environment: str) -> tuple[str, str]:
    arguments = [sys.executable, "-c", GENERATE, str(folder)]
    finished = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True, text=True
    )
    assert "machine feature" not in finished.stderr
    tokens, counts = finished.stdout.rsplit("]", 1)
    return tokens, counts.strip()


def stored_model(folder: Path) -> LanguageModel:
    model = tiny.language_model()
    model.programs.store = ProgramStore(folder)
    return model


def tokens_of(model: LanguageModel) -> list[int]:
    return model.generate([[1, 2, 3]], mode="w4a16", max_new_tokens=9)[0].token_ids


def key(**options) -> str:
    return program_keys([NAME], tiny.decoder(**options))[NAME]


def test_another_process_traces_and_compiles_nothing_and_yields_the_same(tmp_path):
    several = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}  # of which it runs on the first
    tokens, counts = generate(tmp_path, **several)
    assert counts == "2 2"
    assert generate(tmp_path, **several) == (tokens, "0 0")
    model = stored_model(tmp_path)
    assert (str(tokens_of(model)), model.num_compilations) == (f"{tokens}]", 2)  # another machine


def test_a_damaged_or_misplaced_file_is_compiled_anew_and_replaced(tmp_path):
    expected = tokens_of(stored_model(tmp_path))
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    first, second = whole
    data = whole[first]
    for damaged in (data[:-100], data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], whole[second]):
        first.write_bytes(damaged)
        model = stored_model(tmp_path)
        assert tokens_of(model) == expected
        assert model.num_compilations == 1
        assert {file.name for file in tmp_path.iterdir()} == {file.name for file in whole}
    model = stored_model(tmp_path)
    assert tokens_of(model) == expected
    assert model.num_compilations == 0


def test_nothing_changes_without_a_store_or_with_one_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert keep_compiled_programs() is None  # QSPEC_JAX_CACHE=off under pytest
    expected = tokens_of(tiny.language_model())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    assert tokens_of(stored_model(tmp_path / "file" / "below")) == expected
    assert config.jax_enable_compilation_cache == before


@pytest.mark.parametrize("configured", [False, True])
def test_a_command_has_a_store_unless_jax_has_a_cache_of_its_own(tmp_path, monkeypatch, configured):
    config: Any = jax.config
    before = config.jax_compilation_cache_dir
    monkeypatch.setattr(compilation_cache, "enable_compilation_cache", lambda: tmp_path)
    config.update("jax_compilation_cache_dir", str(tmp_path) if configured else None)
    try:
        store = keep_compiled_programs()
    finally:
        config.update("jax_compilation_cache_dir", before)
    assert store == (None if configured else ProgramStore(tmp_path / "decoders"))
    assert (tmp_path / "decoders").exists() != configured


def test_a_program_that_jax_cannot_serialise_is_not_kept(tmp_path):
    def calls_back(x):
        return jax.pure_callback(lambda value: value, jax.ShapeDtypeStruct((), np.float32), x)

    program = jax.jit(calls_back).lower(np.float32(1)).compile()
    ProgramStore(tmp_path).save("key", program)
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_that_of_an_equal_decoder_with_other_weights():
    assert key() == key(seed=1)


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"scan_layers": False}, {"quantization": None}, {"kernels": None}]
)
def test_another_decoder_has_another_key(options):
    assert key(**options) != key()


def test_a_static_attribute_alone_changes_the_key():
    decoder = tiny.decoder()
    decoder.layers[0].attention_norm.epsilon *= 2
    assert program_keys([NAME], decoder)[NAME] != key()
    assert program_keys([NAME], tiny.decoder()) != program_keys([(*NAME, "other")], tiny.decoder())


def test_the_surroundings_change_the_key(monkeypatch):
    keys = {key()}
    with jax.default_matmul_precision("highest"):
        keys.add(key())
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        keys.add(key())
    for ingredient in ("source_digest", "_versions", "_platform"):
        with monkeypatch.context() as patch:
            patch.setattr(program_store, ingredient, lambda: "another")
            keys.add(key())
    assert len(keys) == 6


def _short(_, copy):
    """A file of one byte in place of a source file: all are read again and again."""
    Path(copy).write_bytes(b"0")


def test_every_source_file_is_in_the_key(tmp_path, monkeypatch):
    """Each file in the digest of its folder, and one of each folder in that of the packages."""
    originals = program_store._packages()
    assert originals == tuple(Path(package.__file__).parent for package in (qspec_jax, pallas_kernels))
    copies = [shutil.copytree(folder, tmp_path / folder.name, copy_function=_short) for folder in originals]

    def changes(packages, files, text):
        """How many of the files make another digest of the packages, each of which gets this text in its turn."""
        monkeypatch.setattr(program_store, "_packages", lambda: packages)
        digests = [program_store.source_digest.__wrapped__()]
        for file in files:
            file.write_bytes(text)
            digests.append(program_store.source_digest.__wrapped__())
        return len(set(digests)) - 1

    files = [file for folder in copies for file in folder.rglob("*") if file.suffix in (".py", ".json")]
    assert len(files) > 100
    folders = {file.parent: [one for one in files if one.parent == file.parent] for file in files}
    for folder, within in folders.items():
        assert changes([folder], within, b"1") == len(within)
    assert changes(copies, [within[-1] for within in folders.values()], b"2") == len(folders) > 20


def test_a_decoder_with_code_of_somebody_else_has_no_key():
    decoder = tiny.decoder()
    theirs = type("RMSNorm", (type(decoder.final_norm),), {"__module__": "their_package.layers"})
    decoder.final_norm.__class__ = theirs
    assert program_keys([NAME], decoder) == {}


def test_a_static_attribute_without_a_lasting_name_has_no_key():
    decoder = tiny.decoder()
    setattr(decoder.final_norm, "epsilon", lambda: 1e-5)  # noqa: B010
    assert program_keys([NAME], decoder) == {}
