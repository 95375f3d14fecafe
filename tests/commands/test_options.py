"""Texts of a command line, whatever the locale takes their bytes for."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os

import pytest

from qspec_jax import chat, evaluate, generate, info, quantize, serve, texts
from qspec_jax.bench.__main__ import build_parser as bench_parser
from qspec_jax.bench.__main__ import main as bench
from qspec_jax.commands import options
from qspec_jax.commands.options import text_of
from qspec_jax.errors import UsageError


@pytest.fixture
def in_ascii(monkeypatch):
    """As in a process with ``LANG=C PYTHONUTF8=0``, whose bytes beyond ASCII become halves of characters."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    return lambda text, encoding="utf-8": text.encode(encoding).decode("ascii", "surrogateescape")


def test_prompts_and_stop_strings_are_utf_8_in_any_locale(in_ascii):
    arguments = generate.build_parser().parse_args(
        ["--prompt", in_ascii("é 🙂"), "--stop", in_ascii("日本"), "--prompt", "a"]
    )
    assert (arguments.prompt, arguments.stop) == (["é 🙂", "a"], ["日本"])


def test_a_text_of_another_encoding_is_refused_with_a_remedy(in_ascii):
    for text in (in_ascii("é", "latin-1"), "\ud83d"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"not UTF-8; .*--prompt-file"):
            text_of(text)


@pytest.mark.parametrize(
    ("main", "given", "usage", "said"),
    [
        (bench, ["speedup", "--promt-file", "x"], "speedup", "--promt-file x; did you mean --prompt-file?"),
        (bench, ["decode", "--foo"], "decode", "--foo"),
        (bench, ["tune", "--process-id", "0"], "tune", "this command runs in one process, without --process-id"),
        (bench, ["--debug", "tune"], "tune", "--debug; give --debug after tune"),
        (generate.main, ["--draft-lenght=5", "-prompt", "a"], "", "did you mean --draft-length, --prompt?"),
        (serve.main, ["--slot", "2", "--prt", "1"], "", "unrecognized arguments: --prt; did you mean --port?"),
        (generate.main, ["small.gguf"], "", "unrecognized arguments: small.gguf; give --model small.gguf"),
        (generate.main, ["What is it?" * 99, "x"], "", "What is it?'"),
        (chat.main, [".", "--debug"], "", "unrecognized arguments: .; give --model ."),
        (info.main, ["a.gguf", "b.gguf"], "", "unrecognized arguments: b.gguf"),
    ],
)
def test_of_an_unknown_option_the_usage_is_that_of_its_command(capsys, main, given, usage, said):
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"usage: python -m qspec_jax.{'bench' if main is bench else main.__module__[10:]} {usage}")
    assert said in err.splitlines()[-1]
    assert "did you mean" in said or "did you mean" not in err


def test_every_command_shows_the_traceback_of_an_error_when_asked():
    alone = {
        module.__name__: module.build_parser() for module in (chat, evaluate, generate, info, quantize, serve, texts)
    }
    (several,) = bench_parser()._subparsers._group_actions
    commands = alone | several.choices
    assert len(commands) == 14
    assert not [name for name, parser in commands.items() if "--debug" not in parser._option_string_actions]


TAKING_A_MESH = {"chat": (chat.build_parser, []), "evaluate": (evaluate.build_parser, [])}
TAKING_A_MESH |= {"generate": (generate.build_parser, []), "serve": (serve.build_parser, [])}
TAKING_A_MESH |= {f"bench {name}": (bench_parser, [name]) for name in ("decode", "speedup", "throughput")}


@pytest.mark.parametrize("command", TAKING_A_MESH)
def test_a_mesh_is_read_with_the_options(capsys, command):
    build, words = TAKING_A_MESH[command]
    assert build().parse_args([*words, "--mesh", "model=2"]).mesh == "data=1,model=2"
    with pytest.raises(SystemExit) as ended:
        build().parse_args([*words, "--mesh", "modle=2"])
    assert ended.value.code == 2
    assert "use data=N,model=N, such as data=2,model=4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modes", "given", "line"),
    [
        (["w8a16", "qspec"], {"verify": "float"}, "--mode w8a16 reads 8-bit weights, and --verify float a 4-bit copy"),
        (["float"], {"head_bits": 8}, "--head-bits and --draft-head are of quantised models"),
        (["float"], {"draft_head": 4}, "--head-bits and --draft-head are of quantised models"),
        (["float"], {"verify": "float", "draft_head": 4}, None),
        (["float", "qspec"], {"head_bits": 8}, None),
        (["w8a16", "qspec"], {}, None),
    ],
)
def test_weights_that_no_mode_reads_are_refused_before_a_model_is_opened(modes, given, line):
    asked = {"verify": "auto", "draft_model": None, "head_bits": None, "draft_head": None, **given}
    with contextlib.nullcontext() if line is None else pytest.raises(UsageError, match=line):
        options.check_weights(argparse.Namespace(**asked), modes)


