"""``python -m qspec_jax.chat``: a conversation at the terminal. Parses, loads and shows only.

Answers, and what commands of the conversation ask for, go to the standard output, everything else to the standard error
stream. Without a terminal each line of the standard input is a message. Exit codes: 0 success, 1 failure (of one
message of several, too), 2 a usage error, 130 interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qspec_jax.commands import options
from qspec_jax.commands.output import is_terminal, require_standard_output, say, show
from qspec_jax.commands.processes import add_processes, run_together
from qspec_jax.commands.run import event_teller, exit_code, leave, load_and_compile
from qspec_jax.decoding.plan import AUTO, LOOKUP_MODES, MODES, plan_of
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.errors import DeviceError, OutputError, QSpecError, UsageError
from qspec_jax.model.config import held_weights
from qspec_jax.weights.resolve import check_model_name, resolve_model

if TYPE_CHECKING:
    from qspec_jax.dialogue.conversation import Conversation
    from qspec_jax.dialogue.lines import Lines
    from qspec_jax.engine.language_model import LanguageModel
    from qspec_jax.engine.load import OpenedModel
    from qspec_jax.engine.session import Session

# Characters that a terminal takes as orders, such as the escape, and pictures of them.
_SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_SHOWN |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m qspec_jax.chat",
        description="Talk to a model. Lines that begin with a slash are commands: /help lists them.",
    )
    add = parser.add_argument
    options.add_model(parser)
    add("--system", metavar="TEXT", help="system prompt (default: none, or that of the chat template)")
    add("--mode", choices=(*MODES, *LOOKUP_MODES, AUTO), default=AUTO, help="auto: the fastest (default: auto)")
    options.add_draft(parser)
    options.add_draft_length(parser)
    options.add_draft_context(parser)
    options.add_verify(parser)
    add("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    context = "tokens of a conversation (default: the model's context, up to 4096)"
    add("--max-seq-len", type=int, metavar="N", help=context)
    options.add_dtype(parser)
    group = "inputs per weight scale where the checkpoint is not 4-bit already (default: 32)"
    options.add_group_size(parser, group)
    options.add_kernels(parser)
    options.add_kv(parser)
    options.add_mesh(parser)
    add("--no-history", action="store_true", help="keep nothing of what is typed for the next time")
    sampling = options.add_sampling(parser)
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
    add_processes(parser)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(run, build_parser(), argv)


def run(arguments: argparse.Namespace) -> int:
    """Checks the arguments, loads the model and talks; the exit code."""
    return run_together("chat", _run, arguments, check=_check_options)


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses what makes no sense for any model, before one is opened."""
    options.check_positive(arguments, "max_new_tokens", "max_seq_len")
    options.check_draft_length(arguments.draft_length)
    options.check_weights(arguments)
    options.check_drafts(arguments, [arguments.draft], [arguments.draft_context], [arguments.mode])
    SamplingParams.of(_sampling(arguments))


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {**options.sampling_of(arguments), "stop": arguments.stop}


def _run(arguments: argparse.Namespace) -> int:
    require_standard_output("a conversation needs one")
    check_model_name(arguments.model)
    for said in options.without_effect(arguments):
        say(said)
    from qspec_jax.dialogue.lines import lines_of_the_user
    from qspec_jax.dialogue.slash import NAMES

    lines = lines_of_the_user(keeps_history=not arguments.no_history, commands=NAMES)
    with lines.while_others_write():
        return converse(_begin(arguments, _sampling(arguments)), lines, is_watched=is_terminal(sys.stdin))


