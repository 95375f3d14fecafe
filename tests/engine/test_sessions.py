"""Sessions: what was generated is not read again either, and tokens are those of a run that reads everything."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers

from qspec_jax import UsageError
from qspec_jax.decoding import chunks
from qspec_jax.decoding.programs import Programs
from qspec_jax.engine.held_texts import HeldTexts
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.engine.session import capacity_for
from qspec_jax.tokenizer.backend import PlainBackend
from qspec_jax.tokenizer.tokenizer import Tokenizer
from tests import tiny

FIRST, MORE = [*range(40, 60)], [3, 4, 5]
SAMPLING = {"repetition_penalty": 1.3}  # which must know the tokens that were not read, too


@pytest.fixture(autouse=True)
def _chunks_of_one_width(monkeypatch):
    """Fewer programs, and texts of several chunks."""
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (32,))


@pytest.fixture(scope="module")
def model():
    """Every token is a character."""
    words = Words(models.WordLevel({chr(256 + index): index for index in range(96)}, unk_token=chr(256)))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = tiny.language_model()
    tokenizer = Tokenizer(PlainBackend(words))
    return LanguageModel(made.decoder, tokenizer, quantization=made.quantization, kernels="reference")


def session_of(model, **options):
    return model.session(model.plan(draft="w4a8"), **{"max_seq_len": 256, **options})


def answer(session, prompt, new_tokens=9):
    return session.generate(prompt, max_new_tokens=new_tokens, sampling=SAMPLING)


def assert_as_fresh(model, result, num_read):
    """It is what a session yields that holds nothing, and so many tokens of its prompt were read."""
    assert len(result.prompt_token_ids) - result.stats.reused_prompt_tokens == num_read
    fresh = answer(session_of(model), result.prompt_token_ids, len(result.token_ids))
    assert fresh.stats.reused_prompt_tokens == 0
    assert result.token_ids == fresh.token_ids


def test_a_turn_reads_only_what_is_new_and_yields_what_a_fresh_run_does(model):
    session, prompt, given, read = session_of(model), FIRST, [], []
    for more in ([], MORE, [*range(30)]):
        result = answer(session, [*prompt, *more])
        # The newest token of an answer is not in the cache yet.
        read.append(len(more) + 1 if more else len(FIRST))
        assert_as_fresh(model, result, read[-1])
        prompt = [*prompt, *more, *result.token_ids]
        given.append(len(result.prompt_token_ids))
    assert session.totals.computed_prompt_tokens == sum(read)
    assert session.totals.reused_prompt_tokens == sum(given) - sum(read)


def test_an_answer_that_was_changed_is_kept_as_far_as_it_is_the_same(model):
    session = session_of(model)
    said = answer(session, FIRST).token_ids
    changed = [*FIRST, *said[:4], (said[4] + 1) % 96, *said[5:], *MORE]
    assert_as_fresh(model, answer(session, changed), 5 + len(MORE))
    assert_as_fresh(model, answer(session, FIRST[:7]), 1)  # all but the last token, from which the first one comes


def test_a_session_that_was_reset_computes_all_itself(model):
    session = session_of(model)
    answer(session, FIRST)
    session.reset()
    assert_as_fresh(model, answer(session, [*FIRST, *MORE]), len(FIRST) + len(MORE))


@pytest.mark.parametrize("how", ["stopped", "closed", "left", "torn"])
def test_an_answer_that_was_ended_disturbs_nothing(model, how, monkeypatch):
    session = session_of(model)
    stream = session.stream(FIRST, max_new_tokens=90, sampling=SAMPLING)
    said = next(stream) + next(stream)
    if how == "stopped":
        session.stop()
        *rest, result = stream
        assert result.finish_reason == "interrupted"
        assert result.text == said + "".join(rest)
    elif how == "closed":
        stream.close()
    elif how == "torn":
        with monkeypatch.context() as patch:
            patch.setattr(Programs, "loop", interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(stream)
    prompt = [*FIRST, *(ord(character) - 256 for character in said if character != " "), *MORE]
    result = answer(session, prompt)
    assert_as_fresh(model, result, len(prompt) if how == "torn" else len(MORE))
    assert session.totals.requests == 2


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_row_that_must_grow_keeps_what_it_holds(model, monkeypatch):
    monkeypatch.setattr("qspec_jax.engine.session._LEAST_CAPACITY", 64)
    session = session_of(model)
    prompt = [*FIRST, *answer(session, FIRST).token_ids, *MORE]
    small = session._scheduler
    result = answer(session, prompt, 180)
    assert (small.shape.capacity, session._scheduler.shape.capacity) == (64, 256)
    assert_as_fresh(model, result, 1 + len(MORE))
    assert session.totals.requests == 2


def new_batch(model):
    return model.pipeline(model.plan("w4a16"), batch_size=2, max_seq_len=64)


def run(batch, prompt, session=None):
    batch.submit(prompt, session=session, max_new_tokens=6)
    return next(batch.results())


def test_requests_of_no_session_depend_on_none(model):
    """Whatever the rows hold; and a session goes on where its row was not taken by others."""
    batch = new_batch(model)
    said = run(batch, FIRST, "a").token_ids
    prompt = [*FIRST, *said, *MORE]
    results = [run(batch, prompt), run(batch, prompt, "b"), run(batch, [7, 8, 9], "b"), run(batch, prompt, "a")]
    assert [one.stats.reused_prompt_tokens for one in results] == [0, 0, 0, 0]
    results.append(run(batch, [*prompt, *results[-1].token_ids, 1], "a"))
    assert results[-1].stats.reused_prompt_tokens == len(prompt) + 5
    for one in results:
        assert run(new_batch(model), one.prompt_token_ids).token_ids == one.token_ids


def test_what_a_session_writes_over_is_shared_with_nobody(model):
    """A chunk that its row held, and of which the session's next prompt kept a part."""
    batch, prompt = new_batch(model), [*range(50)]
    expected = run(batch, prompt, "a").token_ids
    assert run(batch, [*prompt[:10], *range(80, 60, -1)], "a").stats.reused_prompt_tokens == 10
    result = run(batch, prompt)
    assert (result.stats.reused_prompt_tokens, result.token_ids) == (0, expected)


