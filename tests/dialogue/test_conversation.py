"""A conversation and its commands, without a model and without a terminal."""

from __future__ import annotations

import json

import pytest

from qspec_jax.dialogue.conversation import Conversation
from qspec_jax.dialogue.files import read_conversation
from qspec_jax.dialogue.slash import HELP, SlashCommands
from qspec_jax.errors import QSpecError, UsageError
from tests.dialogue.stub import Session


def message(role, content):
    return {"role": role, "content": content}


def talked(*lines, session=None, **options):
    """A conversation after some lines, and its commands."""
    conversation = Conversation(session or Session(), sampling={"seed": 5}, **options)
    commands = SlashCommands(conversation)
    for line in lines:
        list(commands.do(line).answer or ())
    return conversation, commands


def contents(conversation):
    return [one["content"] for one in conversation.messages]


def test_a_turn_has_all_that_was_said_before_it():
    conversation, _ = talked("hello", "why?", system="Be brief.")
    assert contents(conversation) == ["Be brief.", "hello", "you said hello", "why?", "you said why?"]
    assert conversation.session.asked[-1] == (conversation.messages[:-1], 6, 164)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a", "b", "/undo"], ["a", "you said a"]),
        (["a", "/undo"], []),
        (["a", "/retry"], ["a", "you said a"]),
        (["a", "/system Be brief."], ["Be brief.", "a", "you said a"]),
        (["a", "/system Be brief.", "/system -"], ["a", "you said a"]),
        (["/system Be brief.", "a", "/reset"], ["Be brief."]),
        (["//etc is a folder"], ["/etc is a folder", "you said /etc is a folder"]),
        (["a\n/reset"], ["a\n/reset", "you said a\n/reset"]),
        (["/SYSTEM\ttwo\nlines"], ["two\nlines"]),
    ],
)
def test_what_commands_do_to_the_messages(lines, expected):
    conversation, _ = talked(*lines)
    assert contents(conversation) == expected
    assert conversation.session.resets == lines.count("/reset")


def test_another_answer_has_another_seed():
    conversation, _ = talked("a", "/retry", "/retry")
    assert [seed for _, seed, _ in conversation.session.asked] == [5, 6, 7]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/statz", "did you mean /stats"),
        ("/etc/hosts", "there is no command /etc/hosts; /help lists them, and // sends"),
        ("/", "there is no command /"),
        ("/reset now", "/reset takes nothing after it; it was given 'now'"),
        ("/undo", "nothing to take back"),
        ("/retry", "nothing to answer again"),
        ("/save", "/save FILE"),
        ("/save x", "nothing to save"),
        ("/load", "/load FILE"),
        ("/load no-such-file", "no-such-file"),
        ("/load .", "cannot read /load ."),
        ("/load -", "is no file"),
        ("long " * 50, "that makes 251 tokens, and the context has 200; shorten it, or: /undo"),
    ],
)
def test_what_makes_no_sense_is_named_and_changes_nothing(line, named):
    conversation, commands = talked()
    with pytest.raises(UsageError) as error:
        commands.do(line)
    assert named in str(error.value)
    assert conversation.messages == []
    assert conversation.session.asked == []


def test_a_template_without_system_prompts_refuses_one_at_once():
    conversation, commands = talked("a", session=Session(has_system=False))
    with pytest.raises(UsageError, match="no system prompt"):
        commands.do("/system Be brief.")
    assert contents(conversation) == ["a", "you said a"]


@pytest.mark.parametrize("taken", [0, 2])
def test_of_a_stopped_answer_stays_what_was_said(taken):
    conversation, commands = talked("a")
    answer = commands.do("bcd").answer
    said = "".join(next(answer) for _ in range(taken))
    conversation.session.stop()
    said += "".join(answer)
    assert contents(conversation) == ["a", "you said a", *(["bcd", "you said"] if taken else [])]
    assert said == ("you said" if taken else "")
    assert conversation.last.finish_reason == "interrupted"
    list(commands.do("go on").answer)
    assert contents(conversation)[-2:] == ["go on", "you said go on"]


@pytest.mark.parametrize(("fails_after", "kept"), [(0, []), (4, ["bcd", "you "])])
def test_a_failing_device_loses_nothing(fails_after, kept):
    conversation, commands = talked("a")
    conversation.session.fails_after = fails_after
    with pytest.raises(QSpecError):
        list(commands.do("bcd").answer)
    assert contents(conversation) == ["a", "you said a", *kept]


