"""Bodies of requests: each parameter has a meaning, asks for nothing, or is refused by name."""

from __future__ import annotations

import json

import pytest

from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.serving.asked import Kind, read_body
from qspec_jax.serving.refusals import ApiError

BODIES = {Kind.TEXT: {"prompt": "a"}, Kind.CHAT: {"messages": [{"role": "user", "content": "a"}]}}


def read(kind=Kind.CHAT, **given):
    return read_body(json.dumps({**BODIES[kind], **given}).encode(), kind, model="tiny")


def refusal(*arguments, **given):
    with pytest.raises(ApiError) as caught:
        read(*arguments, **given)
    return caught.value


def test_what_is_not_asked_for_is_as_in_the_protocol():
    text, chat = read(Kind.TEXT), read()
    assert (text.max_new_tokens, chat.max_new_tokens) == (16, None)
    assert text.sampling.temperature == chat.sampling.temperature == 1
    assert (chat.num_answers, chat.stream, chat.include_usage) == (1, False, False)
    assert read().sampling.seed != read().sampling.seed


def test_what_is_asked_for_reaches_the_engine():
    asked = read(
        model="tiny",
        n=3,
        stop="x",
        seed=7,
        logprobs=True,
        top_logprobs=2,
        logit_bias={"5": -100},
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    expected = {"temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "logit_bias": {5: -100}, "seed": 7}
    assert asked.sampling == SamplingParams(**expected, ignore_eos=True, stop=("x",), logprobs=2)
    assert (asked.num_answers, asked.max_new_tokens, asked.stream, asked.include_usage) == (3, 9, True, True)


@pytest.mark.parametrize(
    ("prompt", "count"), [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), (["a"] * 4, 4)]
)
def test_a_prompt_is_text_or_tokens_or_several_of_them(prompt, count):
    assert read(Kind.TEXT, prompt=prompt, n=2).num_answers == 2 * count


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "me", "metadata": {"a": "b"}, "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"store": False, "service_tier": "auto", "modalities": ["text"]},
        {"best_of": 1, "echo": False, "suffix": "", "logit_bias": None, "stop": None, "n": None, "stream": None},
    ],
)
def test_what_asks_for_nothing_is_taken(harmless):
    assert read(**harmless).num_answers == 1


def test_the_best_of_as_many_answers_as_there_are_is_all_of_them():
    assert read(n=3, best_of=3).num_choices == 3


REFUSED = {
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{}],
    "function_call": {"name": "f"},
    "best_of": 2,
    "echo": True,
    "suffix": "b",
    "guided_json": {},
    "audio": {"voice": "a"},
    "modalities": ["audio"],
    "prediction": {"type": "content"},
    "reasoning_effort": "low",
    "store": True,
    "service_tier": "priority",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_by_name(name):
    error = refusal(**{name: REFUSED[name]})
    assert (error.status, error.param) == (400, name)
    assert name in str(error)


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"n": 0}, "n", "1 to 128"),
        ({"n": 129}, "n", "1 to 128"),
        ({"n": True}, "n", "whole number"),
        ({"n": "2"}, "n", "whole number"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", '"stream": true'),
        ({"stream": True, "stream_options": [1]}, "stream_options", "an object"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "include_usage"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "true or false"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "false"),
        ({"temperature": -1}, "temperature", "0 (greedy)"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "more than 0"),
        ({"seed": -1}, "seed", "0 to 2"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "give one"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "to 20"),
        ({"top_logprobs": 2}, "top_logprobs", '"logprobs": true'),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias", "up to 300"),
        ({"stop": ["x"] * 17}, "stop", "up to 16"),
        ({"stop": "x" * 257}, "stop", "up to 256"),
        ({"stop": [""]}, "stop", "at least one character"),
        ({"messages": []}, "messages", "role"),
        ({"messages": "Hello"}, "messages", "role"),
        ({"messages": ["Hello"]}, "messages", "role"),
        ({"messages": None}, "messages", "there are no messages"),
        ({"topP": 0.5}, "topP", "is it 'top_p'"),
        ({"chat": True}, "chat", "is no parameter"),
        ({"prompt": "a"}, "prompt", "'prompt' is a parameter of /v1/completions; ask there, or give 'messages' alone"),
        ({"made_up": 1}, "made_up", "is no parameter"),
        ({"best_of": 3, "n": 2}, "best_of", "use n, of which all answers are returned"),
        ({"num_return_sequences": 2}, "num_return_sequences", "use n"),
    ],
)
def test_what_makes_no_sense_is_refused_and_named(given, param, message):
    error = refusal(**given)
    assert (error.status, error.param) == (400, param)
    assert message in str(error)


@pytest.mark.parametrize("prompt", [5, 0.5, True, {"a": 1}])
def test_a_prompt_of_another_type_is_called_as_the_client_calls_it(prompt):
    error = refusal(Kind.TEXT, prompt=prompt)
    assert (error.status, error.param) == (400, "prompt")
    assert str(error).startswith("prompt=")
    assert "a text, token ids, or a list of either" in str(error)


@pytest.mark.parametrize("prompt", [None, [], [{"role": "user", "content": "a"}], {"a": 1}, [[{"role": "user"}]]])
def test_what_is_no_prompt_is_refused(prompt):
    error = refusal(Kind.TEXT, prompt=prompt)
    assert (error.status, error.param) == (400, "prompt")


def test_more_answers_than_a_request_may_have_are_refused():
    assert "128 answers" in str(refusal(Kind.TEXT, prompt=["a"] * 65, n=2))


def test_another_model_is_not_found():
    error = refusal(model="gpt-9")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "is a list, not an object"),
        (b"null", "is null"),
        (b"\xff{}", "is not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b"[" * 100_000, "nests"),
        (b'{"prompt": "a", "temperature": NaN}', "nan"),
        (b'{"prompt": "a", "temperature": 1e999}', "inf"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
    ],
)
def test_a_body_that_is_no_object_of_json_is_refused(body, message):
    with pytest.raises(ApiError, match=message) as caught:
        read_body(body, Kind.TEXT, model="tiny")
    assert caught.value.status == 400
    assert caught.value.to_dict()["error"]["type"] == "invalid_request_error"


def test_a_parameter_that_is_unknown_is_told_those_that_do_something():
    offered = refusal(made_up=1).args[0].partition("use some of ")[2].split(", ")
    assert {"max_tokens", "stop", "top_logprobs", "typical_acceptance", "stream_options", "n"} <= set(offered)
    assert not {"tools", "echo", "audio", "response_format", "user", "num_beams", "chat"} & set(offered)
    assert "is a parameter of /v1/chat/completions" in refusal(Kind.TEXT, messages=[]).args[0]
