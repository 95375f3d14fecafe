"""What users write for options, in JSON or Python: taken as it is meant, or refused by name."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax import AutoPlan, DecodingPlan, Lookup, Precision, SamplingParams, UsageError, View
from qspec_jax.decoding.plan import plan_of
from qspec_jax.decoding.request_options import request_options
from qspec_jax.decoding.sampling_params import seed_after


class Odd:
    """Raises at whatever is asked of it."""

    def __repr__(self):
        raise RuntimeError

    def __float__(self):
        raise RuntimeError

    def __iter__(self):
        raise RuntimeError


def test_a_field_takes_what_stands_for_its_value():
    made = SamplingParams(
        temperature=jnp.float32(0.5),
        top_k=np.int64(3),
        top_p=None,
        logit_bias={"5": 1, np.int32(6): np.float16(2)},
        seed=np.uint32(2**32 - 1),
        stop_token_ids=np.array([1, 2]),
        stop="END",
        logprobs=np.array(2),
    )
    rest = {"logit_bias": {5: 1.0, 6: 2.0}, "stop_token_ids": (1, 2), "stop": ("END",), "logprobs": 2}
    expected = SamplingParams(0.5, 3, seed=2**32 - 1, **rest)
    assert made == expected
    assert [type(getattr(made, name)) for name in ("temperature", "top_k", "seed", "stop")] == [float, int, int, tuple]
    assert SamplingParams.of({"stop": ["END"], "seed": None}) == SamplingParams(stop="END")


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1.5},
        {"seed": 1.0},
        {"seed": True},
        {"seed": np.bool_(True)},
        {"seed": "1"},
        {"seed": 2**32},
        {"seed": 10**5000},
        {"temperature": 10**401},
        {"temperature": 1.2e39},
        {"temperature": 1e-39},
        {"temperature": -math.inf},
        {"temperature": "0.5"},
        {"temperature": True},
        {"temperature": 1j},
        {"temperature": Odd()},
        {"temperature": np.ones(2)},
        {"top_k": 2**31},
        {"top_k": np.float32(3)},
        {"top_p": math.nan},
        {"repetition_penalty": 1e39},
        {"repetition_penalty": 1e-39},
        {"presence_penalty": 1e39},
        {"frequency_penalty": -1e39},
        {"min_new_tokens": 2**31},
        {"ignore_eos": 1},
        {"ignore_eos": "yes"},
        {"stop_token_ids": (-2,)},
        {"stop_token_ids": [2**31]},
        {"stop_token_ids": "12"},
        {"stop_token_ids": ["1"]},
        {"stop_token_ids": 5},
        {"stop_token_ids": [True]},
        {"stop_token_ids": {3: 4}},
        {"stop_token_ids": Odd()},
        {"stop": 5},
        {"stop": b"END"},
        {"stop": [5]},
        {"stop": [""]},
        {"stop": "\ud800"},
        {"stop": {"END": 1}},
        {"logit_bias": {"5": 1, 5: 2}},
        {"logit_bias": {"five": 1}},
        {"logit_bias": {"5 ": 1}},
        {"logit_bias": {"5.0": 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {5: "1"}},
        {"logit_bias": {5: None}},
        {"logit_bias": {5: 1e39}},
        {"logit_bias": {True: 1}},
        {"logit_bias": [(5, 1)]},
        {"logprobs": 1.5},
        {"logprobs": True},
        {"typical_acceptance": "much"},
    ],
    ids=lambda options: str(next(iter(options))),
)
def test_what_is_no_value_of_a_field_is_refused_by_name_in_python_and_json(options):
    (name,) = options
    ways = [lambda: SamplingParams(**options), lambda: SamplingParams.of(options), lambda: request_options(options)]
    if options == {"logprobs": True}:  # means something in OpenAI's chats
        ways.pop()
    for make in ways:
        with pytest.raises(UsageError, match=f"^{name}[ =]") as caught:
            make()
        assert len(str(caught.value)) < 300


def test_mappings_alone_are_sampling_parameters():
    for wrong in ("greedy", ["temperature"], 5):
        with pytest.raises(UsageError, match=r"sampling=.*SamplingParams, or a mapping"):
            SamplingParams.of(wrong)
    with pytest.raises(UsageError, match="'max_tokens' is no sampling parameter"):
        SamplingParams.of({"max_tokens": 5})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": None, "stop": None, "max_new_tokens": None, "chat": None, "logit_bias": None}, {}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_new_tokens": 5}),
        ({"min_tokens": 2, "stop_sequences": ["a"]}, {"min_new_tokens": 2, "stop": ("a",)}),
        ({"n": 1, "best_of": None, "stream": True, "model": "x", "user": "y"}, {}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False}, {}),
        ({"logprobs": 3}, {"logprobs": 3}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"ignore_eos": False}, {"ignore_eos": False}),
        ({"chat": False, "temperature": 1}, {"chat": False, "temperature": 1.0}),
        ({"do_sample": False}, {}),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
        ({"prompt": "x", "id": 4, "question": "y", 5: 6}, {}),
    ],
    ids=str,
)
def test_names_and_nulls_of_others_mean_what_they_mean_there(given, expected):
    assert request_options(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 2}, "n=2: use .*num_samples"),
        ({"n": True}, "n=True"),
        ({"best_of": 3}, "best_of=3"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"tools": [{"type": "function"}]}, "tools="),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"echo": True}, "echo=True"),
        ({"do_sample": True}, "do_sample=True: use temperature"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample=False: use temperature"),
        ({"max_length": 50}, "max_length=50: use max_new_tokens"),
        (
            {"max_tokens": 5, "max_new_tokens": 6},
            "max_tokens=5 and max_new_tokens=6 are two values of one option; give one",
        ),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens=6 and max_tokens=5 are"),
        ({"max_tokens": 0}, "^max_tokens=0 must be at least 1"),
        ({"max_completion_tokens": "9"}, "^max_completion_tokens='9': use a whole number"),
        ({"repeat_penalty": -1}, "^repeat_penalty=-1: use more than 0"),
        ({"stop_sequences": [""]}, "^stop_sequences=.*at least one character"),
        ({"logprobs": True, "top_logprobs": 21}, "^top_logprobs=21: use 0"),
        ({"top_logprobs": 3}, "top_logprobs=3"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs=3"),
        ({"topP": 0.5}, "'topP' has no meaning; is it 'top_p'?"),
        ({"max-tokens": 5}, "'max-tokens' has no meaning; is it 'max_tokens'?"),
        ({"Temperature": 1}, "'Temperature' has no meaning"),
        ({"max_new_tokens": "16"}, "max_new_tokens='16': use a whole number"),
        ({"max_new_tokens": 16.5}, "max_new_tokens=16.5: use a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True: use a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"chat": "false"}, "chat='false': use true, false or null"),
        ({"chat": 0}, "chat=0: use true, false or null"),
    ],
    ids=str,
)
def test_what_is_not_done_is_refused_by_name(given, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        request_options(given)


def test_after_the_last_seed_comes_the_first():
    assert [seed_after(2**32 - 1, count) for count in range(3)] == [2**32 - 1, 0, 1]
    assert SamplingParams(seed=2**32 - 1).with_seed_after(2).seed == 1


def test_an_array_of_one_number_is_no_number_and_a_token_that_stands_twice_is_one():
    for value in (np.array([0.5]), jnp.asarray([0.5])):
        with pytest.raises(UsageError, match=r"temperature=.*: use a number"):
            SamplingParams(temperature=value)
    assert SamplingParams(stop_token_ids=[5] * 20 + [7]).stop_token_ids == (5, 7)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": np.array(["qspec", "w4a16"])},
        {"mode": Odd()},
        {"draft": ["w4a8"]},
        {"draft_length": np.array([3, 4])},
        {"draft_context": np.array([512, 1024])},
        {"draft_context": 2**40},
    ],
    ids=lambda options: next(iter(options)),
)
def test_odd_plans_are_refused_by_name(options):
    with pytest.raises(UsageError, match=f"^{next(iter(options))}="):
        plan_of(**{"mode": "qspec", **options})


def test_plans_are_made_of_plans_and_views():
    assert plan_of("qspec", draft_context=np.int64(512)) == plan_of("qspec", draft_context=512)
    for length in (-1, 1.5, "2", 17):
        with pytest.raises(UsageError, match=r"^draft_length="):
            DecodingPlan(Precision.W4A16, Precision.W4A8, length)
    with pytest.raises(UsageError, match="is no view"):
        DecodingPlan(Precision.W4A16, "w4a8", 2)
    for choices in ((), "w4a16", [5]):
        with pytest.raises(UsageError, match=r"one DecodingPlan at least|a list of plans"):
            AutoPlan("auto", choices)
    with pytest.raises(UsageError, match="choices=5: use a list of plans"):
        AutoPlan("auto", 5)
    assert AutoPlan("auto", [plain := DecodingPlan(Precision.W4A16)]) == AutoPlan("auto", (plain,))
    for view in ("w4a8", -1, Lookup()):
        with pytest.raises(UsageError, match="is no view"):
            Lookup(view)
    assert Lookup(Precision.W4A8) == Lookup(View.of(Precision.W4A8))