def converse(conversation: Conversation, lines: Lines, *, is_watched: bool) -> int:
    """Answers one line after the other; the exit code.

    Args:
        conversation: to go on with.
        lines: of the user.
        is_watched: by somebody who types them, and whom Ctrl-C and errors do not throw out.
    """
    from qspec_jax.dialogue.slash import SlashCommands
    from qspec_jax.dialogue.stop_key import CtrlC, StopKey

    commands, key, code = SlashCommands(conversation), StopKey(), 0
    if is_watched:
        say("/help lists commands, Ctrl-D leaves")
    with key.taken() if is_watched else contextlib.nullcontext():
        while True:
            try:
                with key.stops():
                    line = lines.read()
                if line is None:
                    return code
                outcome = commands.do(line)
                for one in outcome.lines:
                    show(_safe(one))
                if outcome.leaves:
                    return code
                if outcome.answer is not None:
                    with key.stops(conversation.session.stop):
                        _show_answer(outcome.answer, conversation)
            except CtrlC as pressed:
                if not any(pressed.args):
                    say("Ctrl-D or /exit leaves")
            except (OutputError, DeviceError):  # nobody would see the answers to come, or none can come
                raise
            except QSpecError as error:
                say(f"error: {error}")
                code = 0 if is_watched else 1


def _show_answer(answer: Iterable[str], conversation: Conversation) -> None:
    """Shows an answer as it comes, and says what is to be known of it."""
    from qspec_jax.dialogue.stop_key import CtrlC

    before, is_stopped, said = conversation.last, False, ""
    try:
        for said in answer:
            show(_safe(said), end="")
    except CtrlC:
        is_stopped = True
    finally:
        show()
    last = conversation.last
    if is_stopped or (last is not None and last is not before and last.finish_reason == "interrupted"):
        say("stopped; what was said stays" if said else "stopped; the message is taken back")
    if warning := conversation.warning():
        say(warning)


def _safe(text: str) -> str:
    """A text that orders nothing of a terminal, if there is one."""
    return text.translate(_SHOWN) if is_terminal(sys.stdout) else text


def _begin(arguments: argparse.Namespace, sampling: dict[str, Any]) -> Conversation:
    """A conversation with a model that is loaded for it."""
    from qspec_jax.dialogue.conversation import Conversation

    model, session = _load(arguments, sampling)
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "sampling": sampling}
    return Conversation(session, system=arguments.system, context=model.config.max_position_embeddings, **settings)


def _load(arguments: argparse.Namespace, sampling: dict[str, Any]) -> tuple[LanguageModel, Session]:
    """The model, and a session with the programs that a first message needs."""
    say("starting ...")
    import qspec_jax
    from qspec_jax.device.start import start_device
    from qspec_jax.engine.load import open_model

    start_device()
    weights = options.weights_of(arguments)
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    example = [*system, {"role": "user", "content": "Hello! How are you?"}]
    given = weights.pop("draft_model", None)
    draft_path = None if given is None else resolve_model(given, what="draft_model")
    _check(arguments, open_model(resolve_model(arguments.model), **weights, draft_path=draft_path), example)

    tell = event_teller()

    def session_of(model: LanguageModel) -> Session:
        plan = model.plan(arguments.mode, **options.plan_options(arguments))
        return model.session(plan, max_seq_len=arguments.max_seq_len, on_event=tell)

    def compile_ahead(model: LanguageModel) -> None:
        session = session_of(model)
        room = session.max_seq_len - session.num_tokens(example)
        with contextlib.suppress(UsageError):  # which what is typed may not be too long for
            session.compile(example, max_new_tokens=min(arguments.max_new_tokens, room), sampling=sampling)

    model = load_and_compile(qspec_jax.load, arguments, compile_ahead)
    return model, session_of(model)


def _check(arguments: argparse.Namespace, opened: OpenedModel, example: list[dict[str, str]]) -> None:
    """Refuses what this model cannot do, before its weights are read."""
    from qspec_jax.engine.intake import check_length

    head = None if opened.quantization is None else opened.quantization.draft_head
    held = held_weights(opened.quantization)
    plan_of(arguments.mode, **options.plan_options(arguments), held=held, draft_head=head)
    check_length(1, 0, max_seq_len=arguments.max_seq_len, context=opened.config.max_position_embeddings)
    tokenizer = opened.tokenizer()
    if tokenizer is None or not tokenizer.has_chat_template:
        without = f"{opened.name} has no chat template, so nobody can talk to it"
        raise UsageError(f"{without}; python -m qspec_jax.generate goes on with texts")
    tokenizer.apply_chat(example)  # which may refuse a system prompt


if __name__ == "__main__":
    leave(main(), at_once=True)
