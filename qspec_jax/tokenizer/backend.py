"""What tokenises inside a ``Tokenizer``: transformers, or the library below it alone.

Importing transformers opens thousands of files, seconds on a slow disk. What it adds to a tokenizer that
``tokenizers`` describes completely is little: the names of the special tokens, and chat templates.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import tokenizers
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_KEPT_OPTIONS = {  # that are only written again
    "backend",
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "model_input_names",
    "model_max_length",
}
_FILES = (  # of which transformers makes a tokenizer, or says what is missing
    *("tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("tekken.json", "qwen.tiktoken"),
)
_REMEDY = "the directory needs the model's tokenizer.json and tokenizer_config.json"


class PlainBackend:
    """The methods of transformers' ``PreTrainedTokenizerFast`` that a ``Tokenizer`` uses, with the same results.

    What is out of the ordinary, and writing the files, is left to one of those, made when it is needed.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Completes a tokenizer with what its library has no place for; arguments as of ``PreTrainedTokenizerFast``.

        Args:
            tokenizer: without truncation and padding. Special tokens that it does not keep whole are added to it.
            chat_template: Jinja source, or several by their names. An empty one is none.
            options: ``bos_token``, ``eos_token`` and so on, None for those that are missing, and what is only
                written with the files.
        """
        from tokenizers import AddedToken

        self.chat_template: Any = chat_template or None
        self.backend_tokenizer = tokenizer
        self._options = options
        self._special_tokens = {name: options[name] for name in _SPECIAL_TOKENS if options.get(name) is not None}
        whole = {token.content for token in self.added_tokens_decoder.values()}
        missing = [token for token in self._special_tokens.values() if token not in whole]
        tokenizer.add_tokens([AddedToken(token, special=True) for token in missing])

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def eos_token_id(self) -> int | None:
        eos_token = self._special_tokens.get("eos_token")
        return None if eos_token is None else self.backend_tokenizer.token_to_id(eos_token)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        return self.backend_tokenizer.id_to_token(ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, **_: Any) -> str:
        return self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **options: Any
    ) -> Any:
        from qspec_jax.tokenizer.chat_template import is_plain, render

        if isinstance(self.chat_template, Mapping):
            raise UsageError(
                f"the tokenizer has chat templates named {', '.join(self.chat_template)} and no default one; write the "
                "one to use into chat_template.jinja, or give the prompt as plain text"
            )
        if self.chat_template is None or not add_generation_prompt or not is_plain(conversation):
            options["add_generation_prompt"] = add_generation_prompt
            return self._in_transformers.apply_chat_template(conversation, **options)
        return render(self.chat_template, conversation, self._special_tokens)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        self._in_transformers.save_pretrained(save_directory)

    @functools.cached_property
    def _in_transformers(self) -> Any:
        return import_transformers().PreTrainedTokenizerFast(
            tokenizer_object=self.backend_tokenizer, chat_template=self.chat_template, **self._options
        )


def import_transformers() -> Any:
    """The package, without the advice about models that it prints where there is no torch: none is used here."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return importlib.import_module("transformers")  # by name: to check types of all its models takes 20 s


def open_directory(path: Path, *, defaults: Mapping[str, str] | None = None) -> PlainBackend | PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory: what its ``tokenizer.json`` says, or else what transformers makes.

    Args:
        path: the directory.
        defaults: special tokens by their names, and a chat template, for a ``tokenizer.json`` beside which no other
            file names them.

    Raises:
        CheckpointError: there is none, it is damaged, or it is Python that comes with the model.
    """
    try:
        if (path / "tokenizer.json").exists():
            return _open_plain(path, defaults or {})
        if path.is_dir() and not any((path / name).exists() for name in _FILES) and not _names_own_code(path):
            raise CheckpointError(f"cannot load a tokenizer from {path}: it holds none; {_REMEDY}")
        backend = _open_in_transformers(path)
    except CheckpointError:
        raise
    except BaseException as error:  # the libraries raise everything, down to bare Exceptions
        if not is_of_a_library(error):
            raise
        if _names_own_code(path):
            raise _own_code(path) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists():
            raise CheckpointError(
                f"{path} has a tokenizer.model only (SentencePiece or tiktoken), which is not read; put the model's "
                "tokenizer.json beside it, from the same model on the hub or written by transformers' save_pretrained "
                f"({reason})"
            ) from error
        raise CheckpointError(f"cannot load a tokenizer from {path}: {reason}; {_REMEDY}") from error
    if not any((path / name).exists() for name in getattr(type(backend), "vocab_files_names", {}).values()):
        # transformers makes an empty one then.
        raise CheckpointError(f"cannot load a tokenizer from {path}: it has no vocabulary; {_REMEDY}")
    if not backend.is_fast:
        raise CheckpointError(f"{path} has a slow tokenizer only; add the model's tokenizer.json")
    return backend


def is_of_a_library(error: BaseException) -> bool:
    """Whether an error is none of the interpreter's: a panic of tokenizers, which is Rust, is no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _open_in_transformers(path: Path) -> PreTrainedTokenizerBase:
    # Left out, trust_remote_code is a question at the terminal, and "y" there runs Python that came with the model.
    return import_transformers().AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _own_code(path: Path) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer of {path} is a class of the model's own, and Python that comes with a model is not "
        'run; if its tokenizer.json says all, write "tokenizer_class": "PreTrainedTokenizerFast" into '
        "tokenizer_config.json"
    )


