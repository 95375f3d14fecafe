"""The tokenizer that belongs to the files of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qspec_jax.tokenizer.backend import open_directory
from qspec_jax.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: str | os.PathLike[str], *, eos_token_ids: Sequence[int] = ()) -> Tokenizer:
    """Loads the tokenizer of a local model.

    Args:
        path: a Hugging Face directory, or a GGUF file. Of the latter, a ``tokenizer.json`` in the same
            directory is preferred to the vocabulary inside the file.
        eos_token_ids: ending tokens known from elsewhere.

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged.
        UnsupportedModelError: a GGUF file's vocabulary is of a kind that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return Tokenizer(open_directory(path), eos_token_ids=eos_token_ids)
    from qspec_jax.weights.gguf.file import GGUFFile

    file = GGUFFile.open(path)
    ending = (*file.eos_token_ids, *eos_token_ids)
    from qspec_jax.weights.gguf.tokenizer import build_tokenizer, named_tokens

    if (path.parent / "tokenizer.json").exists():
        return Tokenizer(open_directory(path.parent, defaults=named_tokens(file)), eos_token_ids=ending)
    return Tokenizer(build_tokenizer(file), eos_token_ids=ending)
