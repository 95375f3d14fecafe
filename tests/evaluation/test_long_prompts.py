"""Prompts of every kind that fit, from texts that serve no other prompt. No model, no time."""

from __future__ import annotations

import re

import pytest

from qspec_jax.evaluation.long_prompts import KINDS, ROOM, Ruler, Shelf, long_prompts
from qspec_jax.evaluation.sharegpt import Document

CONTEXT, NUMBER = 1024, 2


def answer(name):
    return "Here are words: " + " ".join(f"{name}word{place}" for place in range(20))


def conversation(number):
    exchanges = tuple((f"What is question {number} {turn}?", answer(f"a{number}x{turn}x")) for turn in range(3))
    return Document("unused", exchanges[0][0], exchanges)


def module(number):
    functions = [f'def function{place}():\n    """{answer(f"m{number}x{place}x")}"""\n' for place in range(24)]
    return "\n\n".join([f'"""Module {number}."""', *functions])


class Letters:
    """A tokenizer of a token per letter, with a template that is ten letters a message."""

    has_chat_template = True

    def encode(self, text, *, add_special_tokens=True):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def apply_chat(self, messages):
        return [0] * sum(10 + len(message["content"]) for message in messages)


CONVERSATIONS, MODULES = [conversation(number) for number in range(90)], [module(number) for number in range(5)]


@pytest.fixture(scope="module", params=["bytes", "letters"])
def shelf_and_prompts(request):
    shelf = Shelf(CONVERSATIONS, Ruler(None if request.param == "bytes" else Letters()), modules=MODULES)
    return shelf, list(long_prompts(shelf, context=CONTEXT, number=NUMBER))


@pytest.fixture
def prompts(shelf_and_prompts):
    return shelf_and_prompts[1]


def texts(entry):
    """What a prompt holds of the conversations and modules: their words."""
    content = entry.get("prompt") or " ".join(message["content"] for message in entry["messages"])
    return set(re.findall(r"[am]\d+x\d+xword\d+", content))


def test_every_kind_is_there_and_leaves_room(shelf_and_prompts):
    shelf, prompts = shelf_and_prompts
    assert [entry["kind"] for entry in prompts] == [*KINDS] * NUMBER
    assert [entry["id"] for entry in prompts] == [f"{kind}-1k-{number}" for number in (1, 2) for kind in KINDS]
    lengths = [shelf.ruler.length(entry) for entry in prompts]
    assert max(lengths) <= CONTEXT - ROOM
    assert min(lengths) > 0.8 * (CONTEXT - ROOM)


def test_no_text_is_in_two_prompts(prompts):
    held = [texts(entry) for entry in prompts]
    assert all(held)
    assert len(set.union(*held)) == sum(map(len, held))


def test_what_is_asked_for_stands_in_the_text(prompts):
    about_text, about_code = (entry["prompt"] for entry in prompts if entry["kind"] == "question")
    number = re.search(r"from the text above: What is question (\d+) 0\?$", about_text)[1]
    assert answer(f"a{number}x0x") in about_text
    place = re.search(r"what does the function function(\d+) do, and what does it return\?$", about_code)[1]
    assert re.search(rf'def function{place}\(\):\n    """.*"""\n', about_code)


def test_a_copy_changes_a_word_of_the_beginning():
    documents = [Document("the weather and then the weather again. " * 99, "")]  # no conversation, hence no chat
    shelf = Shelf(documents, Ruler(None), modules=[])
    (entry,) = long_prompts(shelf, context=CONTEXT, number=1)
    assert entry["kind"] == "rewrite"
    assert "but write WEATHER for weather.\n\nthe weather and then" in entry["prompt"]


def test_a_chat_ends_with_a_question_after_whole_exchanges(prompts):
    for entry in (entry for entry in prompts if entry["kind"] == "chat"):
        messages = entry["messages"]
        assert [message["role"] for message in messages] == (["user", "assistant"] * 99)[: len(messages)]
        assert messages[-1]["role"] == "user"
        known = dict(exchange for document in CONVERSATIONS for exchange in document.exchanges)
        *whole, (_, last) = zip(messages[:-1:2], messages[1::2], strict=True)
        assert all(known[asked["content"]] == answered["content"] for asked, answered in whole)
        assert any(text.startswith(last["content"]) for text in known.values())


def test_code_is_a_module_up_to_somewhere(prompts):
    for entry in (entry for entry in prompts if entry["kind"] == "code"):
        beginning = entry["prompt"].partition("\n\n")[2]
        assert sum(source.startswith(beginning) and source != beginning for source in MODULES) == 1


def test_a_shelf_that_runs_out_makes_fewer_prompts():
    shelf = Shelf(CONVERSATIONS[:4], Ruler(None), modules=MODULES[:1])
    kinds = [entry["kind"] for entry in long_prompts(shelf, context=CONTEXT, number=3)]
    assert kinds.count("code") == 1
    assert len(kinds) < 4