def test_a_row_that_others_took_holds_nothing_of_a_session(model):
    batch = new_batch(model)
    expected = run(batch, FIRST, "a").token_ids
    for other in ([*range(30)], [*range(60, 90)]):  # one for each row
        batch.submit(other, max_new_tokens=6)
    batch.collect()
    result = run(batch, FIRST, "a")
    assert (result.stats.reused_prompt_tokens, result.token_ids) == (0, expected)


def test_what_a_session_cannot_do_is_named(model):
    with pytest.raises(UsageError, match="do not fit max_seq_len=256"):
        answer(session_of(model), FIRST, 240)
    batch = model.pipeline(model.plan("w4a16"), batch_size=1, max_seq_len=64)
    batch.submit([1], session=3)
    assert "session=3" in next(batch.results()).error


def test_of_a_session_the_newest_text_is_held():
    held = HeldTexts(3)
    held.note(0, "a", [1, 2, 3])
    held.note(1, "b", [1, 2])
    assert held.find("a", [1, 2, 3, 4]) == (0, 3)
    assert held.find("a", [1, 2, 3]) == (0, 2)
    assert held.find("b", [2, 1, 3]) == (1, 0)
    assert held.find("c", [1, 2, 3]) == held.find(None, [1, 2, 3]) == (-1, 0)
    held.note(2, "a", [1])
    assert held.find("a", [1, 2, 3, 4]) == (2, 1)
    held.forget(2)
    assert (held.has("a"), held.has("b"), held.sizes()) == (False, True, [0, 2, 0])


@pytest.mark.parametrize(
    ("needed", "most", "expected"),
    [(1, 4096, 256), (256, 4096, 256), (257, 4096, 384), (385, 4096, 512), (769, 4096, 1024), (4000, 4096, 4096)],
)
def test_a_row_grows_by_halves_and_thirds(needed, most, expected):
    assert capacity_for(needed, most, grows=True) == expected
    assert capacity_for(needed, most, grows=False) == most
    assert capacity_for(200, 100, grows=True) == 100
