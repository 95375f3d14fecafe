"""Quantised models on disk: written once, opened without quantising again.

A checkpoint is a directory::

    qspec.json            what it is: format version, config, formats, recipe, hashes (``manifest.py``)
    data-<id>/arrays/     one Orbax checkpoint per layer, and one for what is no layer (``arrays.py``)
    data-<id>/tokenizer/  the tokenizer's own files

``qspec.json`` names the data directory that counts and is replaced in one step, so that a reader finds the
old checkpoint or the new one and never a mixture (``save.py``). It is checked as it is read (``restore.py``).
"""

from qspec_jax.checkpoint.manifest import FORMAT_VERSION, Manifest, is_checkpoint
from qspec_jax.checkpoint.restore import Checkpoint, open_checkpoint, restore_decoder
from qspec_jax.checkpoint.save import check_destination, save_checkpoint
from qspec_jax.checkpoint.source import SavedSource, open_saved_source
from qspec_jax.model.decoder import abstract_decoder, num_bytes

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "Manifest",
    "SavedSource",
    "abstract_decoder",
    "check_destination",
    "is_checkpoint",
    "num_bytes",
    "open_checkpoint",
    "open_saved_source",
    "restore_decoder",
    "save_checkpoint",
]
