"""Builds the tokenizer that a GGUF file describes, out of its metadata.

A GGUF file holds the vocabulary, the merges or scores and the ids of the special tokens, but not the rules
that cut text into words: those it only names (``tokenizer.ggml.pre``), and the tables here spell them
out. A prompt gets no EOS token, whatever ``add_eos_token`` says: it would have ended before it is answered.
Two models are covered: ``gpt2`` (byte-level BPE) and ``llama`` (SentencePiece BPE with byte fallback).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qspec_jax.errors import CheckpointError, CheckpointWarning, UnsupportedModelError
from qspec_jax.model.rope_scaling import shown
from qspec_jax.tokenizer.backend import PlainBackend
from qspec_jax.weights.gguf.file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# What llama.cpp takes where a SentencePiece vocabulary does not say.
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
_NO_TOKEN = (-1, 0xFFFFFFFF)
_REMEDY = "put the model's tokenizer.json and tokenizer_config.json beside the file"
_SPACE_MARK = "▁"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Words(NamedTuple):
    """How a byte-level vocabulary cuts text into words before merging.

    Attributes:
        split: regular expression of a word, None for the one of GPT-2.
        single_digits: digits are cut apart first.
        compose: text is brought into Unicode's composed form (NFC) first.
        whole_words: a word that is a token is taken as it is, even if no merges lead to it.
        adds_bos: a text begins with the BOS token unless the file says otherwise.
    """

    split: str | None = None
    single_digits: bool = False
    compose: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_GPT2 = _Words()
_LLAMA3 = _Words(_LLAMA3_WORDS, whole_words=True, adds_bos=True)
_QWEN2 = _Words(_QWEN2_WORDS, compose=True)
_WORDS = {
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "smollm": _Words(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Words(_TEKKEN_WORDS, whole_words=True, adds_bos=True),
}


def build_tokenizer(file: GGUFFile) -> PlainBackend:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        CheckpointError: the file holds no vocabulary, or a damaged one.
        UnsupportedModelError: the vocabulary is of a kind, or cut into words by rules, not supported.

    Warns:
        CheckpointWarning: the file does not say how text is cut into words.
    """
    metadata = _Metadata(file.path, file.metadata)
    tokens = metadata.list_of("tokens", str)
    types = metadata.list_of("token_type", int, default=[_NORMAL] * len(tokens))
    model = metadata.required("model")
    if model == "gpt2":
        words = _words(file.path, metadata.get("pre"))
        tokenizer, adds_bos = _byte_level(metadata, tokens, words), words.adds_bos
    elif model == "llama":
        tokenizer, adds_bos = _sentencepiece(metadata, tokens, types), True
    else:
        raise UnsupportedModelError(
            f"{file.path}: tokenizer model {model!r} is not supported; supported: gpt2, llama; {_REMEDY}"
        )
    _add_whole_tokens(tokenizer, tokens, types)
    adds_bos = metadata.flag("add_bos_token", adds_bos)
    used = {"eos_token", *(["bos_token"] if adds_bos else []), *(["unk_token"] if model == "llama" else [])}
    defaults = _SENTENCEPIECE_IDS if model == "llama" else {}
    special = {
        name: metadata.token(key, tokens, checked=name in used, default=defaults.get(name))
        for name, key in _SPECIAL_TOKENS.items()
    }
    if adds_bos and special["bos_token"] is not None:
        _prepend(tokenizer, special["bos_token"])
    template = file.metadata.get("tokenizer.chat_template")
    return PlainBackend(
        tokenizer,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **special,
    )


def named_tokens(file: GGUFFile) -> dict[str, str]:
    """The special tokens that a file names, and its chat template, as far as they make sense."""
    metadata = _Metadata(file.path, file.metadata)
    tokens = metadata.get("tokens")
    tokens = tokens if isinstance(tokens, list) else []
    found = {name: metadata.token(key, tokens, checked=False, default=None) for name, key in _SPECIAL_TOKENS.items()}
    found["chat_template"] = file.metadata.get("tokenizer.chat_template")
    return {name: text for name, text in found.items() if isinstance(text, str)}


