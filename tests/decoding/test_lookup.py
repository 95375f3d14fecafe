"""Drafts from the text itself: found where they are, and never more than a guess."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qspec_jax import SamplingParams
from qspec_jax.decoding.lookup import look_up, rewrite, write
from tests import tiny

PROMPTS = [[5, 6, 7] * 6, [30, 31, 32, 33, 34], list(range(40, 56)) * 2, [8]]
OPTIONS = {"draft": "w4a8", "draft_length": 3, "max_new_tokens": 24, "max_seq_len": 64, "batch_size": 4}


_look_up = jax.jit(look_up, static_argnames="draft_length")


def proposed(text, *, draft_length=3, slots=16, left=0):
    """What is looked up for one row, and whether anything was found; ``left`` stands behind the text."""
    history = np.asarray([text + [left] * (slots - len(text))], np.int32)
    found, tokens = _look_up(history, np.asarray([len(text) - 1], np.int32), draft_length=draft_length)
    return bool(found), np.asarray(tokens)[0].tolist()


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
    assert set(proposed(text, draft_length=8, left=99)[1]) <= set(text)


def test_a_history_takes_the_tokens_that_exist():
    history = np.zeros((2, 6), np.int32)
    exists = np.asarray([[True, True, False], [True, False, False]])
    tokens = np.asarray([[1, 2, 3], [4, 5, 6]], np.int32)
    assert jax.jit(write)(history, np.asarray([0, 5], np.int32), tokens, exists).tolist() == [
        [1, 2, 0, 0, 0, 0],
        [0] * 5 + [4],
    ]


def test_a_history_is_the_same_whether_cycles_keep_it_or_not():
    """The text of a row ends at its newest token; of an idle one nothing is known to be new."""
    history = np.asarray([[7, 8, 9, 0, 0, 0], [4, 5, 0, 0, 0, 0]], np.int32)
    tokens = np.asarray([[1, 2, 0], [6, 0, 0]], np.int32)
    newest, num_tokens = np.asarray([4, 1], np.int32), np.asarray([2, 0], np.int32)
    assert jax.jit(rewrite)(history, newest, tokens, num_tokens).tolist() == [[7, 8, 9, 1, 2, 0], [4, 5, 0, 0, 0, 0]]


@pytest.fixture(scope="module")
def model():
    return tiny.laid_out(tiny.language_model(), draft="w4a4")  # as in test_sampling.py: plain programs are the same


@pytest.mark.parametrize("mode", [pytest.param("lookup", marks=pytest.mark.contract), "lookup-qspec"])
def test_looked_up_drafts_change_no_token(model, mode):
    everything = SamplingParams(temperature=1.0, top_k=3, frequency_penalty=0.1, logit_bias={1: 0.1}, logprobs=1)
    sampling = [SamplingParams(), SamplingParams(temperature=0.5, seed=3), SamplingParams(), everything]
    plain = model.generate(PROMPTS, mode="w4a16", sampling=sampling, **OPTIONS)
    results = model.generate(PROMPTS, mode=mode, sampling=sampling, **OPTIONS)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    stats = [result.stats for result in results]
    assert {(one.mode, one.draft) for one in stats} == {(mode, {"lookup": "lookup", "lookup-qspec": "w4a8"}[mode])}
    assert 0 < sum(one.accepted for one in stats) < sum(one.drafted for one in stats)
