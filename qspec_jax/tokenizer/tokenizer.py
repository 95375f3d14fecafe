"""Text to token ids and back: one small interface over the tokenizers of transformers.

Only what generation needs: a prompt, a chat prompt, decoding at once and decoding piece by piece. The
import of transformers is slow; ``backend.py`` does without where it can.
"""

from __future__ import annotations

import itertools
import operator
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qspec_jax.errors import UsageError
from qspec_jax.tokenizer.backend import PlainBackend, is_of_a_library

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"
_END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>")


class Tokenizer:
    """A model's tokenizer. Made by :func:`load_tokenizer`.

    Attributes:
        eos_token_ids: the tokens that end a text or a turn of a chat.
        special_tokens: the tokens that are no part of a decoded text, and how they are written.
    """

    def __init__(self, backend: PlainBackend | PreTrainedTokenizerBase, *, eos_token_ids: Sequence[int] = ()) -> None:
        """Wraps what does the work.

        Args:
            backend: a fast tokenizer of transformers, or what stands for one.
            eos_token_ids: ending tokens known from elsewhere, besides the tokenizer's own.
        """
        self._lock = threading.RLock()  # transformers sets options of what it calls before each call
        self._backend: Any = backend  # its annotations allow every return type of every option
        vocabulary = backend.get_vocab()
        template = str(self._backend.chat_template or "")
        own = [] if self._backend.eos_token_id is None else [self._backend.eos_token_id]
        marks = [vocabulary[mark] for mark in _END_OF_TURN_TOKENS if mark in template and mark in vocabulary]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *eos_token_ids, *marks]))
        self._beginning: tuple[Any, list[int]] = ([], [])  # system messages, and tokens of a conversation with them
        added = backend.added_tokens_decoder.items()
        self.special_tokens = {token_id: str(token.content) for token_id, token in added if token.special}
        self._texts = dict(self.special_tokens)  # of tokens that somebody has asked for

    def __repr__(self) -> str:
        template = "a" if self.has_chat_template else "no"
        ends = ", ".join(map(str, self.eos_token_ids)) or "nothing"
        return f"Tokenizer({self.vocab_size} tokens, {template} chat template, ends with {ends})"

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model may have more embeddings than that."""
        return len(self._backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether :meth:`apply_chat` works."""
        return bool(self._backend.chat_template)

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, one after the other where there are several by name; None without one."""
        template = self._backend.chat_template
        return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else template or None

    def vocabulary_token(self, token_id: int) -> str | None:
        """How a token is written in the vocabulary, special tokens too; None where there is no such token."""
        return self._token(token_id)

    def encode(self, text: str | Any, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of ``text``, after the BOS token if the model wants one and ``add_special_tokens`` is set.

        Raises:
            UsageError: it is no text, has half a character, or something that the vocabulary has no token for.
        """
        if not isinstance(text, str):
            raise UsageError(f"text is of type {type(text).__name__}; use a str, each of several by itself")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError("text has half a character, which no UTF-8 text has; remove it") from error
        try:
            with self._lock:
                return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not is_of_a_library(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"the text cannot be tokenised: {reason}; give other text, or mend the model's tokenizer.json"
            ) from error

    def apply_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant's answer begins.

        Args:
            messages: ``{"role": "user", "content": text}``, oldest first.

        Raises:
            UsageError: there is no chat template, it refuses these messages, or the vocabulary lacks tokens for them.
        """
        return self.encode(self.chat_text(messages), add_special_tokens=False)

    def _chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        if not self.has_chat_template:
            raise UsageError("the tokenizer has no chat template; give the prompt as plain text")
        try:
            with self._lock:
                return self._backend.apply_chat_template(list(messages), **options)
        except UsageError:
            raise
        except Exception as error:  # a template is a program, and fails in every way that programs do
            from jinja2 import TemplateError

            if type(error) is TemplateError:  # of its raise_exception; those below are of Jinja
                raise UsageError(f"the chat template refuses the messages: {error}") from error
            raise UsageError(f"the chat template fails: {type(error).__name__}: {error}") from error

    def system_length(self, messages: Sequence[Mapping[str, Any]], token_ids: Sequence[int]) -> int:
        """How many tokens a conversation begins with as does any other one with the same system messages.

        Args:
            messages: of the conversation.
            token_ids: its tokens, of :meth:`apply_chat`.
        """
        system = list(itertools.takewhile(lambda message: message.get("role") == "system", messages))
        if not system:
            return 0
        known, others = self._beginning  # at once: other threads may set it
        if known != system:
            try:
                others = self.apply_chat([*system, {"role": "user", "content": ""}])
            except UsageError:
                others = []  # unlike the conversation, this one is refused
            self._beginning = (system, others)
        pairs = zip(token_ids, others, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the chat template; without ``add_generation_prompt`` its last message goes on.

        Raises:
            UsageError: there is no chat template, or it refuses these messages.
        """
        return self._chat(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def decode(self, ids: Sequence[int] | Any) -> str:
        """The text of some tokens, special tokens left out, and what is no token of the vocabulary.

        Args:
            ids: a flat list, or an array of NumPy or JAX ``[T]``.

        Raises:
            UsageError: they are no token ids.
        """
        try:
            ids = list(map(operator.index, ids))
        except TypeError as error:
            raise UsageError(f"ids is of type {type(ids).__name__}; use a flat list or array of token ids") from error
        if odd := [one for one in ids if not 0 <= one < 2**32]:
            raise UsageError(f"ids has token {odd[0]}; use token ids of the model")
        with self._lock:
            return self._backend.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_text(self, token_id: int) -> str:
        """What a token is within a text; a special token as it is written, half a character as a replacement."""
        if (known := self._texts.get(token_id)) is None:  # the first token of a text may lose its space
            known = self.decode([token_id, token_id])[len(self.decode([token_id])) :]
            self._texts[token_id] = known
        return known

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the files from which :func:`load_tokenizer` makes this tokenizer again into a directory.

        What was given as ``eos_token_ids`` is not among them.
        """
        self._backend.save_pretrained(path)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes the tokens of one text piece by piece."""
        return StreamDecoder(self)

    def name_of_textless(self, token_id: int) -> str | None:
        """What stands for a token that is no part of any text: a special one's name; None for others."""
        if self._token(token_id) is None:
            return f"<{token_id}>"
        return self.special_tokens.get(token_id)

    def _is_visible(self, token_id: int) -> bool:
        return token_id not in self.special_tokens and self._token(token_id) is not None

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._token(token_id) or "") is not None

    def _token(self, token_id: int) -> str | None:
        return self._backend.convert_ids_to_tokens(token_id)


