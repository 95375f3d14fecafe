"""Long prompts by kind of task, of a length in tokens that leaves room for an answer.

Texts are the answers of conversations, one after another, and modules of Python's standard library. Each of them serves
one prompt and no other.

- ``chat``: conversations one after another as one, of each the first 2,048 tokens. It ends with a question.
- ``code``: a module that is cut off, to go on.
- ``question``: a text, and a question that a part of it answers. Every other text is a module, asked for a function.
- ``rewrite``: a text to copy with one word changed, so that the answer repeats its prompt.
- ``summary``: a text to summarise.
"""

from __future__ import annotations

import ast
import bisect
import functools
import itertools
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.evaluation.sharegpt import Document

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer

SHORT = range(20, 301)  # characters of a question
NEW_TOKENS = 256  # for which a prompt leaves room,
ROOM = NEW_TOKENS + 32  # and for the positions that a cycle writes beyond them
_BYTES_PER_TOKEN = 4
_CONVERSATION = 2048  # tokens of each that a chat joins
_LEAST_TOKENS = 50  # of a text that is cut to fit
_LEAST_CHARACTERS = 200  # of an answer that a question is asked for
_TOKENS_OF_A_MESSAGE = 8  # of the chat template, about
_BEGINNING = 1000  # characters of a text that its copy has within its new tokens

_Exchange = tuple[str, str]  # a question and its answer
_Entry = dict[str, Any]  # of a line of a prompt file: "prompt" or "messages"


