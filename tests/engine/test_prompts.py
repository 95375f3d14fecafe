"""Prompts of every kind that users have at hand: taken as what they are, or refused, each alone."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers

from qspec_jax import SamplingParams, UsageError
from qspec_jax.engine.intake import Intake
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.engine.outcome import statistics
from qspec_jax.engine.prompts import prompts_of, read_prompt
from qspec_jax.engine.requests import Request
from qspec_jax.tokenizer.backend import PlainBackend
from qspec_jax.tokenizer.tokenizer import Tokenizer
from tests import tiny

USER = {"role": "user", "content": "hi"}
TEMPLATE = "{% for m in messages %}{{ m.role[:1] + m['content'] }}{% endfor %}"


class Odd:
    """Raises at whatever is asked of it."""

    def __repr__(self):
        raise RuntimeError

    def __iter__(self):
        raise RuntimeError


def tokenizer(template=None):
    """Characters as tokens."""
    characters = {character: place for place, character in enumerate("?abcdefghiu \n")}
    words = Words(models.WordLevel(characters, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return Tokenizer(PlainBackend(words, chat_template=template))


def model(template=None):
    made = tiny.language_model()
    return LanguageModel(made.decoder, tokenizer(template), quantization=made.quantization, kernels="reference")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a text", ["a text"]),
        (np.str_("a text"), ["a text"]),
        (["a", "b"], ["a", "b"]),
        (("a", [1, 2]), ["a", [1, 2]]),
        ([1, 2, 3], [[1, 2, 3]]),
        (range(3), [[0, 1, 2]]),
        ((i for i in (1, 2)), [[1, 2]]),
        (np.array([1, 2, 3]), [[1, 2, 3]]),
        (jnp.array([1, 2, 3]), [[1, 2, 3]]),
        ([np.int32(1), jnp.int32(2)], [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (jnp.array([[1, 2]]), [[1, 2]]),
        ([np.array([1, 2]), jnp.array([3])], [[1, 2], [3]]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([USER], [[USER]]),
        ([[USER], "b"], [[USER], "b"]),
        ((one for one in ["a", "b"]), ["a", "b"]),
    ],
    ids=lambda value: type(value).__name__,  # a generator is written with its address
)
def test_one_prompt_and_lists_of_them_are_told_apart(given, expected):
    read = [read_prompt(one, "prompt") for one in prompts_of(given)]
    assert read == [one if isinstance(one, str) else list(one) for one in expected]
    assert all(type(token) is int for one in read if isinstance(one, list) for token in one if one != [USER])


@pytest.mark.parametrize("given", [None, {"prompt": "a"}, USER, b"text", {"a"}, 5, 1.5, np.array(3), Odd()], ids=type)
def test_what_holds_no_prompts_is_refused(given):
    with pytest.raises(UsageError, match=r"prompts is .*; use a text, token ids, or a conversation"):
        prompts_of(given)


def test_no_prompt_is_refused():
    for given in ([], (), np.zeros((0,), int)):
        with pytest.raises(UsageError, match="there is no prompt"):
            prompts_of(given)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt 3 is None; use a text, token ids"),
        (["a"], r"prompt 3 is \['a'\]; give each text as a prompt of its own"),
        ([1, "2"], "give each text as a prompt"),
        ([1.5], "prompt 3 has 1.5 among its token ids"),
        ([1, None], "prompt 3 has None among its token ids"),
        ([True, False], "prompt 3 has True among its token ids"),
        ([1, [2]], r"prompt 3 has \[2\] among its token ids"),
        (np.array([1.0, 2.0]), "among its token ids"),
        (np.array([[1, 2]]), "among its token ids"),
        (np.array([True]), "among its token ids"),
        (np.array(5), "prompt 3 is array"),
        ([2**70], "token ids of the model"),
        (USER, "prompt 3 is {'"),
        (b"hi", "prompt 3 is b'hi'"),
        (7, "prompt 3 is 7"),
        (Odd(), "prompt 3 is <Odd"),
        ("a\ud800b", "prompt 3 has half a character"),
        ("", "prompt 3 is empty"),
        ([], "prompt 3 is empty"),
        ([USER, 5], "prompt 3 has .* among its token ids"),
        ([{}], "message 1 of prompt 3 has no role"),
        ([USER, {"content": "hi"}], "message 2 of prompt 3 has no role"),
        ([{"role": 5, "content": "hi"}], "message 1 of prompt 3 has no role"),
        ([{"role": "user"}], "message 1 of prompt 3 has no content"),
        ([{"role": "user", "content": None}], "message 1 of prompt 3 has no content"),
        ([{"role": "user", "content": 5}], "has 5 as its content"),
        ([{"role": "user", "content": {"text": "hi"}}], "as its content"),
        ([{"role": "user", "content": "\udc00"}], "message 1 of prompt 3 has half a character"),
        ([{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}], "has half a character"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "has a part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "in its content; only parts"),
        ([{"role": "user", "content": [5]}], "has 5 in its content; only parts"),
    ],
    ids=lambda value: None if isinstance(value, str) and " " in value else type(value).__name__,
)
def test_what_is_no_prompt_is_refused_by_name(prompt, message):
    with pytest.raises(UsageError, match=message) as caught:
        read_prompt(prompt, "prompt 3")
    str(caught.value).encode()


def test_messages_have_one_text_each_and_nothing_that_is_null():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}, {"text": "d"}]
    given = [
        {"role": "system", "content": parts, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {"role": "user", "content": []},
    ]
    assert read_prompt(given, "it") == [
        {"role": "system", "content": "abcd"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},
        {"role": "user", "content": ""},
    ]


def deep(depth=100_000):
    nested = []
    for _ in range(depth):
        nested = [nested]
    return nested


DEEP = deep()
ODD_REQUESTS = [
    {"prompt": None},
    {"prompt": ["a"]},
    {"prompt": "a\ud800"},
    {"prompt": [{"role": "user", "content": "\ud800"}]},
    {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"prompt": [{"role": "user", "content": "a", "more": DEEP}, {"role": None}]},
    {"prompt": DEEP},
    {"prompt": [2**31]},
    {"prompt": [96]},
    {"sampling": {"top_k": 2**31}},
    {"sampling": {"stop_token_ids": [2**31]}},
    {"sampling": {"stop_token_ids": [96]}},
    {"sampling": {"stop_token_ids": [-2]}},
    {"sampling": {"temperature": 10**401}},
    {"sampling": {"temperature": DEEP}},
    {"sampling": {"seed": 10**5000}},
    {"sampling": {"logit_bias": {"96": 1}}},
    {"sampling": {"logprobs": 1.5}},
    {"sampling": {"stop": "\ud800"}},
    {"sampling": {5: 1}},
    {"sampling": ["greedy"]},
    {"max_new_tokens": "16"},
    {"max_new_tokens": 10**5000},
    {"max_new_tokens": 2**40},
    {"max_new_tokens": None},
    {"chat": "false"},
]


@pytest.fixture(scope="module")
def chatting():
    return model(TEMPLATE)


@pytest.mark.parametrize("asked", ODD_REQUESTS, ids=lambda asked: next(iter(asked)))
def test_an_odd_request_is_a_result_with_its_error(chatting, asked):
    stats = statistics(chatting.plan("w4a16"), kernels="reference")
    result = chatting.intake.attempt(**{"prompt": "abc", "stats": stats, **asked})
    assert result.finish_reason == "error"
    assert result.error.encode()
    assert len(result.error) < 400


def test_a_request_of_other_types_is_that_of_its_values(chatting):
    intake = chatting.intake
    sampling = {"stop_token_ids": np.array([5]), "logit_bias": {"5": 1}, "seed": np.int64(4)}
    one = intake.request(jnp.array([1, 2]), sampling=sampling, max_new_tokens=np.int32(4), chat=np.bool_(False))
    params = SamplingParams(stop_token_ids=(5,), logit_bias={5: 1.0}, seed=4)
    assert one == Request([1, 2], 4, params)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert intake.request(parts).token_ids == intake.request("ab").token_ids


def test_blanks_are_a_prompt_where_there_is_no_chat_around_them(chatting):
    base = model()
    assert base.intake.request("\n").token_ids == chatting.intake.request(" \n", chat=False).token_ids[1:]
    with pytest.raises(UsageError, match=r"the prompt is empty; .*chat=False"):
        chatting.intake.request(" \n")


def test_a_failure_of_the_tokenizer_or_template_is_the_requests():
    for template in ("{{ 1 + messages[0].content }}", "{{ messages[0].content / 0 }}", "{{ [] | first | first }}"):
        with pytest.raises(UsageError, match=r"the chat template fails: TypeError|the prompt is empty"):
            model(template).intake.request([USER])


@pytest.mark.parametrize("template", [None, "{{ messages[-1].content }}"])
def test_a_prompt_with_characters_that_no_token_has_fails_alone(template):
    words = Words(models.WordLevel({"a": 0, "b": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = tiny.language_model()
    unknowing = Tokenizer(PlainBackend(words, chat_template=template))
    intake = LanguageModel(made.decoder, unknowing, quantization=None, kernels="reference").intake
    good, bad = (intake.attempt(text, statistics(made.plan("w4a16"), kernels="reference")) for text in ("a b", "a c"))
    assert isinstance(good, Request)
    assert bad.error.startswith("the text cannot be tokenised: ")


def test_odd_requests_of_a_batch_fail_alone():
    plain = tiny.language_model()
    options = {"mode": "w4a16", "max_new_tokens": 3, "batch_size": 1, "max_seq_len": 32}
    expected = plain.generate([5, 6], **options)
    (alone,) = expected
    sampling = [{}, {"top_k": 2**31}, SamplingParams(), {"logit_bias": {"5": 0}}, None]
    prompts = [jnp.array([5, 6]), [5, 6], None, [5, 6], "a"]
    results = plain.generate(prompts, sampling=sampling, **options)
    assert [one.finish_reason for one in results] == ["length", "error", "error", "length", "error"]
    assert [results[0].token_ids, results[3].token_ids] == [alone.token_ids] * 2
    assert results[1].error.startswith("top_k=2147483648: use 0")
    batch = plain.pipeline(plain.plan("w4a16"), batch_size=1, max_seq_len=32)
    for prompt in (None, ["a"], [5, 6]):
        batch.submit(prompt, max_new_tokens=3)
    assert [one.token_ids for one in batch.results()] == [[], [], alone.token_ids]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "8"}, "batch_size='8': use"),
        ({"batch_size": 2**31}, "batch_size=2147483648"),
        ({"num_samples": 1.5}, "num_samples=1.5: use"),
        ({"max_seq_len": 64.5}, "max_seq_len=64.5: use a whole"),
        ({"max_seq_len": True}, "max_seq_len=True: use a whole"),
        ({"sampling": "greedy"}, "sampling='greedy': use SamplingParams"),
        ({"sampling": {"temperature": -1}}, "temperature=-1: use 0"),
        ({"draft_length": 1.5}, "draft_length=1.5: use"),
        ({"draft_length": True}, "draft_length=True: use"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_arguments_of_another_type_are_refused(chatting, options, message):
    with pytest.raises(UsageError, match=message):
        chatting.generate([[1]], **{"max_new_tokens": 2, **options})
    assert len(chatting.programs) == 0


@pytest.mark.parametrize("prompt", ["hi", [USER]])
def test_a_tokenizer_of_another_model_is_said_to_be_one(prompt):
    config = dataclasses.replace(tiny.language_model().config, vocab_size=9)
    intake = Intake(config, tokenizer(TEMPLATE), (), "mixed", 1)
    with pytest.raises(
        UsageError, match=r"^prompt 1 has token 10 of the tokenizer of mixed, and the last .* is 8: the"
    ):
        intake.encode_prompts([prompt])
