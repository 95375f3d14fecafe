"""What tokenises inside a ``Tokenizer``: transformers, or the library below it alone.

Importing transformers opens thousands of files, seconds on a slow disk. What it adds to a tokenizer that
``tokenizers`` describes completely is little: the names of the special tokens, and chat templates.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What transformers writes for a tokenizer that is no more than its `tokenizer.json`.
_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_OPTIONS_WITHOUT_EFFECT = {  # on what a `Tokenizer` does
    "backend",
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "model_input_names",
    "model_max_length",
    "tokenizer_class",
}


class PlainBackend:
    """The methods of transformers' ``PreTrainedTokenizerFast`` that a ``Tokenizer`` uses, with the same results.

    What is out of the ordinary, and writing the files, is left to one of those, made when it is needed.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, chat_template: str | None = None, **options: Any) -> None:
        """Completes a tokenizer with what its library has no place for; arguments as of ``PreTrainedTokenizerFast``.

        Args:
            tokenizer: without truncation and padding. Special tokens that it does not keep whole are added to it.
            chat_template: Jinja source.
            options: ``bos_token``, ``eos_token`` and so on, None for those that are missing, and what is only
                written with the files.
        """
        from tokenizers import AddedToken

        self.chat_template, self.backend_tokenizer = chat_template, tokenizer
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
        self, conversation: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tokenize: bool, **options: Any
    ) -> Any:
        from qspec_jax.tokenizer.chat_template import is_plain, render

        if self.chat_template is None or not add_generation_prompt or not is_plain(conversation):
            options |= {"add_generation_prompt": add_generation_prompt, "tokenize": tokenize}
            return self._in_transformers.apply_chat_template(conversation, **options)
        text = render(self.chat_template, conversation, self._special_tokens)
        return self.encode(text, add_special_tokens=False) if tokenize else text

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
    import transformers

    return transformers


def open_directory(path: Path) -> PlainBackend | PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory.

    Raises:
        CheckpointError: there is none, it is damaged, or it is Python that comes with the model.
    """
    try:
        backend = _open_plain(path) or _open_in_transformers(path)
    except Exception as error:  # the libraries raise everything, down to bare Exceptions
        if _names_own_code(path):
            raise CheckpointError(
                f"the tokenizer of {path} is a class of the model's own, and Python that comes with a model is not "
                'run; if its tokenizer.json says all, write "tokenizer_class": "PreTrainedTokenizerFast" into '
                "tokenizer_config.json"
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"cannot load a tokenizer from {path}: {reason[0]}; the directory needs the model's tokenizer.json and "
            "tokenizer_config.json"
        ) from error
    if not isinstance(backend, PlainBackend) and not backend.is_fast:
        raise CheckpointError(f"{path} has a slow tokenizer only; add the model's tokenizer.json")
    return backend


def _open_in_transformers(path: Path) -> PreTrainedTokenizerFast:
    # Left out, trust_remote_code is a question at the terminal, and "y" there runs Python that came with the model.
    return import_transformers().AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _names_own_code(path: Path) -> bool:
    """Whether a file of the directory maps a class of transformers to code of the directory."""
    for name in ("tokenizer_config.json", "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads((path / name).read_text(encoding="utf-8")).get("auto_map"):
                return True
    return False


def _open_plain(path: Path) -> PlainBackend | None:
    """The tokenizer of a directory if it is no more than its ``tokenizer.json``, as in a checkpoint; None otherwise.

    Beside a model's ``config.json``, or with other options, transformers may choose other rules.
    """
    if not {"tokenizer.json", "tokenizer_config.json"} <= (names := set(os.listdir(path))) <= _FILES:
        return None
    options = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    if options.pop("chat_template", None) is not None:
        return None  # written otherwise than today
    special_tokens = [options.get(name) for name in _SPECIAL_TOKENS if options.get(name) is not None]
    known = options.keys() <= {*_OPTIONS_WITHOUT_EFFECT, *_SPECIAL_TOKENS}
    if not known or options.get("tokenizer_class") not in _CLASSES or set(map(type, special_tokens)) - {str}:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    if tokenizer.truncation or tokenizer.padding or not special.issuperset(special_tokens):
        return None
    template = path / "chat_template.jinja"
    chat_template = template.read_text(encoding="utf-8") if template.name in names else None
    del options["tokenizer_class"]
    return PlainBackend(tokenizer, chat_template=chat_template, **options)