class Ruler:
    """Measures and cuts texts in tokens: those of a model, or four bytes each where there is no tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return -(-len(text.encode()) // _BYTES_PER_TOKEN) if self._tokenizer is None else len(self._ids(text))

    def cut(self, text: str, tokens: int) -> str:
        """As much of the beginning of a text as has some tokens."""
        if self._tokenizer is None:
            return text.encode()[: max(0, tokens) * _BYTES_PER_TOKEN].decode(errors="ignore")
        return text[: len(self._tokenizer.decode(self._ids(text)[: max(0, tokens)]))]

    def exchange(self, exchange: _Exchange) -> int:
        """Tokens of a question and its answer in a conversation, about."""
        return sum(self.count(text) + _TOKENS_OF_A_MESSAGE for text in exchange)

    def length(self, entry: _Entry) -> int:
        """Tokens of a prompt as a model with a chat template reads it."""
        messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
        if self._tokenizer is not None and self._tokenizer.has_chat_template:
            return len(self._tokenizer.apply_chat(messages))
        return sum(self.count(message["content"]) + _TOKENS_OF_A_MESSAGE for message in messages)

    def _ids(self, text: str) -> list[int]:
        assert self._tokenizer is not None
        return self._tokenizer.encode(text, add_special_tokens=False)


class Shelf:
    """Texts that no prompt has taken yet, and what measures them.

    Attributes:
        ruler: in tokens.
        has_conversations: whether any document is one.
    """

    def __init__(self, documents: Sequence[Document], ruler: Ruler, *, modules: Sequence[str] | None = None) -> None:
        """Puts texts on the shelf.

        Args:
            documents: to take from, in this order.
            ruler: of the model.
            modules: Python sources, of which the shortest that will do is taken; None for the standard library.
        """
        self.ruler = ruler
        self.has_conversations = any(document.exchanges for document in documents)
        self._documents = iter(documents)
        sources = _standard_library() if modules is None else modules
        self._modules = sorted((ruler.count(source), source) for source in sources)

    def exchanges(self) -> Iterator[_Exchange]:
        """Questions and answers of the next conversations, of each the first 2,048 tokens."""
        for document in self._documents:
            total = 0
            for exchange in document.exchanges:
                total += self.ruler.exchange(exchange)
                if total > _CONVERSATION:
                    break
                yield exchange

    def answers(self, tokens: int) -> list[_Exchange] | None:
        """Exchanges of the next documents until the answers have some tokens; None where there are too few.

        A question is empty where it needs the ones before it, or where the document is no conversation.
        """
        found, total = [], 0
        for document in self._documents:
            for question, answer in document.exchanges or [("", document.text)]:
                found.append((question if question == document.prompt else "", answer))
                total += self.ruler.count(answer)
            if total >= tokens:
                return found
        return None

    def module(self, tokens: int) -> str | None:
        """The shortest module of more than some tokens; None where there is none."""
        index = bisect.bisect(self._modules, tokens, key=lambda module: module[0])
        return self._modules.pop(index)[1] if index < len(self._modules) else None


def _standard_library() -> list[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def long_prompts(shelf: Shelf, *, context: int, number: int) -> Iterator[_Entry]:
    """Lines of a prompt file, with ``id`` and ``kind``: of each kind as many as the shelf has texts for.

    Kinds take turns, as neighbouring documents may be parts of one long conversation.

    Args:
        shelf: from which their texts are taken.
        context: tokens, of which a prompt leaves :data:`ROOM`.
        number: of prompts of each kind, at most.
    """
    for index, (kind, make) in itertools.product(range(number), _MAKERS.items()):
        entry = make(shelf, context - ROOM, index, number)
        if entry is not None:
            yield {"id": f"{kind}-{context // 1024}k-{index + 1}", "kind": kind, **entry}


def _chat(shelf: Shelf, limit: int, index: int, number: int) -> _Entry | None:
    """Ends with a question after an answer that is cut to fit, or with the question of that answer."""
    if not shelf.has_conversations:
        return None
    earlier: list[_Exchange] = []
    total = 0
    for question, answer in shelf.exchanges():
        asked = shelf.ruler.exchange((question, ""))
        if len(question) >= SHORT.stop or asked >= limit:
            continue
        if total + asked >= limit:
            *whole, (last, cut) = earlier
            make = functools.partial(_cut_conversation, whole, last, question)
            return _fitted(shelf.ruler, make, cut, limit) or _conversation(whole, last)
        earlier.append((question, answer))
        total += shelf.ruler.exchange((question, answer))
    return None


def _cut_conversation(whole: Sequence[_Exchange], last: str, question: str, part: str) -> _Entry:
    return _conversation([*whole, (last, part)], question)


def _conversation(exchanges: Sequence[_Exchange], question: str) -> _Entry:
    texts = [text for exchange in exchanges for text in exchange]
    roles = ["user", "assistant"] * len(exchanges)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return {"messages": [*messages, {"role": "user", "content": question}]}


def _code(shelf: Shelf, limit: int, index: int, number: int) -> _Entry | None:
    task = "Continue this Python module from where it ends. Write nothing but code."
    module = shelf.module(limit)
    if module is None:
        return None
    return _fitted(shelf.ruler, lambda part: {"prompt": f"{task}\n\n{part}"}, module, limit)


def _question(shelf: Shelf, limit: int, index: int, number: int) -> _Entry | None:
    """Asks for what stands the deeper in its text, the later in the file; passes over texts that answer nothing."""
    depth = (index + 0.5) / number
    if index % 2 or not shelf.has_conversations:
        while (module := shelf.module(limit)) is not None:
            if entry := _asking(shelf.ruler, module, limit, functools.partial(_about_code, module, depth)):
                return entry
        return None
    while (pairs := shelf.answers(limit)) is not None:
        if entry := _asking(shelf.ruler, _joined(pairs), limit, functools.partial(_about_text, pairs, depth)):
            return entry
    return None


def _asking(ruler: Ruler, text: str, limit: int, ask: Callable[[str], str]) -> _Entry | None:
    """A text and a question about it; None where there is nothing to ask for."""

    def make(part: str) -> _Entry:
        asked = ask(part)
        return {"prompt": asked and f"{part}\n\n{asked}"}

    entry = _fitted(ruler, make, text, limit)
    return entry if entry and entry["prompt"] else None


def _about_text(pairs: Sequence[_Exchange], depth: float, part: str) -> str:
    """A question whose answer is long and wholly in a part of the text; empty where there is none."""
    asked = [
        question
        for question, answer in pairs
        if is_short(question) and "?" in question and len(answer) >= _LEAST_CHARACTERS and answer in part
    ]
    return f"Answer this question from the text above: {asked[int(depth * len(asked))]}" if asked else ""


def _about_code(module: str, depth: float, part: str) -> str:
    """A question about a function with a docstring that is wholly in a part of a module; empty where there is none."""
    lines = part.count("\n")
    names = [
        node.name
        for node in ast.parse(module).body
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and (node.end_lineno or 0) <= lines
    ]
    if not names:
        return ""
    return f"In the module above, what does the function {names[int(depth * len(names))]} do, and what does it return?"


def _rewrite(shelf: Shelf, limit: int, index: int, number: int) -> _Entry | None:
    while (pairs := shelf.answers(limit)) is not None:
        text = _joined(pairs)
        words = Counter(re.findall(r"\b[a-z]{5,}\b", text[:_BEGINNING]))
        if words:
            word = words.most_common(1)[0][0]
            task = f"Copy the text below from its beginning, word for word, but write {word.upper()} for {word}."
            return _fitted(shelf.ruler, lambda part, task=task: {"prompt": f"{task}\n\n{part}"}, text, limit)
    return None


def _summary(shelf: Shelf, limit: int, index: int, number: int) -> _Entry | None:
    pairs = shelf.answers(limit)
    if pairs is None:
        return None
    task = "Summarise the text above in about 150 words."
    return _fitted(shelf.ruler, lambda part: {"prompt": f"{part}\n\n{task}"}, _joined(pairs), limit)


_MAKERS = {"chat": _chat, "code": _code, "question": _question, "rewrite": _rewrite, "summary": _summary}
KINDS = tuple(_MAKERS)


def is_short(text: str) -> bool:
    """Whether a text is one line of a length that people ask a question in."""
    return len(text) in SHORT and "\n" not in text


def _joined(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(answer for _, answer in pairs)


def _fitted(ruler: Ruler, make: Callable[[str], _Entry], text: str, limit: int) -> _Entry | None:
    """The prompt with as much of the beginning of a text as fits; None where next to nothing does.

    Args:
        ruler: of the model.
        make: the prompt with a part of the text.
        text: to cut, at the end of a line or sentence where one is near.
        limit: tokens of the prompt.
    """
    room = limit - ruler.length(make(""))
    while room >= _LEAST_TOKENS:
        entry = make(_whole(ruler.cut(text, room)))
        excess = ruler.length(entry) - limit
        if excess <= 0:
            return entry
        room -= excess
    return None


def _whole(text: str) -> str:
    """A text without the line or sentence at its end that was cut, unless that is much of it."""
    end = max(text.rfind("\n"), text.rfind(". ") + 1)
    return (text[: end + 1] if end > 0.95 * len(text) else text).rstrip()
