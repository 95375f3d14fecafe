"""Programs may be compiled from the shapes of a model while its weights are read."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import nullcontext

import jax
import pytest

import qspec_jax
from pallas_kernels import Int8Cache
from qspec_jax import UsageError
from qspec_jax.decoding.programs import Programs
from qspec_jax.engine import load as loading
from qspec_jax.errors import CheckpointError
from tests import tiny

PROMPTS, OPTIONS = [[5, 6, 7], [8]], {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    qspec_jax.save(tiny.language_model(), path)
    return path


def load(path, **options):
    return qspec_jax.load(path, kernels="reference", dtype="float32", **options)


def compile_for_prompts(model):
    pipeline = model.pipeline(batch_size=2, max_seq_len=64)
    for prompt in PROMPTS:
        pipeline.submit(prompt, **OPTIONS)
    pipeline.compile()


def token_ids(model):
    pipeline = model.pipeline(batch_size=2, max_seq_len=64)
    for prompt in PROMPTS:
        pipeline.submit(prompt, **OPTIONS)
    return [result.token_ids for result in pipeline.results()]


def test_what_was_compiled_ahead_is_not_compiled_again(saved):
    expected = token_ids(load(saved))
    model = load(saved, compile_ahead=compile_for_prompts)
    compiled = model.num_compilations
    assert compiled == 2  # the loop, and one width of prefill
    assert token_ids(model) == expected
    assert model.num_compilations == compiled


def test_a_cache_of_int8_is_that_of_every_program(saved):
    """Those that are compiled ahead, too, for a model that has no weights yet."""
    ahead = []
    model = load(saved, kv="int8", compile_ahead=ahead.append)
    for one in (model, *ahead):
        cache = jax.eval_shape(lambda one=one: one.decoder.create_cache(batch=1, capacity=64))
        assert isinstance(cache.layers, Int8Cache)
    usual = load(saved)
    likeness = [model.programs._laid_out.is_like(other.programs._laid_out) for other in (*ahead, usual)]
    assert likeness == [True, False]
    with pytest.raises(UsageError, match="kv='int7' is not supported; use one of model, bf16, int8"):
        load("no/such/model", kv="int7")


def test_compiling_does_not_wait_for_the_weights_nor_they_for_it(saved, monkeypatch):
    """Each waits for the other to have begun: one after the other would never end."""
    reading, compiling = threading.Event(), threading.Event()
    restore = loading.restore_decoder

    def read(*arguments, **options):
        reading.set()
        assert compiling.wait(60)
        return restore(*arguments, **options)

    def compile_beside(model):
        compiling.set()
        assert reading.wait(60)
        compile_for_prompts(model)

    monkeypatch.setattr(loading, "restore_decoder", read)
    assert load(saved, compile_ahead=compile_beside).num_compilations == 2


def test_an_error_of_what_compiles_ahead_is_ignored(saved):
    def fail(model):
        raise RuntimeError("not now")

    model = load(saved, compile_ahead=fail)
    assert model.num_compilations == 0
    assert len(token_ids(model)) == len(PROMPTS)


def test_what_the_model_cannot_do_ends_the_load(saved, monkeypatch):
    """Also where it is known when all weights are there."""
    read, restore = threading.Event(), loading.restore_decoder

    def read_all(*arguments, **options):
        decoder = restore(*arguments, **options)
        read.set()
        return decoder

    def refuse(model):
        assert read.wait(60)
        model.plan("qspec", draft_length=99)

    monkeypatch.setattr(loading, "restore_decoder", read_all)
    with pytest.raises(UsageError, match="draft_length=99"):
        load(saved, compile_ahead=refuse)


@pytest.mark.parametrize(
    ("who", "error", "ends"),
    [
        ("tokenizer", CheckpointError("damaged"), True),
        ("programs", UsageError("prompt 1 is too long"), True),
        ("programs", RuntimeError("not now"), False),
    ],
    ids=str,
)
def test_no_more_tensors_are_read_once_an_error_is_known(who, error, ends):
    known = {"tokenizer": Future(), "programs": Future()}
    tensors = iter(loading.ending_with(**known, progress=iter)(["first", "second", "third"]))
    assert next(tensors) == "first"
    known[who].set_exception(error)
    with pytest.raises(type(error), match=str(error)) if ends else nullcontext():
        assert next(tensors) == "second"


def test_programs_of_another_decoder_are_not_adopted(saved):
    shapes = []
    load(saved, compile_ahead=lambda model: shapes.append((compile_for_prompts(model), model)[1]))
    ((other),) = shapes
    same, longer = load(saved), tiny.language_model(dtype="bfloat16")
    same.programs.adopt(other.programs)
    longer.programs.adopt(other.programs)
    assert (len(same.programs), len(longer.programs)) == (2, 0)


def test_a_cache_that_fitted_without_weights_is_looked_at_again_with_them(saved, monkeypatch):
    model = load(saved, compile_ahead=compile_for_prompts)
    checked = []
    monkeypatch.setattr(Programs, "check_cache", lambda self, **sizes: checked.append(sizes))
    token_ids(model)
    token_ids(model)
    assert checked == [{"rows": 2, "capacity": 64}]


def test_an_interruption_waits_for_no_compiler(saved, monkeypatch):
    compiling, ended = threading.Event(), threading.Event()

    def compile_ahead(model):
        compiling.set()
        ended.wait(60)

    def interrupted(*arguments, **options):
        assert compiling.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "restore_decoder", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            load(saved, compile_ahead=compile_ahead)
        assert not ended.is_set()
    finally:
        ended.set()


def test_what_is_no_model_or_no_path_is_not_saved(tmp_path):
    model = tiny.language_model()
    for given, message in (
        ((3, tmp_path / "a"), "model=3: use what qspec_jax.load returned"),
        ((model.decoder, tmp_path / "a"), "use what qspec_jax.load returned"),
        ((model, None), "path=None: use the path of a directory"),
        ((model, b"a"), "path=b'a': use the path of a directory"),
    ):
        with pytest.raises(UsageError, match=message):
            qspec_jax.save(*given)
    assert not list(tmp_path.iterdir())
