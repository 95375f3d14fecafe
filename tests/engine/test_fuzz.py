"""Options and prompts that hypothesis makes up: taken, or refused with an error of this library that can be written."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qspec_jax import SamplingParams, UsageError
from qspec_jax.decoding.request_options import (
    _OTHER_NAMES,
    _REFUSED,
    REQUEST_OPTIONS,
    SAMPLING_OPTIONS,
    request_options,
)
from qspec_jax.decoding.sampling import Sampler
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.engine.outcome import statistics
from qspec_jax.engine.prompts import prompts_of
from qspec_jax.engine.requests import Request
from qspec_jax.tokenizer.watch import TextWatch
from tests.engine.test_prompts import TEMPLATE, model
from tests.fuzzing import fuzzed

EXAMPLES = max(60, fuzzed.max_examples)
SURROGATES = st.text(st.sampled_from("ab\ud800\udfff\x00\n é🐟"), max_size=6)
INTEGERS = st.integers() | st.sampled_from(
    [-1, 0, 1, 95, 96, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**401, -(10**4000)]
)
FLOATS = st.floats() | st.sampled_from([1.2e-38, 1e-39, 5e-324, 3.5e38, 1e39, 1e308, -0.0])
SCALARS = st.none() | st.booleans() | INTEGERS | FLOATS | SURROGATES
NUMPY = st.one_of(
    st.integers(-(2**31), 2**31 - 1).map(np.int32),
    st.integers(0, 2**64 - 1).map(np.uint64),
    st.floats(width=32).map(np.float32),
    st.floats(width=16).map(np.float16),
    st.booleans().map(np.bool_),
    st.integers(-5, 200).map(np.array),
    st.lists(st.integers(-5, 200), max_size=4).map(np.array),
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), max_size=3).map(np.array),
    st.sampled_from([jnp.int32(3), jnp.float32(0.5), jnp.arange(3), np.array(["a"]), np.array([None, 1])]),
    st.sampled_from([b"ab", {1, 2}, range(3), (1, 2), 1j, object(), len, math, np.float64("nan"), np.str_("a")]),
)
KEYS = SURROGATES | st.sampled_from(["role", "content", "type", "text", "5", "05", "1e3"]) | st.integers(-2, 200)
JSON = st.recursive(
    SCALARS, lambda one: st.lists(one, max_size=4) | st.dictionaries(KEYS, one, max_size=4), max_leaves=8
)
VALUES = JSON | NUMPY | st.lists(NUMPY, max_size=3)
# Near what is allowed, so that not all is refused.
LIKELY = st.one_of(
    st.integers(0, 20),
    st.floats(0, 2),
    st.lists(st.integers(0, 99), max_size=4),
    st.text("ab\n", min_size=1, max_size=3),
    st.dictionaries(st.integers(0, 99) | st.integers(0, 99).map(str), st.floats(-5, 5), max_size=3),
)
NAMES = st.sampled_from([*REQUEST_OPTIONS, *_OTHER_NAMES, *_REFUSED, "do_sample", "top_logprobs", "topP", "prompt"])
OPTIONS = st.dictionaries(NAMES | KEYS, VALUES | LIKELY, max_size=5)


def attempt(function, *arguments, **options):
    """What a function returns, None where it refuses with an error that can be written."""
    try:
        return function(*arguments, **options)
    except UsageError as error:
        check_message(str(error))
        return None


def check_message(text):
    text.encode()
    assert 0 < len(text) < 600
    assert "\n" not in text


def check_params(params):
    """Every field is what the device takes, and its checks let it through unchanged."""
    assert SamplingParams(**{name: getattr(params, name) for name in SAMPLING_OPTIONS}) == params
    with np.errstate(over="raise", invalid="raise"):
        sampler = Sampler.create([params], SamplingFeatures(*[True] * 6))
    for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "biases"):
        assert np.isfinite(getattr(sampler, name)).all()
    assert (sampler.temperature[0] > 0) == (params.temperature > 0)
    assert sampler.repetition_penalty[0] > 0
    json.dumps(request_options({"logprobs": params.logprobs, "stop": params.stop, "seed": params.seed}))


@settings(fuzzed, max_examples=EXAMPLES)
@given(st.dictionaries(st.sampled_from(SAMPLING_OPTIONS), VALUES | LIKELY, max_size=3))
def test_sampling_parameters_are_taken_or_refused_alike_in_python_and_json(options):
    params = attempt(SamplingParams, **options)
    assert attempt(SamplingParams.of, options) == params
    if params is not None:
        check_params(params)


@settings(fuzzed, max_examples=EXAMPLES)
@given(OPTIONS)
def test_options_of_a_request_are_taken_or_refused(options):
    taken = attempt(request_options, options)
    if taken is None:
        return
    assert set(taken) <= set(REQUEST_OPTIONS)
    assert request_options(taken) == taken
    check_params(SamplingParams.of({name: taken[name] for name in taken if name in SAMPLING_OPTIONS}))


@pytest.fixture(scope="module")
def chatting():
    return model(TEMPLATE)


@pytest.fixture(scope="module")
def stats(chatting):
    return statistics(chatting.plan("w4a16"), kernels="reference")


MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.just("user") | VALUES, "content": VALUES | LIKELY}), max_size=3
)


@settings(fuzzed, max_examples=EXAMPLES)
@given(
    VALUES | LIKELY | MESSAGES, st.dictionaries(st.sampled_from(SAMPLING_OPTIONS), LIKELY | VALUES, max_size=2), VALUES
)
def test_a_request_is_checked_or_has_its_error(chatting, stats, prompt, sampling, other):
    for options in ({}, {"sampling": sampling}, {"max_new_tokens": other}, {"chat": other}, {"max_seq_len": other}):
        asked = chatting.intake.attempt(prompt, stats, **{"max_new_tokens": 8, **options})
        if isinstance(asked, Request):
            assert all(type(token) is int and 0 <= token < 96 for token in asked.token_ids)
            assert 0 < len(asked.token_ids) <= 255
            asked.chunks()
        else:
            check_message(asked.error)


@settings(fuzzed, max_examples=EXAMPLES)
@given(VALUES | LIKELY | MESSAGES)
def test_prompts_are_told_apart_or_refused(given):
    assert attempt(prompts_of, given) != []


NAMED = ["<a>", "a<b>", "<a><b>", "<a", "<c>ab"]


class Letters:
    """As text, capital letters are special tokens."""

    special_tokens = dict(zip(b"ABC", ("<a>", "<b>", "<c>"), strict=True))  # noqa: RUF012

    def push(self, ids):
        return "".join(chr(token) for token in ids if token not in self.special_tokens)

    def finish(self):
        return ""


@settings(fuzzed, max_examples=EXAMPLES)
@given(
    st.text("abABC", max_size=24),
    st.lists(
        st.text("ab", min_size=1, max_size=5) | st.sampled_from(["<a>", "a<b>", "<a><b>", "<a", "<c>ab"]), max_size=4
    ),
    st.integers(0, 12),
    st.lists(st.integers(1, 5), max_size=24),
)
def test_a_text_ends_where_it_ends_token_by_token_and_nothing_shown_is_taken_back(text, stop, min_new_tokens, sizes):
    tokens = text.encode()
    expected, expected_tokens = _ended(tokens, stop, min_new_tokens)
    for pieces in ([1] * 24, [24], [*sizes, 24]):
        watch, kept, rest, shown = TextWatch(Letters(), stop, min_new_tokens=min_new_tokens), 0, tokens, ""
        for size in pieces:
            kept += watch.push(rest[:size])
            rest = rest[size:]
            now = watch.text[: watch.num_certain()]
            assert now.startswith(shown)
            shown = now
            if watch.stopped:
                break
        watch.finish()
        assert (watch.text, kept) == (expected, expected_tokens)


def _ended(tokens, stop, min_new_tokens):
    """The definition: after each token, from the last of ``min_new_tokens`` on, whether a string has ended with it."""
    names = Letters.special_tokens
    for count in range(max(1, min_new_tokens), len(tokens) + 1):
        places = []
        for string in stop:
            written = names if any(name in string for name in names.values()) else dict.fromkeys(names, "")
            pieces = [written.get(token, chr(token)) for token in tokens[:count]]
            ends = np.cumsum([len(piece) for piece in pieces])
            first = max(0, ends[-1] - len(pieces[-1]) - len(string) + 1)
            place = "".join(pieces).find(string, first) if pieces[-1] else -1
            if place >= 0:
                before = [token for token, end in zip(tokens, ends, strict=False) if end <= place]
                places.append(sum(token not in names for token in before))
        if places:
            return _visible(tokens[:count])[: min(places)], count
    return _visible(tokens), len(tokens)


def _visible(tokens):
    return "".join(chr(token) for token in tokens if token not in Letters.special_tokens)
