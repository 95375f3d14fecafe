"""JSON that every program reads, whatever a result holds and wherever it is written."""

from __future__ import annotations

import json
import math

import pytest

from qspec_jax.errors import UsageError
from qspec_jax.files.json_lines import MAX_DEPTH, UnreadableValueError, dumps, flaw, parse_object


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"hello"', "is a text, not an object"),
        ("5", "is a number, not an object"),
        ("null", "is null, not an object"),
        ("true", "is true or false, not an object"),
        ("[]", "is a list, not an object"),
        ('{"prompt": "a"', "is not JSON: "),
        ('"prompt": "a"}', "is not JSON: Extra data at column 9"),
    ],
)
def test_what_is_no_object_is_named(line, message):
    with pytest.raises(UsageError, match=message):
        parse_object(line)


@pytest.mark.parametrize(
    ("value", "message"),
    [("[" * 100_000 + "]" * 100_000, "deeper than 100"), ("1" * 5000, "a number of 5000 digits")],
    ids=["deep", "long"],
)
def test_what_json_allows_and_nobody_can_read_is_no_other_error(value, message):
    with pytest.raises(UnreadableValueError, match=message):
        parse_object(f'{{"id": {value}}}')


@pytest.mark.parametrize("line", ['{"a": 1, "b": 2, "a": 1}', '{"id": [{"a": 1, "a": 2}]}'])
def test_a_name_that_stands_twice_is_named(line):
    with pytest.raises(UnreadableValueError, match=r'^has "a" twice$'):
        parse_object(line)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nested(MAX_DEPTH + 1), "deeper than 100"),
        ({"a": [math.nan]}, "has nan, which JSON has not"),
        (math.inf, "has inf"),
        ("\ud83d", "half of a surrogate pair"),
        ({"\udc00": 1}, "half of a surrogate pair"),
    ],
    ids=["deep", "nan", "inf", "text", "key"],
)
def test_what_cannot_be_handed_on_has_a_flaw(value, message):
    assert message in str(flaw(value))


@pytest.mark.parametrize(
    "value", [nested(MAX_DEPTH), 10**4000, "🙂", {"a": None}], ids=["deep", "long", "text", "dict"]
)
def test_all_else_has_none(value):
    assert flaw(value) is None


@pytest.mark.parametrize("encoding", [None, "ascii", "cp1252", "latin-1", "utf-8"])
def test_json_escapes_what_an_encoding_lacks(encoding):
    value = {"text": 'é 日本 🙂 "\\u" \x1b', "half": "\ud83d"}
    text = dumps(value, encoding)
    assert json.loads(text.encode(encoding or "utf-8").decode(encoding or "utf-8")) == value
    assert ("🙂" in text) == (encoding in (None, "utf-8"))


def test_a_line_is_one_for_every_program():
    text = "".join(map(chr, range(0x3000)))
    assert len(dumps(text).splitlines()) == 1
    assert json.loads(dumps(text)) == text


def test_numbers_that_json_has_not_are_null():
    assert (
        dumps({"logprobs": [-1.5, -math.inf], "top": {3: math.nan}}) == '{"logprobs": [-1.5, null], "top": {"3": null}}'
    )
