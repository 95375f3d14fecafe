"""Stop strings: found across tokens, never shown, and the same whatever the pieces that a text comes in."""

from __future__ import annotations

import random
from typing import ClassVar

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


class Letters:
    """Decodes a letter a token; capital ones are special tokens, written with brackets, and no part of the text."""

    special_tokens: ClassVar = {ord(letter): f"<{letter}>" for letter in "ABC"}

    def push(self, ids):
        return "".join(map(chr, [token for token in ids if token not in self.special_tokens]))

    def finish(self):
        return ""


def letters(text, stop, *, min_new_tokens=0, size=1):
    """The watch after a text of letters, how many belong to it, and all that was certain on the way."""
    watch, kept, certain = TextWatch(Letters(), stop, min_new_tokens=min_new_tokens), 0, []
    for start in range(0, len(text), size):
        kept += watch.push([ord(letter) for letter in text[start : start + size]])
        certain.append(watch.text[: watch.num_certain()])
        if watch.stopped:
            break
    watch.finish()
    return watch, kept, certain


@pytest.mark.parametrize(
    ("stop", "min_new_tokens", "expected"),
    [
        (["c"], 6, "abcdefgh"),  # over before it is minded
        (["c", "efghijklm"], 6, "abcdefgh"),  # also beside a longer one, which is looked for further back
        (["cdef", "c"], 6, "ab"),  # ends with the sixth token
        (["cdef", "ghi"], 7, "abcdefgh"),
        (["cdef", "gh"], 7, "abcdef"),
        (["h", "abcdefgh"], 8, ""),
        (["a", "b", "ef", "xyzxyzxyz"], 4, "abcd"),
        (["abcdefgh", "d"], 4, "abc"),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_stop_string_is_minded_from_the_same_token_on(stop, min_new_tokens, expected, size):
    watch, kept, certain = letters("abcdefgh", stop, min_new_tokens=min_new_tokens, size=size)
    assert watch.text == expected
    assert watch.stopped == (expected != "abcdefgh")
    assert kept >= min_new_tokens
    assert all(expected.startswith(piece) for piece in certain), "what was shown is taken back"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "kept"),
    [
        ("abAcd", ["<A>"], "ab", 3),
        ("abAcd", ["<B>"], "abcd", 5),
        ("abAcd", ["<A"], "abcd", 5),  # a token is there as a whole or not at all
        ("abAcd", [">"], "abcd", 5),
        ("abAcd", ["bc"], "a", 4),  # special tokens are no part of the text
        ("abAcd", ["b<A>"], "a", 3),
        ("abAcd", ["b<A>c"], "a", 4),
        ("abABcd", ["<A><B>c"], "ab", 5),
        ("abABcd", ["<B>", "d"], "ab", 4),
        ("aAbAc", ["<A>c"], "ab", 5),
        ("aAbB", ["x", "<A>"], "a", 2),
        ("Aa", ["<A>"], "", 1),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_string_may_name_special_tokens(text, stop, expected, kept, size):
    watch, num_tokens, certain = letters(text, stop, size=size)
    assert (watch.text, num_tokens) == (expected, kept)
    assert all(expected.startswith(piece) for piece in certain), "what was shown is taken back"


def test_a_special_token_as_stop_string_waits_for_min_new_tokens():
    watch, kept, _ = letters("aAbAc", ["<A>"], min_new_tokens=3)
    assert (watch.text, kept) == ("ab", 4)


def test_special_tokens_of_a_model_end_its_text(demo):
    for stop in (["<|im_end|>"], ["never", "two<|im_end|>"]):
        watch, kept, certain = watched(demo, stop, [1] * 100, text="One two<|im_end|>\nthree")
        assert watch.stopped
        assert watch.text == ("One two" if len(stop) == 1 else "One ")
        assert kept == len(demo.encode("One two")) + 1
        assert all(watch.text.startswith(piece) for piece in certain)