@pytest.mark.parametrize(
    ("contexts", "modes", "given", "refused"),
    [
        (["full"], ["w4a16", "qspec"], {}, True),
        (["full"], ["auto"], {}, True),
        (["full"], ["w4a16", "lookup"], {}, False),  # whose drafts the model does not make
        (["full"], ["qspec"], {"verify": "auto"}, False),  # which the model tells
        (["full"], ["qspec"], {"verify": "float"}, False),
        (["full"], ["qspec"], {"draft_head": 4}, False),
        (["full", "auto"], ["qspec"], {}, False),  # one of them gains
        ([512], ["qspec"], {}, False),
    ],
)
def test_drafts_that_read_all_that_verifies_are_refused_before_a_model_is_opened(contexts, modes, given, refused):
    asked = argparse.Namespace(**{"verify": "w4a16", "draft_head": None, **given})
    options.check_drafts(asked, ["w4a8"], contexts, modes)
    with pytest.raises(UsageError, match="costs a plain step") if refused else contextlib.nullcontext():
        options.check_drafts(asked, ["w4a16"], contexts, modes)


@pytest.mark.parametrize("named", ["one", "several"])
def test_drafts_of_a_checkpoint_that_may_have_a_head_for_them_are_not_refused_early(tmp_path, named):
    (tmp_path / "qspec.json").touch()
    model = str(tmp_path) if named == "one" else ["default", str(tmp_path)]
    asked = argparse.Namespace(verify="w4a16", draft_head=None, model=model)
    options.check_drafts(asked, ["w4a16"], ["full"], ["qspec"])
    with pytest.raises(UsageError, match="costs a plain step"):
        options.check_drafts(argparse.Namespace(**{**vars(asked), "model": "default"}), ["w4a16"], ["full"], ["qspec"])


@pytest.mark.parametrize(
    ("verify", "modes", "wanted"),
    [("auto", ["w4a16", "w8a16"], "w8a16"), ("w4a16", ["w8a16"], "w4a16"), ("auto", ["qspec"], "auto")],
)
def test_a_plain_mode_of_8_bits_asks_for_such_weights(verify, modes, wanted):
    assert options.verify_of(argparse.Namespace(verify=verify), modes) == wanted


@pytest.mark.parametrize(
    ("build", "given", "said"),
    [
        (
            generate.build_parser,
            "--mode w4a16 --draft w4a4 --draft-length 5",
            "--draft, --draft-length: no effect with",
        ),
        (generate.build_parser, "--mode float --draft-context full --typical-acceptance 0.1", "makes no drafts"),
        (generate.build_parser, "--mode lookup --draft-head 4 --draft-length 5", "--draft-head: no effect with --mode"),
        (
            serve.build_parser,
            "--mode w4a16 --draft w4a8",
            "--draft: no effect with --mode w4a16, which makes no drafts",
        ),
        (chat.build_parser, "--draft-length 5", "--draft-length: no effect with --mode auto, which chooses it; give"),
        (chat.build_parser, "--top-p 0.9 --top-k 4", "--top-k, --top-p: no effect with --temperature 0, which takes"),
    ],
)
def test_options_that_change_nothing_are_told_with_those_that_would(build, given, said):
    (told,) = options.without_effect(build().parse_args(given.split()))
    assert said in told
    assert "; give " in told


@pytest.mark.parametrize(
    ("build", "given", "temperatures"),
    [
        (generate.build_parser, "--draft w4a4 --draft-length 5 --draft-head 4 --typical-acceptance 0.1", []),
        (generate.build_parser, "--mode auto --draft w4a4 --draft-length auto --typical-acceptance 0.1", []),
        (generate.build_parser, "--mode lookup-qspec --draft w4a4 --draft-context 512", []),
        (generate.build_parser, "--mode w4a16 --top-p 0.9 --min-p 0.1 --temperature 0.7", []),
        (generate.build_parser, "--top-p 0.9 --num-samples 2", [0.0, 0.7]),  # that of a line
        (serve.build_parser, "", []),
        (chat.build_parser, "", []),
    ],
)
def test_nothing_is_told_of_options_that_do_something(build, given, temperatures):
    assert options.without_effect(build().parse_args(given.split()), temperatures) == []


@pytest.mark.parametrize("build", [serve.build_parser, info.build_parser], ids=["serve", "info"])
def test_a_model_is_given_first_or_as_to_other_commands(capsys, build):
    for words in (["x"], ["--model", "x"], ["--model=x", "--debug"], ["--debug", "x"]):
        assert build().parse_args(words).model == "x"
    assert build().parse_args([]).model is None
    for words in (["x", "--model", "y"], ["--model", "x", "y"], ["--model", "x", "--model", "y"]):
        with pytest.raises(SystemExit):
            build().parse_args(words)
        assert "MODEL is given twice: x and y" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["--plot"], ["--outlier-plot"], ["--plot", "--outlier-plot"]])
def test_who_draws_without_matplotlib_hears_of_the_options_that_draw(tmp_path, monkeypatch, capsys, asked):
    (tmp_path / "text.txt").write_text("some letters")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    given = [word for option in asked for word in (option, str(tmp_path / "plot.png"))]
    assert evaluate.main(["--text", str(tmp_path / "text.txt"), *given]) == 2
    names = " and ".join(asked)
    expected = f"error: for {names} install matplotlib (`pip install matplotlib`), or leave {names} out"
    assert capsys.readouterr().err.splitlines() == [expected]
