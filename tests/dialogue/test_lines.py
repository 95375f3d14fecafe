"""Where lines come from: keys of a terminal, lines of a pipe; what is kept of them, and for whom."""

from __future__ import annotations

import io
import os
import signal
import stat
import threading
import time
from types import SimpleNamespace

import pytest
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qspec_jax.device import processes
from qspec_jax.dialogue import history, lines
from qspec_jax.dialogue.lines import EditedLines, PlainLines, lines_of_the_user
from qspec_jax.dialogue.slash import NAMES
from qspec_jax.dialogue.stop_key import CtrlC, StopKey
from qspec_jax.errors import QSpecError, UsageError

ALT_ENTER, UP, END, INTERRUPT, LATER = "\x1b\r", "\x1b[A", "\x04", "\x03", "|"
MOST_S = 60  # for what comes at once, on a machine that is very busy


def typed(keys, kept=None):
    """What is read of some keys, up to the end; Ctrl-C is what had been typed, in a list.

    ``LATER`` waits until the lines before it are read, and the history for the next one. Where that does not come, the
    keys end: nothing is pressed at a moment that nobody knows.
    """
    read, is_over = [], threading.Event()

    def has_read(count):
        history = edited._session.default_buffer._load_history_task
        return len(read) == count and history is not None and history.done()

    with create_pipe_input() as pipe:

        def press():
            parts = keys.split(LATER)
            for number, part in enumerate(parts):
                end, lines = time.monotonic() + MOST_S, "".join(parts[:number]).count("\r")
                while number and not has_read(lines):
                    if is_over.wait(0.005) or time.monotonic() > end:
                        pipe.close()  # which ends what reads
                        return
                pipe.send_text(part)
            pipe.send_text(END)

        edited = EditedLines(kept or InMemoryHistory(), NAMES, input=pipe, output=DummyOutput())
        pressing = threading.Thread(target=press, daemon=True)
        pressing.start()
        try:
            while len(read) < 9:
                try:
                    line = edited.read()
                except CtrlC as pressed:
                    line = list(pressed.args)
                if line is None:
                    return read
                edited._session.default_buffer.reset()  # forgets the history, which the next line reads again
                read.append(line)
        finally:
            is_over.set()
            pressing.join(MOST_S)
    raise AssertionError(read)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("hello\rwhy?\r", ["hello", "why?"]),
        (f"a{ALT_ENTER}b\r", ["a\nb"]),
        ("a\nb\r", ["a", "b"]),  # typed before anybody read
        ("a\\\rb\r", ["a\nb"]),
        ("\x1b[200~a\nb\x1b[201~\r", ["a\nb"]),  # pasted
        ("\r  \rhé\r", ["hé"]),
        (f"a\rb\r{LATER}{UP}{UP}\r", ["a", "b", "a"]),
        (f"{INTERRUPT}half{INTERRUPT}a\r", [[""], ["half"], "a"]),
        ("/sta\t\r", ["/stats"]),
        ("", []),
    ],
)
def test_keys_of_a_terminal(keys, expected):
    assert typed(keys) == expected


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/qspec-jax"


def test_what_was_typed_is_kept_for_its_user_alone(home):
    home.mkdir(parents=True)
    (home / "chat-history").touch(0o644)
    os.chmod(home / "chat-history", 0o644)
    typed("first\rtwo\\\rlines\r", history.open_history(is_kept=True))
    assert stat.S_IMODE((home / "chat-history").stat().st_mode) == 0o600
    assert typed(f"{LATER}{UP}\r", history.open_history(is_kept=True)) == ["two\nlines"]


def test_nothing_is_kept_where_that_is_asked_or_cannot_be(home, capsys):
    typed("a\r", history.open_history(is_kept=False))
    assert not home.exists()
    home.parent.write_text("no folder")
    assert typed(f"a\r{LATER}{UP}\r", history.open_history(is_kept=True)) == ["a", "a"]
    assert "not kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "expected"),
    [("a\rb\r", ["a", "b"]), (f"{LATER}a\rb\r{LATER}{UP}{UP}\r", ["a", "b", "a"])],
    ids=["before", "after"],
)
def test_a_history_that_cannot_be_read_is_said_once(home, capsys, keys, expected):
    """Typed before it is read, and after."""
    kept = history.open_history(is_kept=True)
    (home / "chat-history").unlink()
    (home / "chat-history").mkdir()
    assert typed(keys, kept) == expected
    out, err = capsys.readouterr()
    assert (out, err.count("not kept"), err.count("\n")) == ("", 1, 1)


def test_an_error_of_the_event_loop_asks_for_no_key(home, capsys, monkeypatch, caplog):
    """prompt_toolkit would ask for Enter, for ever where the standard input is no terminal."""

    def fails(self):
        raise RuntimeError("a history that fails")

    monkeypatch.setattr(InMemoryHistory, "load_history_strings", fails)
    assert typed(f"{LATER}a\r{LATER}") == ["a"]
    assert capsys.readouterr().out == ""
    assert "a history that fails" in caplog.text


def piped(monkeypatch, data, *, asks=False):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    plain, read = PlainLines(asks=asks), []
    while len(read) < 9:
        try:
            if (line := plain.read()) is None:
                return read
            read.append(line)
        except UsageError as error:
            read.append(error)
    raise AssertionError(read)


def test_a_pipe_has_a_message_on_each_line(monkeypatch, capsys):
    data = "\ufeffone\r\n\n  \ntwo\\\nhé".encode()
    assert piped(monkeypatch, data) == ["one", "two\\", "hé"]
    assert capsys.readouterr().err == ""
    assert piped(monkeypatch, data, asks=True) == ["one", "two\nhé"]
    assert capsys.readouterr().err == "> > > > . \n> \n"
    first, error, last = piped(monkeypatch, b"a\n\xff\nb\n")
    assert (first, last) == ("a", "b")
    assert "line 2 of the standard input is not UTF-8" in str(error)


def test_without_a_terminal_or_the_package_lines_are_plain(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert isinstance(lines_of_the_user(keeps_history=True, commands=NAMES), PlainLines)
    monkeypatch.setattr(lines, "is_terminal", lambda stream: True)
    monkeypatch.setitem(__import__("sys").modules, "prompt_toolkit", None)
    assert isinstance(lines_of_the_user(keeps_history=True, commands=NAMES), PlainLines)
    assert "pip install 'qspec-jax[chat]'" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(QSpecError, match="no standard input"):
        lines_of_the_user(keeps_history=True, commands=NAMES)


def test_ctrl_c_stops_first_and_is_raised_then_and_is_nothing_in_between():
    key, earlier, stopped = StopKey(), signal.getsignal(signal.SIGINT), []
    with key.taken():
        with key.stops(lambda: stopped.append(1)):
            signal.raise_signal(signal.SIGINT)
            assert stopped == [1]
            with pytest.raises(CtrlC):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(CtrlC), key.stops():
            signal.raise_signal(signal.SIGINT)
    assert stopped == [1]
    assert signal.getsignal(signal.SIGINT) is earlier


def test_a_process_that_is_ended_at_once_leaves_a_terminal_that_shows_what_is_typed():
    """As one of several is whose other one has gone, while it reads a line."""
    termios = pytest.importorskip("termios")
    master, terminal = os.openpty()

    def shows():
        return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)

    try:
        with lines._without_echo(SimpleNamespace(fileno=lambda: terminal)):
            assert not shows()
            (restore,) = processes.before_the_end
            restore()
            assert shows()
        assert (shows(), processes.before_the_end) == (True, [])
    finally:
        os.close(master)
        os.close(terminal)
