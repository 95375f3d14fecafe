"""Quantised models on disk: written once, opened without quantising again.

A checkpoint is a directory::

    qspec.json            what it is: format version, config, formats, recipe, hashes (``manifest.py``)
    data-<id>/arrays/     one Orbax checkpoint per layer, its floats apart, and one for what is no layer (``arrays.py``)
    data-<id>/tokenizer/  the tokenizer's own files

``qspec.json`` names the data directory that counts and is replaced in one step, so that a reader finds the
old checkpoint or the new one and never a mixture (``save.py``). It is checked as it is read (``restore.py``).
"""