def test_what_was_cut_or_is_nearly_full_is_said_with_what_to_do():
    conversation, commands = talked("a", max_new_tokens=5)
    assert conversation.warning() == "the answer was cut at 5 tokens (--max-new-tokens); ask to go on"
    conversation, commands = talked("a", session=Session(80), context=4096)
    assert conversation.warning() is None
    list(commands.do("b" * 25).answer)
    assert "74 of 80 tokens of the context are used; /undo takes" in conversation.warning()
    assert "--max-seq-len up to 4096" in conversation.warning()
    assert "--max-seq-len" not in talked("b" * 30, session=Session(80))[0].warning()
    list(commands.do("c").answer)
    assert "the answer was cut: the context of 80 tokens is full; /undo" in conversation.warning()
    before = conversation.messages
    with pytest.raises(UsageError, match="context has 80; shorten it, or: /undo"):
        commands.do("more")
    assert conversation.messages == before
    commands.do("/undo")
    list(commands.do("d").answer)


def test_figures_are_those_of_the_last_answer_and_of_all():
    _, commands = talked()
    assert commands.do("/stats").lines[0] == "no answer yet"
    list(commands.do("hello").answer)
    said = "\n".join(commands.do("/stats").lines)
    for part in ("7 tokens, 12.0 tokens/s", "3 of 6 tokens read, 3 reused", "44% accepted", "3 of w4a16"):
        assert part in said
    for part in ("21 of 200 tokens used", "7 tokens in 2 answers", "5 tokens read, 0 reused"):
        assert part in said


def test_help_names_every_command():
    _, commands = talked()
    said = "\n".join(commands.do("/help").lines)
    assert all(usage in said for usage in HELP)
    assert {usage.split()[0] for usage in HELP} | {"/quit"} == set(commands._commands)
    assert commands.do("/exit").leaves


def test_a_conversation_that_was_saved_goes_on(tmp_path):
    path = tmp_path / "a file.jsonl"
    conversation, commands = talked("hé\u2028llo", system="Be brief.")
    commands.do(f"/save {path}")
    assert json.loads(path.read_text("utf-8")) == {"messages": conversation.messages}
    commands.do(f"/save {path}")  # its own file
    other, others = talked("x")
    with pytest.raises(UsageError, match="/save -f"):
        others.do(f"/save {path}")
    assert "3 messages" in others.do(f"/load {path}").lines[0]
    assert other.messages == conversation.messages
    assert other.system == "Be brief."
    list(others.do("more").answer)
    others.do(f"/save -f {path}")
    assert read_conversation(path) == other.messages
    with pytest.raises(QSpecError, match="there is no directory"):
        others.do(f"/save {tmp_path}/no/such/file")


@pytest.mark.parametrize("begins_anew", ["/reset", "/load {}/other"])
def test_a_file_is_the_conversations_own_until_another_one_begins(tmp_path, begins_anew):
    (tmp_path / "other").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    _, commands = talked("first")
    commands.do(f"/save {tmp_path}/file")
    before = (tmp_path / "file").read_text()
    commands.do(begins_anew.format(tmp_path))
    list(commands.do("second").answer)
    with pytest.raises(UsageError, match="/save -f"):
        commands.do(f"/save {tmp_path}/file")
    assert (tmp_path / "file").read_text() == before


@pytest.mark.parametrize(
    "text",
    [
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        '[{"role": "user", "content": "a"}]',
        '[\n{"role": "user",\n "content": "a"}]',
        '\ufeff{"role": "user", "content": "a"}\r\n',
        '\n{"role": "user", "content": [{"type": "text", "text": "a"}]}\n\n',
    ],
)
def test_conversations_of_others_are_read(tmp_path, text):
    path = tmp_path / "in"
    path.write_text(text, "utf-8", newline="")
    conversation, commands = talked()
    assert "/retry answers the last one" in commands.do(f"/load {path}").lines[0]
    assert conversation.messages == [message("user", "a")]
    list(commands.do("/retry").answer)
    assert contents(conversation) == ["a", "you said a"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "it is empty"),
        ("hello", "line 1"),
        ("[]", "no list of messages"),
        ("{}", "no list of messages"),
        ("3", "no list of messages"),
        ('{"messages": []}', "no list of messages"),
        ('{"messages": [{"content": "a"}]}', "no list of messages"),
        ('{"messages": [{"role": "user"}]}', "has no content"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n' * 2, "has 2 conversations"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ('{"messages": [{"role": "user", "content": "%s"}]}' % ("a" * 200), "that makes 201 tokens"),
        ("[" * 3000, "holds no conversation"),
        ("\0", "zero bytes"),
    ],
)
def test_what_is_no_conversation_is_refused_and_changes_nothing(tmp_path, text, named):
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    conversation, commands = talked("a")
    with pytest.raises(UsageError, match=named):
        commands.do(f"/load {path}")
    assert contents(conversation) == ["a", "you said a"]
