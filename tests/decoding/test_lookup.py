"""Drafts from the text itself: found where they are, and never more than a guess."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from qspec_jax import SamplingParams
from qspec_jax.decoding.lookup import look_up, rewrite, write
from tests import tiny

PROMPTS = [[5, 6, 7] * 6, [30, 31, 32, 33, 34], list(range(40, 56)) * 2, [8]]
OPTIONS = {"draft": "w4a8", "draft_length": 3, "max_new_tokens": 24, "max_seq_len": 128, "batch_size": 3}


def proposed(text, *, draft_length=3, slots=16):
    history = jnp.asarray([text + [0] * (slots - len(text))], jnp.int32)
    found, tokens = look_up(history, jnp.asarray([len(text) - 1], jnp.int32), draft_length=draft_length)
    return bool(found[0]), tokens[0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9]),  # what followed
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the last place of several
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1]),  # a longer n-gram before a later one
        ([5, 5, 5, 5], [5, 5, 5]),  # overlapping with itself
        ([3, 1, 2, 1, 2, 1, 2], [1, 2, 1]),  # where the text ends, what is repeated goes on
    ],
)
def test_what_followed_the_newest_tokens_is_proposed(text, expected):
    found, tokens = proposed(text)
    assert found
    assert tokens[: len(expected)] == expected


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 2, 3, 4], [2, 9, 1, 2], [0, 0]])
def test_nothing_is_found_where_no_two_tokens_stand_twice(text):
    assert not proposed(text)[0]


def test_positions_past_the_text_are_not_taken_for_text():
    assert not proposed([3, 0])[0]
    assert not proposed([0, 1, 0], slots=4)[0]


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 1, 1], [1, 2, 1, 2], [1, 2, 3, 1, 2, 3, 1]])
def test_only_tokens_of_the_text_are_proposed(text):
    """Even where nothing is found: the row may hold those of an earlier text."""
    history = jnp.asarray([text + [99] * (16 - len(text))], jnp.int32)
    _, tokens = look_up(history, jnp.asarray([len(text) - 1], jnp.int32), draft_length=8)
    assert set(tokens[0].tolist()) <= set(text)


def test_a_history_takes_the_tokens_that_exist():
    history = jnp.zeros((2, 6), jnp.int32)
    exists = jnp.asarray([[True, True, False], [True, False, False]])
    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32)
    assert write(history, jnp.asarray([0, 5], jnp.int32), tokens, exists).tolist() == [
        [1, 2, 0, 0, 0, 0],
        [0] * 5 + [4],
    ]


def test_a_history_is_the_same_whether_cycles_keep_it_or_not():
    """The text of a row ends at its newest token; of an idle one nothing is known to be new."""
    history = jnp.asarray([[7, 8, 9, 0, 0, 0], [4, 5, 0, 0, 0, 0]], jnp.int32)
    tokens = jnp.asarray([[1, 2, 0], [6, 0, 0]], jnp.int32)
    newest, num_tokens = jnp.asarray([4, 1], jnp.int32), jnp.asarray([2, 0], jnp.int32)
    assert rewrite(history, newest, tokens, num_tokens).tolist() == [[7, 8, 9, 1, 2, 0], [4, 5, 0, 0, 0, 0]]


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


@pytest.mark.parametrize("mode", [pytest.param("lookup", marks=pytest.mark.contract), "lookup-qspec"])
def test_looked_up_drafts_change_no_token(model, mode):
    sampling = [SamplingParams(), SamplingParams(temperature=0.5, seed=3), SamplingParams(), SamplingParams()]
    plain = model.generate(PROMPTS, mode="w4a16", sampling=sampling, **OPTIONS)
    results = model.generate(PROMPTS, mode=mode, sampling=sampling, **OPTIONS)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    stats = [result.stats for result in results]
    assert {(one.mode, one.draft) for one in stats} == {(mode, {"lookup": "lookup", "lookup-qspec": "w4a8"}[mode])}
    assert 0 < sum(one.accepted for one in stats) < sum(one.drafted for one in stats)