class _Metadata(NamedTuple):
    """The ``tokenizer.ggml`` part of a file's metadata."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"tokenizer.ggml.{key}", default)

    def required(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{key} is missing; {_REMEDY}")
        return value

    def list_of(self, key: str, kind: type | tuple[type, ...], default: list | None = None) -> list[Any]:
        """A list whose entries are all of ``kind``."""
        value = self.required(key) if default is None else self.get(key, default)
        if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{key} has entries of other types; {_REMEDY}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, (bool, int)):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{key}={shown(value)} is neither true nor false")
        return bool(value)

    def token(self, key: str, tokens: Sequence[str], *, checked: bool, default: int | None) -> str | None:
        """The token whose id is under ``key``; None if there is none, or it is not ``checked`` and cannot be."""
        token_id = self.get(key, default)
        if token_id in (None, *_NO_TOKEN):
            return None
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < len(tokens):
            if not checked or self.get(key) is None:
                return None
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{key}={shown(token_id)} is outside the {len(tokens)} tokens; {_REMEDY}"
            )
        return tokens[token_id]


def _words(path: Path, name: Any) -> _Words:
    if name is None:
        warnings.warn(
            f"{path} does not say how text is cut into words (tokenizer.ggml.pre is missing, as in files of early "
            f"2024), so GPT-2's rule is taken; of another model the tokens would be wrong. To be sure, {_REMEDY}, or "
            "convert the model anew",
            CheckpointWarning,
            stacklevel=3,
        )
        return _GPT2
    if not isinstance(name, str) or name not in _WORDS:
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.pre={shown(name)} is not supported; supported: {', '.join(_WORDS)}; or {_REMEDY}"
        )
    return _WORDS[name]


def _byte_level(metadata: _Metadata, tokens: Sequence[str], words: _Words) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = _listed_merges(metadata.path, metadata.list_of("merges", str))
    tokenizer = Tokenizer(_bpe(metadata.path, models.BPE, tokens, merges, ignore_merges=words.whole_words))
    steps: list[Any] = []
    if words.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if words.split is not None:
        steps.append(pre_tokenizers.Split(Regex(words.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if words.compose:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata: _Metadata, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """As the ``tokenizer.json`` of Llama 2 and Mistral 7B: spaces become marks, unknown characters bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if metadata.get("merges") is not None:
        merges = _listed_merges(metadata.path, metadata.list_of("merges", str))
    else:
        scores = metadata.list_of("scores", (int, float))
        if not len(scores) == len(types) == len(tokens):
            raise CheckpointError(
                f"{metadata.path}: {len(tokens)} tokens have {len(scores)} scores and {len(types)} types; {_REMEDY}"
            )
        merges = list(_merges_of_scores(tokens, scores, types))
    default = _SENTENCEPIECE_IDS["unk_token"]
    unknown = metadata.token("unknown_token_id", tokens, checked=True, default=default)
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(_bpe(metadata.path, models.BPE, tokens, merges, **options))
    steps: list[Any] = [normalizers.Replace(" ", _SPACE_MARK)]
    undo: list[Any] = [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.flag("add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE_MARK))
        undo.append(decoders.Strip(" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _bpe(path: Path, model: Any, tokens: Sequence[str], merges: list[tuple[str, str]], **options: Any) -> Any:
    try:
        return model(vocab={token: token_id for token_id, token in enumerate(tokens)}, merges=merges, **options)
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path}: the vocabulary and its merges do not fit: {error}") from error


def _listed_merges(path: Path, merges: Sequence[str]) -> list[tuple[str, str]]:
    if bad := [merge for merge in merges if merge.count(" ") != 1]:
        raise CheckpointError(f"{path}: tokenizer.ggml.merges has entries that are not two tokens: {bad[:3]}")
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def _merges_of_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """The merges that SentencePiece's rule implies: of all pairs that form a token, the best score first."""
    normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    for token in sorted(normal, key=normal.__getitem__, reverse=True):
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in normal and token[cut:] in normal:
                yield token[:cut], token[cut:]


def _add_whole_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Keeps control and user-defined tokens whole in a text; only the former are skipped in decoding."""
    from tokenizers import AddedToken

    special, plain = (
        [
            AddedToken(token, normalized=False, special=_CONTROL in kinds)
            for token, kind in zip(tokens, types, strict=False)
            if kind in kinds
        ]
        for kinds in ((_UNKNOWN, _CONTROL), (_USER_DEFINED,))
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _prepend(tokenizer: Tokenizer, bos_token: str) -> None:
    from tokenizers import processors

    special = [(bos_token, tokenizer.token_to_id(bos_token))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A", pair=f"{bos_token} $A {bos_token} $B", special_tokens=special
    )
