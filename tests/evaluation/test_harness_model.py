"""The model class of lm-eval, with a local task."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.model.precision import Precision
from tests import tiny

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

CONTEXT = 48


class Spelling:
    """A tokenizer of one token per letter, after a BOS token."""

    eos_token_ids = (2,)
    has_chat_template = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [3 + ord(letter) % 90 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(ord("A") + token % 26) for token in token_ids)


@pytest.fixture(scope="module")
def language_model():
    made = tiny.language_model()
    made.tokenizer, made.stop_tokens = Spelling(), (2,)
    return made


@pytest.fixture(scope="module")
def harness(language_model):
    from qspec_jax.evaluation.harness_model import HarnessModel

    return HarnessModel(language_model, max_length=CONTEXT, batch_size=2)


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def predictions(model, tokens):
    """``[T, V]`` log-probabilities after each token, at W4A16."""
    cache = model.decoder.create_cache(batch=1, capacity=len(tokens))
    logits = model.decoder(jnp.asarray([tokens], jnp.int32), cache, precision=Precision.W4A16)[0][0]
    exact = np.asarray(logits, np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def test_likelihoods_are_those_of_the_logits(language_model, harness):
    pairs = [("some context", " and more"), ("", "alone"), ("x" * 60, "long"), ("third", " one")]
    found = harness.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (likelihood, greedy) in zip(pairs, found, strict=True):
        whole = language_model.tokenizer.encode(context + continuation)[-CONTEXT - 1 :]
        expected = predictions(language_model, whole[:-1])[-len(continuation) :]
        tokens = whole[-len(continuation) :]
        assert likelihood == pytest.approx(sum(expected[range(len(tokens)), tokens]), abs=1e-3)
        assert greedy == (expected.argmax(-1) == tokens).all()


def test_what_the_model_generates_is_greedy(language_model, harness):
    context = language_model.tokenizer.encode("go on")
    result = language_model.generate([context], mode="w4a16", max_new_tokens=3)[0]
    assert harness._loglikelihood_tokens([(None, context, result.token_ids)])[0][1]
    assert not harness._loglikelihood_tokens([(None, context, [result.token_ids[0] + 1])])[0][1]


def test_a_rolling_likelihood_predicts_every_token_once_with_as_much_context_as_fits(language_model, harness):
    text = "a text that is longer than one window of the model, and so is read in two"
    (found,) = harness.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    tokens = [1, *language_model.tokenizer.encode(text, add_special_tokens=False)]
    rest = len(tokens) - 1 - CONTEXT
    assert 0 < rest < CONTEXT
    first = predictions(language_model, tokens[:CONTEXT])
    second = predictions(language_model, tokens[-CONTEXT - 1 : -1])[-rest:]
    expected = sum(first[range(CONTEXT), tokens[1 : CONTEXT + 1]]) + sum(second[range(rest), tokens[-rest:]])
    assert found == pytest.approx(expected, abs=1e-2)


def test_generation_ends_before_a_stop_string_and_drafts_change_nothing(language_model, harness):
    from qspec_jax.evaluation.harness_model import HarnessModel

    def answers(model, *contexts, until=()):
        settings = {"until": list(until), "max_gen_toks": 12}
        return model.generate_until(instances("generate_until", *((context, settings) for context in contexts)))

    contexts = ("first question", "second", "a third one")
    plain = answers(harness, *contexts)
    drafting = HarnessModel(language_model, mode="qspec", draft="w4a4", max_length=CONTEXT)
    assert answers(drafting, *contexts) == plain
    stop = plain[0][3]
    assert answers(harness, contexts[0], until=[stop]) == [plain[0][: plain[0].index(stop)]]


def test_a_local_task_runs_in_the_harness(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": "which letter", "choices": ["a", "bb"], "answer": i % 4 // 3} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}, cache_dir: {tmp_path}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness and of what it imports
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        results = simple_evaluate(model=harness, tasks=["letters"], task_manager=manager, bootstrap_iters=0)
    pairs = [("which letter", f" {choice}") for choice in ("a", "bb")]
    likelihoods = [found for found, _ in harness.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)]
    assert results["results"]["letters"]["acc,none"] == (0.75, 0.25)[int(np.argmax(likelihoods))]


def test_an_interruption_ends_the_evaluation_and_an_error_is_no_answer(language_model, harness, monkeypatch):
    """Both were answers of no text before, which count as wrong ones."""
    settings = {"until": ["\n"], "max_gen_toks": 4}
    advance, calls = Scheduler.advance, []

    def advance_until_interrupted(self, max_cycles=None):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return advance(self, max_cycles)

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "advance", advance_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            harness.generate_until(instances("generate_until", ("a question", settings)))
    monkeypatch.setattr(harness, "tok_encode", lambda text: [len(text) * 1000 or 5])
    with pytest.raises(UsageError, match=r"request 2 cannot run: .* has a token id outside"):
        harness.generate_until(instances("generate_until", ("", settings), ("wrong", settings)))


def test_a_context_without_a_token_begins_as_a_text_does(language_model, harness, monkeypatch):
    monkeypatch.setattr(harness, "tok_encode", lambda text: [])
    (found,) = harness.generate_until(instances("generate_until", ("", {"max_gen_toks": 4})))
    (expected,) = language_model.generate([[harness.prefix_token_id]], mode="w4a16", max_new_tokens=4)
    assert found == expected.text


def test_likelihoods_that_are_no_numbers_are_no_scores(harness, monkeypatch):
    monkeypatch.setattr(harness, "_scores", lambda tokens: (jnp.full(tokens.shape, jnp.nan), tokens > 0))
    with pytest.raises(QSpecError, match="gives logits that are no numbers"):
        harness.loglikelihood(instances("loglikelihood", ("a", "b")), disable_tqdm=True)


def test_the_command_of_the_harness_ends_as_the_others_do(monkeypatch, capsys):
    from qspec_jax import harness as command

    for error, code, said in ((KeyboardInterrupt(), 130, "interrupted"), (UsageError("why"), 2, "error: why")):

        def evaluate(parser, arguments, error=error):
            raise error

        monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", evaluate)
        monkeypatch.setattr("sys.argv", ["harness"])
        assert command.main() == code
        assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"modle": "x"}, "has modle; use some of model, mode"),
        ({"pretrained": "x", "model": "y"}, "which are one"),
        ({"draft_length": "three"}, "draft_length='three': use a whole number"),
        ({"mode": "qspec", "draft_length": 99}, "draft_length=99 must be between 1 and 16"),
        ({"mode": "w4"}, "mode='w4' is unknown"),
        ({"batch_size": "many"}, "batch_size='many': use a whole number"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_length": "1e3"}, "max_length='1e3': use a whole number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_a_model_is_loaded(monkeypatch, arguments, said):
    """An unknown one was passed over before: ``pretrained=`` scored the demo model in silence."""
    from qspec_jax.evaluation.harness_model import HarnessModel

    monkeypatch.setattr("qspec_jax.load", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(UsageError, match=said):
        HarnessModel(**arguments)


def test_the_model_may_be_called_as_lm_eval_calls_it(language_model, monkeypatch):
    from qspec_jax.evaluation.harness_model import HarnessModel

    asked = []
    monkeypatch.setattr("qspec_jax.load", lambda name, **_: asked.append(name) or language_model)
    made = HarnessModel(pretrained="path", batch_size="auto:4", max_length="32", device="cpu", max_batch_size=64)
    assert (asked, made.batch_size, made.max_length) == (["path"], 8, 32)


def test_what_the_model_arguments_say_goes_before_what_lm_eval_always_gives(language_model):
    from qspec_jax.evaluation.harness_model import HarnessModel

    given = {"batch_size": 1, "device": None}
    made = HarnessModel.create_from_arg_obj({"model": language_model, "batch_size": 3}, given)
    assert (made.batch_size, HarnessModel.create_from_arg_obj({"model": language_model}, given).batch_size) == (3, 1)
    with pytest.raises(UsageError, match="batch_size=0 must be at least 1"):
        HarnessModel.create_from_arg_string("model=default,batch_size=0", given)


def test_the_page_has_every_model_argument():
    from qspec_jax.evaluation import harness_model

    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text("utf-8").partition("## Tasks of lm-eval")[2]
    assert [name for name in harness_model._ARGUMENTS if f"`{name}`" not in page] == []


@pytest.mark.parametrize(
    ("settings", "new_tokens", "changed"),
    [
        ({"until": ["."], "max_gen_toks": 5}, 5, {}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, 256, {"top_p": 0.9}),
        ({"do_sample": True, "top_k": 3}, 256, {"temperature": 1.0, "top_k": 3}),
        ({"temperature": 0.5, "top_p": 0.9, "seed": 4}, 256, {"temperature": 0.5, "top_p": 0.9, "seed": 4}),
    ],
)
def test_settings_of_a_task_reach_the_model(settings, new_tokens, changed):
    from qspec_jax.decoding.sampling_params import SamplingParams
    from qspec_jax.evaluation.harness_model import _asked

    assert _asked(settings) == (new_tokens, SamplingParams(**changed))


@pytest.mark.parametrize("settings", [{"num_beams": 4}, {"max_gen_toks": "many"}, {"top_p": 2.0}])
def test_settings_that_are_not_done_are_named(harness, settings):
    with pytest.raises(UsageError, match=f"request 1 cannot run: {'|'.join([*settings, 'max_new_tokens'])}"):
        harness.generate_until(instances("generate_until", ("a", settings)))


def test_a_harness_that_is_not_installed_is_named(monkeypatch, capsys):
    from qspec_jax import harness as command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main() == 2
    assert capsys.readouterr().err == "error: the harness needs lm-eval; run `pip install 'qspec-jax[eval]'`\n"


@pytest.mark.parametrize(("end", "code"), [(None, 0), (SystemExit(), 0), (SystemExit(2), 2)])
def test_the_command_ends_as_lm_eval_does(monkeypatch, end, code):
    from qspec_jax import harness

    def ending(parser, arguments):
        if end is not None:
            raise end

    monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", ending)
    monkeypatch.setattr("sys.argv", ["harness"])
    assert harness.main() == code