def _names_own_code(path: Path) -> bool:
    """Whether a file of the directory maps the tokenizer to code of the directory."""
    for name in ("tokenizer_config.json", "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            mapped = json.loads((path / name).read_text(encoding="utf-8-sig")).get("auto_map")
            if isinstance(mapped, list) or (isinstance(mapped, Mapping) and "AutoTokenizer" in mapped):
                return True
    return False


def _open_plain(path: Path, defaults: Mapping[str, str]) -> PlainBackend:
    """The tokenizer that ``tokenizer.json`` describes.

    Its class in transformers may have other rules; the file is what the model was trained with. The files beside it
    name the special tokens and may add tokens; whether a text begins with BOS, they are not asked, as in transformers.
    """
    from tokenizers import Tokenizer

    options = _read_object(path / "tokenizer_config.json")
    if _names_own_code(path) and options.get("tokenizer_class") not in _CLASSES:
        raise _own_code(path)
    _refuse_pointer(path / "tokenizer.json")
    tokenizer = Tokenizer.from_buffer((path / "tokenizer.json").read_bytes())
    named = {name: token for name, token in defaults.items() if tokenizer.token_to_id(token) is not None} | options
    if "added_tokens_decoder" not in options:  # as in transformers, the older files count only then
        older = _read_object(path / "special_tokens_map.json")
        named |= {name: value for name, value in older.items() if name not in _LISTS or not options.keys() & {*_LISTS}}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(options.get("split_special_tokens", False))
    special = {name: token for name in _SPECIAL_TOKENS if (token := _token_text(named.get(name))) is not None}
    added = options.get("added_tokens_decoder", _older_added_tokens(path, special.values(), tokenizer))
    _add_missing_tokens(tokenizer, added, named)
    return PlainBackend(
        tokenizer,
        chat_template=_chat_template(path, options) or defaults.get("chat_template"),
        **{name: value for name, value in options.items() if name in _KEPT_OPTIONS},
        **special,
    )


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(24) == b"version https://git-lfs.":
            raise CheckpointError(f"{path} is a Git LFS pointer; run `git lfs pull` for the file itself")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    parsed = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(parsed, dict):
        raise ValueError(f"{path.name} holds a JSON {type(parsed).__name__}, not an object")
    return parsed


def _token_text(named: Any) -> str | None:
    """A token as the files write it: its text, or an object with it."""
    text = named.get("content") if isinstance(named, Mapping) else named
    return text if isinstance(text, str) else None


def _older_added_tokens(path: Path, special: Iterable[str], tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The tokens of ``added_tokens.json`` that the tokenizer does not know, by their ids."""
    ids, named = _read_object(path / "added_tokens.json"), set(special)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return {
        str(number): {"content": text, "normalized": text not in named, "special": text in named}
        for text, number in ids.items()
        if text not in known
    }


def _add_missing_tokens(tokenizer: tokenizers.Tokenizer, decoder: Any, named: Mapping[str, Any]) -> None:
    """Adds the tokens that only the files beside ``tokenizer.json`` know, or of which they say something else.

    Args:
        tokenizer: to which they are added.
        decoder: tokens by their ids, in whose order they are added. What it says of a known one counts, too.
        named: the special tokens that the files name or list.
    """
    tokens = [named.get(name) for name in _SPECIAL_TOKENS]
    special = {_token_text(token) for token in tokens}
    decoder = decoder if isinstance(decoder, Mapping) else {}
    by_id = {int(key): token for key, token in decoder.items() if str(key).isdecimal()}
    for _, token in sorted(by_id.items()):
        if isinstance(token, Mapping) and (text := _token_text(token)) is not None:
            is_special = bool(token.get("special", False)) or text in special
            tokenizer.add_tokens([_added_token(token, special=is_special)])  # does nothing for one that is there
    for key in _LISTS:
        more = named.get(key) or []
        tokens += more.values() if isinstance(more, Mapping) else more
    known = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    texts = [(_token_text(token) or "", token) for token in tokens]
    missing = [token for text, token in texts if text and not known.get(text)]
    tokenizer.add_tokens([_added_token(token, special=True) for token in missing])


def _added_token(named: Any, *, special: bool) -> tokenizers.AddedToken:
    """The token of an entry: its text, or an object that also says how it is found in a text."""
    from tokenizers import AddedToken

    said = named if isinstance(named, Mapping) else {}
    flags = {name: bool(said[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in said}
    return AddedToken(_token_text(named), special=special, **flags)


def _chat_template(path: Path, options: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template; several by their names if none of them is the default."""
    if (file := path / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8-sig")
    template = options.get("chat_template")
    if template is None:
        template = _read_object(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        return template.get("default") or {str(name): str(source) for name, source in template.items()}
    return template if isinstance(template, str) else None
