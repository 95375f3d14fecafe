"""Standard streams that are missing, full, read by nobody, or of an encoding that lacks characters."""

from __future__ import annotations

import argparse
import gc
import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from qspec_jax import generate
from qspec_jax.bench import __main__ as bench
from qspec_jax.commands import output
from qspec_jax.commands.run import exit_code, guarded
from qspec_jax.errors import CheckpointWarning, QSpecError, RequantizationWarning
from qspec_jax.files.lock import locked

ROOT = Path(__file__).parents[2]


class Failing(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (FULL, "error: cannot write the standard output: No space left on device\n"),
        (OSError(5, "Input/output error"), "error: cannot write the standard output: Input/output error\n"),
        (BrokenPipeError(32, "Broken pipe"), ""),
    ],
    ids=repr,
)
def test_what_cannot_be_printed_is_one_line_and_a_reader_who_has_gone_none(capsys, monkeypatch, failure, said):
    monkeypatch.setattr(sys, "stdout", Failing(failure))
    assert guarded(lambda: output.show("text")) == 1
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("length", [10, 100_000])  # more than a buffer holds, too
def test_help_that_cannot_be_printed_is_a_failure(capsys, monkeypatch, length):
    parser = argparse.ArgumentParser(description="x" * length)
    monkeypatch.setattr(sys, "stdout", Failing(FULL))
    assert exit_code(lambda _: 0, parser, ["--help"]) == 1
    assert capsys.readouterr().err == "error: cannot write the standard output: No space left on device\n"


@pytest.mark.parametrize("kind", [CheckpointWarning, RequantizationWarning])
def test_a_warning_of_this_library_is_one_line(kind):
    before, written = warnings.formatwarning, []
    given = [(kind("two heads"), kind, "there.py", 3), (UserWarning("other"), UserWarning, "there.py", 3)]
    assert guarded(lambda: written.extend(warnings.formatwarning(*one) for one in given)) == 0
    assert written == ["warning: two heads\n", "there.py:3: UserWarning: other\n"]
    assert warnings.formatwarning is before


def test_an_error_of_a_file_is_one_line_unless_a_traceback_is_asked_for(capsys):
    def run(arguments):
        raise OSError(28, "No space left on device", "plot.png")

    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    assert exit_code(run, parser, []) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'plot.png'\n"
    with pytest.raises(OSError, match="No space left"):
        exit_code(run, parser, ["--debug"])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_the_output_lacks_are_escaped(capsys, monkeypatch, encoding):
    output._tell_of.cache_clear()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    for _ in range(2):
        output.show("a smile: 🙂")
    output.show_json({"text": "🙂"})
    lines = written.getvalue().decode(encoding).splitlines()
    assert lines == ["a smile: \\U0001f642"] * 2 + ['{"text": "\\ud83d\\ude42"}']
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"the standard output is {encoding}, which lacks some characters: they are escaped; "
        "PYTHONIOENCODING=utf-8 writes them"
    ]


def test_nothing_is_said_where_there_is_no_error_stream_or_a_full_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    output.say("said to nobody")
    monkeypatch.setattr(sys, "stderr", Failing(FULL))
    output.say("said to nobody")
    assert capsys.readouterr().out == ""
    assert not output.is_terminal(None)


@pytest.mark.parametrize(
    ("main", "arguments"),
    [(generate.main, ["--prompt", "a"]), (bench.main, ["throughput", "--preset", "smollm2-135m"])],
    ids=["generate", "bench"],
)
def test_no_work_is_done_for_an_output_that_is_not_there(monkeypatch, capsys, main, arguments):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: there is no standard output to print to; ")


def test_an_interruption_is_130_and_no_traceback(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert guarded(interrupt) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(QSpecError):
        guarded(lambda: (_ for _ in ()).throw(QSpecError("x")), debug=lambda: True)


@pytest.fixture
def as_from_a_terminal():
    """What starts tests may have them ignore signals: ``nohup``, or a shell in the background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_is_an_interruption_and_leaves_nothing_behind(tmp_path, capsys, number):
    def work():
        with locked(tmp_path / "out"):
            signal.raise_signal(number)

    assert guarded(work) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_interrupted_process_waits_for_no_thread():
    source = (
        "import signal, threading, time; from qspec_jax.commands.run import guarded, leave\n"
        "threading.Thread(target=time.sleep, args=[600]).start()\n"
        "leave(guarded(lambda: signal.raise_signal(signal.SIGTERM)))"
    )
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (ended.returncode, ended.stderr) == (143, "interrupted\n")


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_python_throws_away_comes_once_more(capsys, number):
    """The callback of the garbage collector is JAX's, or anybody's: the work went on as if nothing had been."""
    calls = []

    def collected(phase, _):
        if phase == "start" and not calls:
            calls.append(phase)
            signal.raise_signal(number)

    def work():
        gc.collect()
        for _ in range(1000):
            time.sleep(0.01)

    gc.callbacks.append(collected)
    try:
        assert guarded(work) == 128 + number
    finally:
        gc.callbacks.remove(collected)
    assert calls == ["start"]
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_import_of_a_library_in_c(capsys, number):
    """One of jaxlib's made an ImportError of it, which was a traceback, and another one aborted."""
    imported = []

    def work():
        module = {"__name__": "jaxlib._some_library", "signal": signal, "number": number, "imported": imported}
        exec("signal.raise_signal(number); imported.append(number)", module)
        for _ in range(1000):
            time.sleep(0.01)

    before = signal.getsignal(number)
    assert guarded(work) == 128 + number
    assert imported == [number]
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("as_from_a_terminal")
def test_a_signal_that_is_ignored_stays_so():
    """As ``nohup`` has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert guarded(lambda: signal.raise_signal(signal.SIGHUP)) == 0


PRINTS = "import sys; from qspec_jax.commands.run import guarded; sys.exit(guarded(lambda: print('text')))"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("| true", 1, ""),
        ("> /dev/full", 1, "error: cannot write the standard output: No space left on device\n"),
        (">&-", 0, ""),
        ("2>&- >&- <&-", 0, ""),
    ],
)
def test_a_process_ends_as_quietly(redirection, code, said):
    """Not only what a command does: what is left in a stream fails again as Python ends, with exit code 120."""
    command = f'set -o pipefail; (sleep 0.2; exec "$0" -c "$1") {redirection}'
    started = ["bash", "-c", command, sys.executable, PRINTS]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(started, capture_output=True, text=True, cwd=ROOT, env=buffered)
    assert (ended.returncode, ended.stderr) == (code, said)


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    source = (
        "import os, sys; from qspec_jax.commands.output import open_standard_streams; open_standard_streams();"
        "number = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR); os.write(number, str(number).encode())"
    )
    shell, path = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', tmp_path / "file"
    subprocess.run(["bash", "-c", shell, sys.executable, source, path], check=True, cwd=ROOT)
    assert path.read_text() == "3"
