"""The command: at a terminal of its own with a session that has no model, and with a tiny model through a pipe."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qspec_jax
from qspec_jax import chat
from qspec_jax.dialogue.conversation import Conversation
from qspec_jax.dialogue.lines import PlainLines
from qspec_jax.errors import OutOfMemoryError, OutputError
from tests.dialogue.stub import Session
from tests.weights import tiny_checkpoints

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w1', 'user': 'w2', 'assistant': 'w3'}[m.role] }} {{ m.content }} w4 "
    "{% endfor %}{% if add_generation_prompt %}w3{% endif %}"
)


def lines_of(monkeypatch, *given):
    data = "".join(f"{line}\n" for line in given).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model with 48 words, and a template of words."""
    config = tiny_checkpoints.hf_config(eos_token_id=47, num_hidden_layers=1)
    path = tmp_path_factory.mktemp("chat") / "model"
    tensors = {name: one for name, one in tiny_checkpoints.hf_tensors(config).items() if "layers.1." not in name}
    tiny_checkpoints.write_hf(path, config, tensors)
    words = Words(models.WordLevel({f"w{index}": index for index in range(48)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w47", chat_template=TEMPLATE)
    made.save_pretrained(path)
    return path


OPTIONS = ["--mode", "w4a16", "--max-new-tokens", "8", "--max-seq-len", "64"]


def test_a_context_that_a_greeting_does_not_fit_into_may_fit_what_is_typed(path, monkeypatch, capsys):
    """What compiles ahead takes seven tokens for granted."""
    lines_of(monkeypatch, "w5")
    small = ["--mode", "w4a16", "--max-new-tokens", "1", "--max-seq-len", "6"]
    assert chat.main(["--model", str(path), *small]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("w")
    assert "error" not in err


def test_turns_read_what_is_new_and_are_those_of_the_whole_conversation(path, monkeypatch, capsys):
    """Also a token for token comparison with the same messages in a run of their own."""
    asked, lines = [], ["w5 w6", "/stats", "w7", "/stats", "w8 w9", "/stats", "/statz"]
    original = qspec_jax.load
    monkeypatch.setattr(qspec_jax, "load", lambda *given, **more: asked.append(original(*given, **more)) or asked[0])
    lines_of(monkeypatch, *lines)
    assert chat.main(["--model", str(path), *OPTIONS, "--system", "w10"]) == 1
    out, err = capsys.readouterr()
    assert "there is no command /statz" in err
    assert "compiling" not in err.split("compiling", 1)[1]  # once, beside the weights
    read = [line.split("prompt")[1].split(";")[0].strip() for line in out.splitlines() if "its prompt" in line]
    # After the first turn: the last token of the answer, its end, the message with its marks, and whose turn it is.
    assert [one.split(", ") for one in read] == [
        ["8 of 8 tokens read", "0 reused from the cache"],
        ["6 of 21 tokens read", "15 reused from the cache"],
        ["7 of 35 tokens read", "28 reused from the cache"],
    ]
    answers = [line for line in out.splitlines() if line.startswith("w")]
    messages = [{"role": "system", "content": "w10"}]
    for question, answer in zip(["w5 w6", "w7", "w8 w9"], answers, strict=True):
        messages.append({"role": "user", "content": question})
        alone = asked[0].session(asked[0].plan("w4a16"), max_seq_len=64)
        assert alone.generate(messages, max_new_tokens=8).text == answer
        messages.append({"role": "assistant", "content": answer})


def test_what_the_model_cannot_do_is_said_before_its_weights_are_read(path, monkeypatch, capsys):
    monkeypatch.setattr(qspec_jax, "load", None)
    lines_of(monkeypatch, "w5")
    assert chat.main(["--model", str(path), "--max-seq-len", "4096"]) == 2
    assert "context of 256" in capsys.readouterr().err
    assert chat.main(["--model", str(path), "--group-size", "64", "--mode", "float", "--max-seq-len", "0"]) == 2
    monkeypatch.setattr("qspec_jax.tokenizer.tokenizer.Tokenizer.has_chat_template", False)
    assert chat.main(["--model", str(path)]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_drafts_that_gain_by_their_head_alone_are_not_refused(path, monkeypatch, capsys):
    def load(model, **given):
        raise OutOfMemoryError(f"asked for a head of {given['draft_head']} bits")

    monkeypatch.setattr(qspec_jax, "load", load)
    lines_of(monkeypatch, "w5")
    options = ["--model", str(path), "--draft", "w4a16", "--draft-context", "full"]
    assert chat.main([*options, "--draft-head", "4"]) == 1
    assert "asked for a head of 4 bits" in capsys.readouterr().err
    assert chat.main(options) == 2
    assert "costs a plain step" in capsys.readouterr().err


def test_an_answer_gives_no_orders_to_a_terminal(monkeypatch, capsys):
    lines_of(monkeypatch, "a\x1b[2Jb\x9b")
    conversation = Conversation(Session())
    monkeypatch.setattr(chat, "is_terminal", lambda stream: True)
    assert chat.converse(conversation, PlainLines(asks=False), is_watched=False) == 0
    assert capsys.readouterr().out == "you said a␛[2Jb\ufffd\n"
    assert "\x1b" in conversation.messages[-1]["content"]


SCRIPT = """
import sys
from qspec_jax import chat
from qspec_jax.commands.run import guarded, leave
from qspec_jax.dialogue.conversation import Conversation
from qspec_jax.dialogue.lines import lines_of_the_user
from qspec_jax.dialogue.slash import NAMES
from tests.dialogue.stub import Session
lines = lines_of_the_user(keeps_history=False, commands=NAMES)
talk = Conversation(Session(1000, holds="story"))
with lines.while_others_write():
    code = guarded(lambda: chat.converse(talk, lines, is_watched=True))
leave(code)
"""


def test_answers_that_nobody_can_see_are_not_computed(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    lines_of(monkeypatch, "a", "b", "c")
    monkeypatch.setattr("sys.stdout", Full())
    conversation = Conversation(Session())
    with pytest.raises(OutputError, match="No space left"):
        chat.converse(conversation, PlainLines(asks=False), is_watched=False)
    assert len(conversation.session.asked) == 1


READS = "\x1b[?2004h"  # with which prompt_toolkit begins to read a line


class Terminal:
    """A terminal with a conversation in it."""

    def __init__(self):
        self._number, end = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONPATH": str(ROOT)}
        options = {"stdin": end, "stdout": end, "stderr": end, "cwd": ROOT, "env": environment}
        self.process = subprocess.Popen([sys.executable, "-c", SCRIPT], start_new_session=True, **options)
        self.seen = ""
        os.close(end)

    def wait_for(self, text, seconds=120):
        """Reads until a text is there, after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self._number], [], [], 1)[0]:
                self.seen += os.read(self._number, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def press(self, keys):
        os.write(self._number, keys.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._number)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.close()


def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal):
    terminal.wait_for("/help lists commands")
    terminal.press("tell me a long story\r")
    terminal.wait_for("you said")
    os.kill(terminal.process.pid, signal.SIGINT)  # as the terminal does, of which this process is no leader
    terminal.press("typed ahead\r")
    assert "story" not in terminal.wait_for("stopped; what was said stays")
    terminal.wait_for("you said typed ahead")
    terminal.wait_for(READS)
    terminal.press("\x03")
    terminal.wait_for("Ctrl-D or /exit leaves")
    terminal.press("/stats\r")
    terminal.wait_for("reused from the cache")
    terminal.press("\x04")
    assert terminal.process.wait(timeout=120) == 0
