"""Contracts of the evaluation and of its command."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
from flax import nnx

import qspec_jax
from qspec_jax import ActivationQuantization, Precision, QuantConfig, evaluate
from qspec_jax.commands.prompt_files import PromptLine
from qspec_jax.decoding.chunks import fitting_capacity
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.evaluation import scores as evaluation
from qspec_jax.evaluation import tables
from qspec_jax.evaluation.scores import ModelScore
from qspec_jax.evaluation.tables import plot_outliers
from qspec_jax.model.config import ModelConfig
from qspec_jax.recipes.layerwise import embed
from qspec_jax.recipes.moments import channel_maxima
from qspec_jax.recipes.observe import advance, second_moments
from qspec_jax.weights.fill import load_layer
from tests import tiny

TEXT = np.random.default_rng(3).integers(3, 96, 70).tolist()
PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14], [20]]
PRECISIONS = (Precision.W4A16, Precision.W4A8, Precision.W4A4)
COARSE = QuantConfig(w4a4=ActivationQuantization(group_size=None, symmetric=True))


@pytest.fixture(scope="module")
def model():
    return tiny.language_model(quantization=COARSE)


@pytest.fixture(scope="module")
def baseline():
    return tiny.language_model(quantization=None)


@pytest.fixture(scope="module")
def text_scores(model, baseline):
    return evaluation.score_text(model, TEXT, precisions=PRECISIONS, baseline=baseline, context=32)


def test_perplexity_is_that_of_the_logits_in_windows(baseline, text_scores):
    nll, count = 0.0, 0
    cache = baseline.decoder.create_cache(batch=1, capacity=32)
    logits_of = nnx.jit(lambda decoder, tokens, cache: decoder(tokens, cache, precision=Precision.FLOAT)[0][0])
    for start in (0, 32, 64):
        window = np.asarray(TEXT[start : start + 32], np.int32)
        logits = np.asarray(logits_of(baseline.decoder, window[None], cache), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll -= sum(log_p[i, window[i + 1]] for i in range(len(window) - 1))
        count += len(window) - 1
    assert text_scores[0].num_tokens == count == 67
    assert text_scores[0].perplexity == pytest.approx(np.exp(nll / count), rel=1e-4)


def test_divergence_grows_as_precision_falls(text_scores):
    assert [score.name for score in text_scores] == ["baseline", "w4a16", "w4a8", "w4a4"]
    assert text_scores[0].kl is None
    w4a16, w4a8, w4a4 = (score.kl for score in text_scores[1:])
    assert 0 < w4a16 < w4a4
    assert abs(w4a8 - w4a16) < 0.2 * w4a16
    assert text_scores[3].agreement < text_scores[1].agreement < 1


def test_a_model_agrees_with_itself(model):
    scores = evaluation.score_text(model, TEXT, precisions=[Precision.W4A16])
    assert (scores[1].agreement, scores[1].kl) == (1.0, 0.0)
    assert scores[1].perplexity == scores[0].perplexity


def test_a_text_that_is_too_short_is_refused(model):
    with pytest.raises(UsageError, match="must be at least 2"):
        evaluation.score_text(model, [5], precisions=[Precision.W4A16])


def test_drafts_are_scored_by_length_and_position(model):
    kinds = [("w4a8", 1), ("w4a8", 3), ("w4a4", 3)]
    plans = [model.plan(draft=draft, draft_length=length) for draft, length in kinds]
    found = evaluation.score_drafts(model, PROMPTS, plans, kinds=["chat", "code", "chat"], max_new_tokens=24)
    assert [score.kind for score in found] == [None, "chat", "code"] * 3
    scores = found[::3]
    assert [(score.draft, score.draft_length) for score in scores] == kinds
    for score in scores:
        assert score.identical == score.num_prompts == 3
        by_position = score.acceptance_by_position
        assert len(by_position) == score.draft_length
        assert list(by_position) == sorted(by_position, reverse=True)
        assert sum(by_position) == pytest.approx(score.tokens_per_cycle - 1)
        assert score.acceptance_rate == pytest.approx(sum(by_position) / score.draft_length)
    assert scores[2].acceptance_rate < scores[1].acceptance_rate
    for every, chat, code in zip(scores, found[1::3], found[2::3], strict=True):
        assert (chat.num_prompts, code.num_prompts) == (chat.identical, code.identical) == (2, 1)
        assert chat.num_tokens + code.num_tokens == every.num_tokens == 72
        lower, upper = sorted([chat, code], key=lambda score: score.acceptance_rate)
        assert lower.acceptance_rate <= every.acceptance_rate <= upper.acceptance_rate


@pytest.mark.parametrize(("verify", "first"), [("auto", "w8a16"), ("w8a16", "w8a16"), ("w4a16", "w4a16")])
def test_of_8_bit_weights_what_verifies_is_scored_first(tmp_path, verify, first):
    (tmp_path / "text.txt").write_text("some letters")
    request = evaluate._request(evaluate.build_parser().parse_args(["--text", str(tmp_path / "text.txt")]))
    nested = types.SimpleNamespace(quantization=QuantConfig(bits=8), verify=verify)
    assert evaluate._precisions(request, nested)[0] == first


def test_a_baseline_of_another_vocabulary_is_refused(model):
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "vocab_size": 64})
    other = tiny.language_model(config, quantization=None)
    with pytest.raises(UsageError, match=r"has 64 tokens and .* 96, so their logits cannot be compared"):
        evaluation.score_text(model, TEXT, precisions=PRECISIONS, baseline=other, context=32)


@pytest.mark.parametrize(("text", "expected"), [("1-3", [1, 2, 3]), ("5", [5]), ("1, 3,5", [1, 3, 5])])
def test_draft_lengths_are_ranges_or_lists(text, expected):
    assert evaluate.draft_lengths(text) == expected


class Spelling:
    """A tokenizer that reads a letter as a token."""

    eos_token_ids = ()
    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 90 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture
def loaded(model, baseline, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", Spelling())
    monkeypatch.setattr(
        qspec_jax, "load", lambda name, *, quantization, **options: baseline if quantization is None else model
    )


@pytest.fixture
def any_name(monkeypatch):
    """Models may be called what they like."""
    monkeypatch.setattr(evaluate, "check_model_name", lambda name: None)


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = evaluate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.usefixtures("loaded")
def test_the_command_prints_both_tables_or_one_object(capsys, tmp_path):
    text, prompts = tmp_path / "text.txt", tmp_path / "prompts.txt"
    text.write_text("some letters to score " * 3)
    prompts.write_text("a prompt\nanother\n")
    arguments = ("--text", text, "--prompt-file", prompts, "--draft-lengths", "2", "--max-new-tokens", 8)
    arguments += ("--max-tokens", 40)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line] == [
        *("text", "baseline", "w4a16", "w4a8", "w4a4"),
        *("draft", "w4a8", "w4a4"),
    ]
    code, out, _ = run(capsys, *arguments, "--json")
    scores = json.loads(out)
    assert code == 0
    assert [score["num_tokens"] for score in scores["text"]] == [39] * 4
    assert [score["num_prompts"] for score in scores["drafts"]] == [2, 2]


@pytest.mark.usefixtures("loaded")
def test_kinds_have_lines_of_their_own_and_prompts_that_fail_are_in_none(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [("a prompt", None), ("another", "chat"), ("too long " * 40, "summary")]
    prompts.write_text("".join(json.dumps({"prompt": text, "kind": kind}) + "\n" for text, kind in lines))
    arguments = ("--prompt-file", prompts, "--draft-lengths", "2", "--max-new-tokens", 8)
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert [[*line.split()[:3], line.split()[5]] for line in out.splitlines()] == [
        ["kind", "draft", "length", "identical"],
        *(["chat", draft, "2", "1/1"] for draft in ("w4a8", "w4a4")),
        *(["summary", draft, "2", "0/0"] for draft in ("w4a8", "w4a4")),
        *(["all", draft, "2", "2/2"] for draft in ("w4a8", "w4a4")),
    ]
    assert out.splitlines()[3].split()[3:] == ["-", "-", "0/0", "-"]
    assert "prompt 3 failed: a prompt of 360 tokens" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith(f" ({prompts}:3)")
    scores = json.loads(run(capsys, *arguments, "--json")[1])
    assert [score["num_prompts"] for score in scores["drafts"]] == [2, 2]
    assert [(score["kind"], score["num_prompts"]) for score in scores["drafts_by_kind"][:2]] == [
        ("chat", 1),
        ("summary", 0),
    ]


def test_several_models_have_a_table_of_kinds_each():
    drafts = [
        evaluation.DraftScore("w4a8@1024", 3, 2, 8, 6, 0.9, 3.7, (0.9, 0.9, 0.9), 2, kind) for kind in (None, "code")
    ]
    models = [ModelScore(name, [], drafts[:1], drafts[1:]) for name in ("one", "another")]
    tables = evaluate._tables(models)
    assert [table.split()[0] for table in tables] == ["model", "one", "another"]
    assert tables[1].splitlines()[2] == "code  w4a8@1024       3     0.900          3.70        2/2  0.90 0.90 0.90"


def test_columns_of_several_models_stay_apart_whatever_is_in_them():
    """A draft with a long name, and a model that predicts nothing."""
    score = evaluation.DraftScore("w4a16+head4@1024", 3, 2, 8, 6, 0.9, 3.7, (0.9, 0.9, 0.9), 2)
    text = evaluation.TextScore("w4a16", 100, 21368921495.412, 0.1, 4.67)
    heading, line = tables.comparison_table([ModelScore("one", [text], [score, score])]).splitlines()
    assert heading.split()[-3:] == ["nats", "w4a16+head4@1024,", "3"]
    assert line.split() == ["one", "w4a16", "21368921495.412", "4.67000", "0.900", "3.70"]
    assert "100 21368921495.412" in tables.text_table([text])


def test_drafts_that_nobody_made_are_not_taken_for_rejected_ones():
    """Short texts, of which a budget pays for all."""
    score = evaluation.DraftScore("w4a16@512", 3, 2, 8, 0, 0.0, 1.0, (0.0, 0.0, 0.0), 2)
    _, line = tables.draft_table([score]).splitlines()
    assert line.split() == ["w4a16@512", "3", "-", "-", "2/2", "-"]
    assert tables.comparison_table([ModelScore("one", [], [score])]).splitlines()[1].split()[-1] == "-"


def test_contexts_of_drafts_are_budgets_or_windows(model):
    contexts = [evaluate._draft_context(text) for text in ("full", "1024", "window-256")]
    plans = [evaluate._plan(model, "w4a8", context, 3) for context in contexts]
    assert [plan.draft_source for plan in plans] == ["w4a8", "w4a8@1024", "w4a8/256"]
    assert {(plan.verify, plan.draft_length) for plan in plans} == {(model.plan("w4a16").verify, 3)}
    twice = evaluate._Request(["w4a16"], ["w4a8", "w4a8"], [3], ["full", 1024, "full"], None, [])
    assert [plan.draft_source for plan in twice.plans(model, 2048)] == ["w4a8", "w4a8@1024"]


def test_drafts_are_named_as_what_they_read_of_a_short_cache(model):
    """A budget that pays for all of it is none, and its drafts those of ``full``; where none are left it says whose."""
    asked = evaluate._Request(["w4a16"], ["w4a8", "w4a16"], [3], [112, 1024], None, [])
    assert [plan.draft_source for plan in asked.plans(model, 64)] == ["w4a8", "w4a16@112", "w4a16@1024"]
    assert [plan.draft_source for plan in asked.plans(model, 512)] == ["w4a8@112", "w4a8", "w4a16@112", "w4a16@1024"]


def test_drafts_from_a_budget_that_no_prompt_exceeds_are_scored_as_those_of_the_whole(model):
    """Also where the cache has more positions than the budget, and drafts that verify are no drafts."""
    kinds = [("w4a8", 112), ("w4a8", "full"), ("w4a16", 112)]
    plans = [model.plan(draft=draft, draft_length=1, draft_context=context) for draft, context in kinds]
    longest = max(map(len, PROMPTS)) + 66
    assert longest < 112 < fitting_capacity(longest)
    scores = evaluation.score_drafts(model, PROMPTS, plans, max_new_tokens=66)
    assert [(score.draft, score.num_drafted > 0) for score in scores] == [("w4a8", True), ("w4a16@112", False)]
    assert evaluation.unscored(plans, scores) == ["w4a8@112", "w4a16@112"]


@pytest.mark.usefixtures("loaded")
def test_a_run_has_the_caches_that_its_drafts_are_named_by(model):
    prompts = [PromptLine("a prompt" * 5), PromptLine("a")]
    request = evaluate._Request(["w4a16"], ["w4a8"], [3], ["full"], None, prompts)
    requests = [model.attempt(line.prompt, model.plan(), max_new_tokens=30) for line in prompts]
    assert model.run(requests, model.plan()).max_seq_len == request.capacity(model, 30)


@pytest.mark.usefixtures("loaded")
def test_the_plot_is_a_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    prompts, plot = tmp_path / "prompts.txt", tmp_path / "plot.png"
    prompts.write_text("a prompt\n")
    code, _, _ = run(capsys, "--prompt-file", prompts, "--draft-lengths", "2", "--max-new-tokens", 4, "--plot", plot)
    assert code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("any_name")
def test_several_models_are_compared_a_line_each(capsys, tmp_path, monkeypatch):
    def score(name, arguments, request):
        baseline = evaluation.TextScore("baseline", 9, 11.0, None, None)
        texts = [evaluation.TextScore("w4a16", 9, 12.3456, 0.5, 0.25)]
        if name == "another":  # which verifies with 8 bits
            texts = [evaluation.TextScore("w8a16", 9, 11.5, 0.9, 0.125), *texts]
        drafts = [evaluation.DraftScore("w4a8", length, 2, 8, 6, 0.9, 3.7, (0.9,), 2) for length in (3, 5)]
        return ModelScore(name, [baseline, *texts], drafts)

    monkeypatch.setattr(evaluate, "_score", score)
    (tmp_path / "text.txt").write_text("some letters")
    arguments = ("--model", "one", "--model", "another", "--text", tmp_path / "text.txt")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["model", "text", "perplexity", "KL,", "nats", "w4a8,", "3", "w4a8,", "5"],
        ["one", "w4a16", "12.346", "0.25000", "0.900", "3.70", "0.900", "3.70"],
        ["another", "w8a16", "11.500", "0.12500", "0.900", "3.70", "0.900", "3.70"],
    ]
    _, out, _ = run(capsys, *arguments, "--json")
    assert [model["name"] for model in json.loads(out)["models"]] == ["one", "another"]


@pytest.mark.usefixtures("any_name")
def test_the_baseline_may_be_another_model_and_keeps_its_cache(capsys, tmp_path, monkeypatch):
    models = {"checkpoint": types.SimpleNamespace(tokenizer=Spelling()), "float": object()}
    asked, compared = [], []

    def load(name, *, quantization, kv, **options):
        asked.append((name, quantization, kv))
        return models[name]

    def score_text(model, token_ids, *, baseline, **options):
        compared.append((model, baseline))
        return []

    monkeypatch.setattr(qspec_jax, "load", load)
    monkeypatch.setattr(evaluation, "score_text", score_text)
    (tmp_path / "text.txt").write_text("some letters to score")
    arguments = "--model", "checkpoint", "--baseline", "float", "--text", tmp_path / "text.txt"
    assert run(capsys, *arguments, "--kv", "int8")[0] == 0
    assert asked == [("checkpoint", "auto", "int8"), ("float", None, "model")]  # which has its own cache, too
    assert compared == [(models["checkpoint"], models["float"])]


def test_outlier_maps_hold_the_largest_input_of_every_channel(tmp_path):
    pytest.importorskip("matplotlib")
    source, tokens = tiny.source(ModelConfig.from_hf(tiny.BASE_HF_CONFIG)), np.asarray([TEXT[:16]], np.int32)
    maxima = channel_maxima(source, tokens, "mlp.down")
    assert maxima.shape == (2, 128)
    streams = advance(load_layer(source, 0), embed(source, tokens))
    energy = np.diag(second_moments(load_layer(source, 1), streams, "mlp.down"))
    assert (maxima[1] ** 2 >= energy).all()
    assert (maxima[1] ** 2 <= 16.01 * energy).all()  # 16 tokens: no square is more than their sum
    plot_outliers([("before", maxima), ("after", maxima)], tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --text FILE, --prompt-file FILE or both"),
        (("--text", "missing.txt"), "cannot read --text missing.txt"),
        (("--text", __file__, "--precisions", "w2"), "w2 is unknown; use w4a16, w4a8, w4a4"),
        (("--text", __file__, "--draft-lengths", "0-3"), "between 1 and 16"),
        (("--text", __file__, "--draft-lengths", "1-99999999"), "between 1 and 16"),
        *(
            (("--text", __file__, "--draft-lengths", text), "is not like 1-7")
            for text in ("few", "7-1", "\u00b2", "1-9" + "9" * 99)
        ),
        (("--text", __file__, "--draft-contexts", "window-" + "9" * 99), "use window-N for the newest N tokens"),
        (("--text", __file__, "--draft-contexts", "9" * 5000), "use full, auto or a number of tokens"),
        (("--text", __file__, "--drafts", ","), "--drafts ',' names none; use some of w4a8, w4a4"),
        (("--text", __file__, "--batch-size", "9999999"), "--batch-size 9999999 must be at most 1048576"),
        (("--text", __file__, "--draft-contexts", "window-0"), "window-0: use window-N for the newest N tokens"),
        (("--prompt-file", __file__, "--outlier-plot", "x.png"), "--outlier-plot shows activations on a text"),
        (("--text", __file__, "--context", "0"), "--context 0 must be at least 1"),
        (("--text", "-", "--prompt-file", "-"), "--text - and --prompt-file - both read the standard input"),
    ],
    ids=str,
)
def test_usage_errors_come_before_a_model_is_loaded(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(qspec_jax, "load", lambda *arguments, **options: pytest.fail("a model was loaded"))
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.usefixtures("loaded")
def test_an_interruption_leaves_no_table(capsys, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a prompt\nanother\n")
    advance, calls = Scheduler.advance, []

    def advance_until_interrupted(self, max_cycles=None):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return advance(self, max_cycles)

    monkeypatch.setattr(Scheduler, "advance", advance_until_interrupted)
    code, out, err = run(capsys, "--prompt-file", prompts, "--draft-lengths", "2", "--max-new-tokens", 8)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert len(calls) == 6


@pytest.mark.usefixtures("loaded")
def test_lines_that_cannot_run_are_in_no_figure(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "a prompt", "id": NaN}', '{"prompt": "another"}', '{"prompt": ""}']
    prompts.write_text("\n".join(lines))
    arguments = ("--prompt-file", prompts, "--draft-lengths", "2", "--max-new-tokens", 8, "--json")
    code, out, err = run(capsys, *arguments)
    assert code == 1
    scores = json.loads(out)
    assert [(score["num_prompts"], score["identical"]) for score in scores["drafts"]] == [(1, 1)] * 2
    assert scores["failed"] == [
        f'prompt 1 failed: "id" has nan, which JSON has not ({prompts}:1)',
        f"prompt 3 failed: the prompt is empty; give it some text ({prompts}:3)",
    ]
    assert err.splitlines()[-2:] == scores["failed"]
    prompts.write_text(lines[0])
    assert run(capsys, *arguments)[:2] == (2, "")


def test_a_perplexity_that_is_no_number_is_said_and_valid_json(capsys, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some letters")
    monkeypatch.setattr(evaluate, "_load", lambda *_: types.SimpleNamespace(tokenizer=Spelling()))
    figures = {"baseline": 12.0, "w4a4": float("nan")}
    scores = [evaluation.TextScore(name, 9, value, 0.5, 0.25) for name, value in figures.items()]
    monkeypatch.setattr(evaluation, "score_text", lambda *_, **__: scores)
    code, out, err = run(capsys, "--text", tmp_path / "text.txt", "--json")
    assert code == 1
    assert [score["perplexity"] for score in json.loads(out)["text"]] == [12.0, None]
    assert "the perplexity of w4a4 is nan: its logits are no numbers, or too large" in err


@pytest.mark.usefixtures("loaded")
def test_prompts_of_which_none_can_run_are_refused_before_a_text_is_scored(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_text", lambda *_, **__: pytest.fail("scored the text"))
    (tmp_path / "text.txt").write_text("some letters")
    (tmp_path / "prompts.txt").write_text("too long " * 40)
    code, out, err = run(capsys, "--text", tmp_path / "text.txt", "--prompt-file", tmp_path / "prompts.txt")
    assert (code, out) == (2, "")
    assert "do not fit" in err


@pytest.mark.usefixtures("any_name")
def test_of_several_models_one_that_cannot_be_scored_costs_the_others_nothing(capsys, tmp_path, monkeypatch):
    """Not even where it comes first; a model that ran no prompt has no figure."""

    def score(name, arguments, request):
        if "bad" in name:
            raise CheckpointError("it is damaged")
        ran = 0 if name == "idle" else 2
        drafts = [evaluation.DraftScore("w4a8", 3, ran, 4 * ran, 3 * ran, 0.9, 3.7, (0.9,), ran)]
        return ModelScore(name, [evaluation.TextScore("w4a16", 9, 12.3456, 0.5, 0.25)], drafts)

    monkeypatch.setattr(evaluate, "_score", score)
    (tmp_path / "text.txt").write_text("some letters")
    names = ("--model", "bad", "--model", "good", "--model", "idle", "--text", tmp_path / "text.txt")
    code, out, err = run(capsys, *names)
    assert code == 1
    assert [line.split() for line in out.splitlines()] == [
        ["model", "text", "perplexity", "KL,", "nats", "w4a8,", "3"],
        ["bad", "-", "-", "-", "-"],
        ["good", "w4a16", "12.346", "0.25000", "0.900", "3.70"],
        ["idle", "w4a16", "12.346", "0.25000", "-"],
    ]
    assert err.splitlines()[-1] == "model bad failed: it is damaged"
    code, out, err = run(capsys, "--model", "bad", "--model", "bad 2", "--text", tmp_path / "text.txt")
    assert (code, out) == (1, "")
    assert err.splitlines()[-2:] == ["model bad failed: it is damaged", "error: it is damaged"]


@pytest.mark.usefixtures("loaded")
def test_the_plot_is_drawn_where_nobody_reads_the_tables(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def gone(text):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "show", gone)
    monkeypatch.setattr(evaluate, "_score", lambda *_: ModelScore("one", [], []))
    monkeypatch.setattr(evaluate.options, "check_plot", lambda *_, **__: None)
    drawn = []
    monkeypatch.setattr("qspec_jax.evaluation.tables.plot_acceptance", lambda scores, path: drawn.append(path))
    (tmp_path / "text.txt").write_text("some letters")
    assert run(capsys, "--text", tmp_path / "text.txt", "--plot", tmp_path / "plot.png")[0] == 1
    assert drawn == [tmp_path / "plot.png"]


def test_windows_that_are_longer_than_the_context_are_refused(model):
    with pytest.raises(UsageError, match=r"windows of 300 tokens do not fit .*; give a context of up to 256"):
        evaluation.score_text(model, [5] * 300, precisions=PRECISIONS, context=300)


def test_scores_count_what_ran_both_ways(model):
    """A prompt that fails with a plan alone is in none of its figures."""
    plan = model.plan(draft_length=2)
    good, bad = model.attempt([5], plan, max_new_tokens=4), model.attempt([], plan)
    ran = model.run([good], plan).collect()[0]
    for pair in ((bad, ran), (ran, bad), (bad, bad)):
        assert evaluation._draft_score(plan, [pair, (ran, ran)], None).num_prompts == 1


@pytest.mark.parametrize("option", ["--plot", "--outlier-plot"])
def test_where_a_plot_cannot_be_written_is_said_before_the_work(capsys, tmp_path, monkeypatch, option):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(qspec_jax, "load", lambda *arguments, **options: pytest.fail("a model was loaded"))
    (tmp_path / "text.txt").write_text("some letters")
    code, out, err = run(capsys, "--text", tmp_path / "text.txt", option, tmp_path / "none" / "plot.png")
    assert (code, out) == (2, "")
    assert f"error: {option} {tmp_path}/none/plot.png: there is no directory" in err
    code, out, err = run(capsys, "--text", tmp_path / "text.txt", option, tmp_path / "plot.doc")
    assert (code, out) == (2, "")
    assert f"error: {option} {tmp_path}/plot.doc: .doc is no format of pictures; use " in err
