"""Stop strings: found across tokens, never shown, and the same whatever the pieces that a text comes in."""

from __future__ import annotations

import random

import pytest

from qspec_jax.tokenizer.watch import TextWatch
from qspec_jax.weights.tokenizers import load_tokenizer

TEXT = "One fish.\n\nTwo fish: 🐟🐟, red fish!\nEND of it."


@pytest.fixture(scope="module")
def demo(demo_gguf):
    return load_tokenizer(demo_gguf)


def watched(demo, stop, sizes, *, text=TEXT, min_new_tokens=0):
    """The watch after a text in pieces of some sizes, its number of tokens, and what was certain after each piece."""
    tokens, watch = demo.encode(text), TextWatch(demo.stream_decoder(), stop, min_new_tokens=min_new_tokens)
    kept, certain = 0, []
    for size in sizes:
        piece, tokens = tokens[:size], tokens[size:]
        kept += watch.push(piece)
        certain.append(watch.text[: watch.num_certain()])
        if watch.stopped or not tokens:
            break
    watch.finish()
    return watch, kept, certain


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["\n\n"], "One fish."),
        (["sh: "], "One fish.\n\nTwo fi"),
        (["fish!", "red", "END"], "One fish.\n\nTwo fish: 🐟🐟, "),
        (["🐟,"], "One fish.\n\nTwo fish: 🐟"),
        (["O"], ""),
        (["it."], TEXT[:-3]),
        (["nowhere"], TEXT),
        ([], TEXT),
    ],
)
def test_a_text_ends_before_the_first_stop_string(demo, stop, expected):
    generator = random.Random(0)
    one_by_one = watched(demo, stop, [1] * 100)
    for sizes in ([1] * 100, [100], [generator.randint(1, 4) for _ in range(100)]):
        watch, kept, certain = watched(demo, stop, sizes)
        assert watch.text == expected
        assert watch.stopped == (expected != TEXT)
        assert kept == one_by_one[1]
        assert all(expected.startswith(piece) for piece in certain), "what was shown is taken back"


def test_text_is_certain_as_soon_as_it_cannot_begin_a_stop_string(demo):
    watch = TextWatch(demo.stream_decoder(), ["fish soup"])
    watch.push(demo.encode("Two fish"))
    assert watch.text[: watch.num_certain()] == "Two "
    watch.push(demo.encode(", red"))
    assert watch.num_certain() == len(watch.text)


def test_stop_strings_of_the_first_tokens_are_not_minded(demo):
    first = len(demo.encode("One fish"))
    watch, kept, _ = watched(demo, ["fish"], [1] * 100, min_new_tokens=first + 1)
    assert watch.text == "One fish.\n\nTwo "
    assert kept > first
