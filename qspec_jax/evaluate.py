"""``python -m qspec_jax.evaluate``: perplexity by precision, and acceptance by draft. Parses and prints only.

Tables or JSON go to the standard output, progress to the standard error stream. Exit codes: 0 success, 1 failure,
2 a usage error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qspec_jax.command import exit_code, keep_compiled_programs, say
from qspec_jax.errors import UsageError
from qspec_jax.generate import read_prompt_file

if TYPE_CHECKING:
    from qspec_jax.evaluation import DraftScore, TextScore

PRECISIONS = ("w4a16", "w4a8", "w4a4")
DRAFTS = ("w4a8", "w4a4")
_Item = TypeVar("_Item")


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.evaluate",
        description="Perplexity of a text at every precision, against the checkpoint in floating point, and the "
        "acceptance of drafts on prompts.",
    )
    add = parser.add_argument
    add("--model", help="as in generate (default: SmolLM2-135M-Instruct)")
    add("--text", type=Path, metavar="FILE", help="a text to score; give this, --prompt-file or both")
    add("--prompt-file", type=Path, metavar="FILE", help='a prompt per line, or JSONL with {"prompt": TEXT}')
    add("--precisions", default=",".join(PRECISIONS), metavar="P,...", help="default: %(default)s")
    add("--max-tokens", type=int, default=20000, metavar="N", help="of the text (default: 20000)")
    add("--context", type=int, default=512, metavar="N", help="tokens per window of the text (default: 512)")
    add("--drafts", default=",".join(DRAFTS), metavar="P,...", help="default: %(default)s")
    add("--draft-lengths", default="1-7", metavar="N-M", help="default: 1-7; also 3 or 1,3,5")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="per prompt (default: 64)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts that run together (default: 8)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, bfloat16 elsewhere")
    add("--group-size", choices=("32", "64", "128", "row"), help="as in generate")
    add("--kernels", choices=("auto", "reference", "triton", "mosaic"), default="auto", help="default: auto")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--plot", type=Path, metavar="FILE.png", help="draw acceptance by position; needs matplotlib")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> None:
    """Checks the arguments, loads the models and scores them."""
    precisions = _names(arguments.precisions, PRECISIONS, "--precisions")
    drafts = _names(arguments.drafts, DRAFTS, "--drafts")
    lengths = draft_lengths(arguments.draft_lengths)
    text = _read_text(arguments.text)
    prompts = [] if arguments.prompt_file is None else read_prompt_file(arguments.prompt_file)
    if text is None and not prompts:
        raise UsageError("there is nothing to evaluate; give --text FILE, --prompt-file FILE or both")
    for option in ("max_tokens", "context", "max_new_tokens", "batch_size"):
        if getattr(arguments, option) < 1:
            raise UsageError(f"--{option.replace('_', '-')} {getattr(arguments, option)} must be at least 1")
    if arguments.plot is not None:
        _require_matplotlib()
    text_scores, draft_scores = _scores(arguments, precisions, drafts, lengths, text, prompts)
    if arguments.json:
        scores = {"text": text_scores, "drafts": draft_scores}
        print(json.dumps({name: [dataclasses.asdict(s) for s in rows] for name, rows in scores.items()}, indent=1))
    else:
        print("\n\n".join(table for table in (text_table(text_scores), draft_table(draft_scores)) if table))
    if arguments.plot is not None:
        _plot(draft_scores, arguments.plot)


def _scores(
    arguments: argparse.Namespace,
    precisions: list[str],
    drafts: list[str],
    lengths: list[int],
    text: str | None,
    prompts: list[str],
) -> tuple[list[TextScore], list[DraftScore]]:
    say("starting ...")
    keep_compiled_programs()
    import qspec_jax
    from qspec_jax.evaluation import score_drafts, score_text

    def load(quantization: Any) -> Any:
        return qspec_jax.load(
            arguments.model,
            quantization=quantization,
            dtype=arguments.dtype,
            kernels=arguments.kernels,
            progress=sys.stderr.isatty(),
        )

    quantization: Any = "auto"
    if arguments.group_size is not None:
        group_size = None if arguments.group_size == "row" else int(arguments.group_size)
        quantization = qspec_jax.QuantConfig(group_size=group_size)
    model = load(quantization)
    text_scores, draft_scores = [], []
    if text is not None:
        token_ids = model.tokenizer.encode(text)[: arguments.max_tokens]
        text_scores = score_text(
            model,
            token_ids,
            precisions=[qspec_jax.Precision(name) for name in precisions],
            baseline=load(None),
            context=arguments.context,
            progress=_progress("text"),
        )
    if prompts:
        draft_scores = score_drafts(
            model,
            prompts,
            drafts=drafts,
            draft_lengths=lengths,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            progress=_progress("drafts"),
        )
    return text_scores, draft_scores


def text_table(scores: Sequence[TextScore]) -> str:
    """One line per precision; empty without scores."""
    if not scores:
        return ""
    lines = [f"{'text':10}{'tokens':>8}{'perplexity':>12}{'agreement':>11}{'KL, nats':>10}"]
    for score in scores:
        compared = f"{'-':>11}{'-':>10}"
        if score.agreement is not None and score.kl is not None:
            divergence = round(score.kl, 5) + 0.0  # no minus before a zero
            compared = f"{score.agreement:>11.4f}{divergence:>10.5f}"
        lines.append(f"{score.name:10}{score.num_tokens:>8}{score.perplexity:>12.3f}{compared}")
    return "\n".join(lines)


def draft_table(scores: Sequence[DraftScore]) -> str:
    """One line per draft precision and length; empty without scores."""
    if not scores:
        return ""
    lines = [f"{'draft':7}{'length':>7}{'accepted':>10}{'tokens/cycle':>14}{'identical':>11}  accepted by position"]
    for score in scores:
        by_position = " ".join(f"{share:.2f}" for share in score.acceptance_by_position)
        identical = f"{score.identical}/{score.num_prompts}"
        lines.append(
            f"{score.draft:7}{score.draft_length:>7}{score.acceptance_rate:>10.3f}{score.tokens_per_cycle:>14.2f}"
            f"{identical:>11}  {by_position}"
        )
    return "\n".join(lines)


def draft_lengths(text: str) -> list[int]:
    """``"1-7"``, ``"3"`` and ``"1,3,5"`` as numbers.

    Raises:
        UsageError: it is none of these, or a length is not between 1 and 16.
    """
    lengths: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UsageError(f"--draft-lengths {text!r} is not like 1-7, 3 or 1,3,5")
        lengths += range(int(first), int(last or first) + 1)
    if not lengths or min(lengths) < 1 or max(lengths) > 16:
        raise UsageError(f"--draft-lengths {text!r}: lengths must be between 1 and 16")
    return lengths


def _names(text: str, known: Sequence[str], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{option}: {', '.join(unknown)} is unknown; use {', '.join(known)}")
    return names


def _read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --text {path}: {error}") from error
    if not text.strip():
        raise UsageError(f"--text {path} is empty")
    return text


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install it with `pip install matplotlib`, or leave --plot out")


def _plot(scores: Sequence[DraftScore], path: Path) -> None:
    """Acceptance by position, one line per draft precision and length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for score in scores:
        positions = range(1, score.draft_length + 1)
        label = f"{score.draft}, drafts of {score.draft_length}"
        axes.plot(positions, score.acceptance_by_position, marker="o", label=label)
    axes.set(xlabel="place in the draft", ylabel="share of cycles in which it is accepted", ylim=(0, 1))
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path)


def _progress(description: str) -> Any:
    if not sys.stderr.isatty():
        return iter

    def wrap(items: Iterable[_Item]) -> Iterable[_Item]:
        from tqdm import tqdm

        return tqdm(items, desc=description, file=sys.stderr, leave=False)

    return wrap


if __name__ == "__main__":
    sys.exit(main())
