"""Whether a model at a path is still the one that was there: a digest of samples, as all of it takes long to read.

What was trained or rounded anew has other bytes nearly everywhere. A file that was copied or touched is the same.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from qspec_jax.errors import CheckpointError
from qspec_jax.weights.gguf.parts import parts_of
from qspec_jax.weights.listing import safetensors_files

_SAMPLES, _SAMPLE_BYTES = 256, 64  # of each file of weights: any linear of a shard of 5 GB has one
_WHOLE = (  # files that decide what weights and prompts mean
    *("config.json", "generation_config.json", "quantize_config.json", "quant_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
)


def contents_digest(path: Path) -> str:
    """16 digits that tell a local model from others that may lie at the same path, but for a few bytes.

    Args:
        path: a GGUF file, or a Hugging Face directory.

    Raises:
        CheckpointError: a file cannot be read, or a part is missing.
    """
    folder, weights = (path, safetensors_files(path)) if path.is_dir() else (path.parent, parts_of(path))
    digest = hashlib.sha256()
    for file in [*weights, *(folder / name for name in _WHOLE)]:
        try:
            _take(digest, file, whole=file.name in _WHOLE)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    return digest.hexdigest()[:16]


def _take(digest: Any, file: Path, *, whole: bool) -> None:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(f"{file.name}\0{size}\0".encode(errors="surrogateescape"))
        if whole:
            digest.update(stream.read())
            return
        for place in range(_SAMPLES):
            stream.seek(place * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