class StreamDecoder:
    """Decodes a text whose tokens come in pieces.

    All that :meth:`push` and :meth:`finish` return, joined, is ``decode`` of all tokens, exactly. Text is
    held back while tokens to come could still change it: an unfinished UTF-8 sequence, and a run of
    byte tokens (SentencePiece decodes such a run as a whole, valid or not).

    It decodes the tokens not yet settled together with one settled token before them, since the first
    token of a text may be decoded differently (its leading space is dropped).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._context: list[int] = []
        self._num_emitted = 0  # characters of the text of context + pending

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """As of the tokenizer."""
        return self._tokenizer.special_tokens

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that is now certain, possibly empty."""
        self._pending += [token_id for token_id in map(int, ids) if self._tokenizer._is_visible(token_id)]
        settled = len(self._pending)
        while settled and self._tokenizer._is_byte(self._pending[settled - 1]):
            settled -= 1
        if not settled:
            return ""
        text = self._tokenizer.decode(self._context + self._pending[:settled])
        stable = text.rstrip(_REPLACEMENT)
        if len(stable) < len(text):
            new, self._num_emitted = stable[self._num_emitted :], max(self._num_emitted, len(stable))
            return new
        new = text[self._num_emitted :]
        self._context, self._pending = [self._pending[settled - 1]], self._pending[settled:]
        self._num_emitted = len(self._tokenizer.decode(self._context))
        return new

    def finish(self) -> str:
        """Returns the text still held back, and is then ready for another text."""
        rest = self._tokenizer.decode(self._context + self._pending)[self._num_emitted :]
        self._pending, self._context, self._num_emitted = [], [], 0
        return rest
