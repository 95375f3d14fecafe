"""A look at drafts: cycles keep them only when asked, tokens do not depend on it, what is shown is what happened."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.decoding import speculative
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.decoding.state import DecodeState, TokenScores
from qspec_jax.engine.draft_view import DraftView
from qspec_jax.engine.drafts import DraftedCycle, Drafts, Kind, Piece
from qspec_jax.errors import UsageError
from tests import tiny

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 5, 6, 5], [3], [4, 4]]
SAMPLING = [{}, {"temperature": 1.3, "seed": 4}, {}, {"temperature": 0.7, "seed": 5}, {"stop_token_ids": [7, 20, 33]}]


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


def cycle_without_the_record(model, state, *, plan):
    """What ``speculative.cycle`` does for those who do not ask."""
    start = state.cache.lengths
    with jax.named_scope("draft"):
        drafts, cache = speculative.propose(model, state, plan=plan)
    with jax.named_scope("verify"):
        options = {"view": plan.verify, "weigh": plan.weigh, "sampler": state.sampler, "first": state.num_tokens}
        options |= {"idle": state.finished, "scored": state.scores is not None}
        rolled_back = cache.with_lengths(start)
        tokens, logits, cache, _ = speculative.verify(model, state.last_token, drafts, rolled_back, **options)
    with jax.named_scope("accept"):
        accepted = speculative.accept(drafts, tokens)
        scores = None if state.scores is None else TokenScores.of(logits, tokens)
        return speculative.emit(dataclasses.replace(state, cache=cache), start, tokens, accepted, scores)


@pytest.mark.parametrize("features", [SamplingFeatures(), SamplingFeatures(draws=True, scores=True)])
@pytest.mark.parametrize("mode", ["w4a16", "qspec", "lookup"])
def test_cycles_of_those_who_do_not_ask_are_the_same_programs_as_without_the_feature(model, mode, features):
    plan = model.plan(mode, draft="w4a8")

    def program(shape, advance):
        state = jax.eval_shape(lambda: model.programs.idle_state(shape))
        loop = lambda state: speculative.generate(model.decoder, state, jnp.int32(3), plan=plan, advance=advance)  # noqa: E731
        return str(jax.make_jaxpr(loop)(state))

    shape = Shape.of(plan, rows=2, capacity=64)._replace(features=features)
    assert Shape.of(plan, rows=2, capacity=64, keep_drafts=False)._replace(features=features) == shape
    ordinary = program(shape, speculative.cycle)
    assert ordinary == program(shape, cycle_without_the_record)
    asking = Shape.of(plan, rows=2, capacity=64, keep_drafts=True)._replace(features=features)
    assert (asking == shape) == (mode == "w4a16")
    assert (program(asking, speculative.cycle) == ordinary) == (mode == "w4a16")
    state = model.programs.idle_state(shape)
    known = [getattr(state, field.name) for field in dataclasses.fields(DecodeState) if field.name != "record"]
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(known))


@pytest.mark.parametrize("mode", ["qspec", "lookup", "auto"])
def test_tokens_do_not_depend_on_it_and_every_cycle_is_there(model, mode):
    options = {"mode": mode, "draft": "w4a8", "max_new_tokens": 16, "batch_size": 2, "sampling": SAMPLING}
    plain = model.generate(PROMPTS, **options)
    kept = model.generate(PROMPTS, keep_drafts=True, **options)
    assert [r.token_ids for r in kept] == [r.token_ids for r in plain]
    assert all(r.drafts is None and "drafts" not in r.to_dict() for r in plain)
    for result in kept:
        cycles = result.drafts.cycles
        assert result.token_ids == [result.token_ids[0], *itertools.chain(*(cycle.tokens for cycle in cycles))]
        for cycle in cycles[:-1]:
            assert len(cycle.tokens) == cycle.accepted + 1
            assert cycle.tokens[: cycle.accepted] == cycle.drafts[: cycle.accepted]
            assert cycle.drafts[cycle.accepted : cycle.accepted + 1] != cycle.tokens[-1:]
        lengths = np.bincount([cycle.accepted for cycle in cycles], minlength=len(result.stats.accepted_lengths))
        assert tuple(lengths.tolist()) == result.stats.accepted_lengths
        assert sum(len(cycle.drafts) for cycle in cycles) == result.stats.drafted
        assert sum(accepted for accepted, _ in result.drafts.by_position()) == result.stats.accepted
        assert len(result.to_dict()["drafts"]) == result.stats.cycles
        assert json.loads(json.dumps(result.to_dict()["drafts"])) == result.to_dict()["drafts"]
        every = [accepted / len(cycles) for accepted, _ in result.drafts.by_position()]
        assert list(result.stats.acceptance_by_position) == every
        repr(result.show()), result.show()._repr_html_()


def test_what_is_not_there_is_said(model):
    plain = model.generate([5, 6], mode="w4a16", max_new_tokens=4, keep_drafts=True)[0]
    assert "w4a16 is plain decoding: there are no drafts to show" in repr(plain.show())
    drafted = dataclasses.replace(plain, stats=dataclasses.replace(plain.stats, draft_length=3))
    with pytest.raises(UsageError, match="keep_drafts=True"):
        drafted.show()
    assert "shorten the prompt" in dataclasses.replace(drafted, error="shorten the prompt").show()._repr_html_()
    assert "before its first token" in repr(dataclasses.replace(drafted, token_ids=[]).show())
    nothing = Drafts.of([1, 2], [DraftedCycle((), 0, (2,))], None)  # a choice that never drafted
    assert "No cycle made drafts" in repr(DraftView.of(nothing))
    for use in (model.generate, model.stream):
        with pytest.raises(UsageError, match="keep_drafts='yes'"):
            use([5], keep_drafts="yes")


class Bytes:
    """A tokenizer whose tokens are bytes, besides two that are no text."""

    def decode(self, ids):
        return bytes(one for one in ids if one < 256).decode(errors="replace")

    def name_of_textless(self, token_id):
        return {256: "<|end|>", 257: "<257>"}.get(token_id)


def pieces(*cycles, first=b"a"):
    made = [DraftedCycle(tuple(drafts), accepted, tuple(tokens)) for drafts, accepted, tokens in cycles]
    return [(str(one.kind), one.text) for one in Drafts.of(list(first), made, Bytes()).pieces]


EURO, SMILE = "€".encode(), "😀".encode()


@pytest.mark.parametrize(
    ("cycles", "shown"),
    [
        ([(b"bc", 2, b"bcd")], "accepted b, accepted c, bonus d"),
        ([(b"bcd", 1, b"bx")], "accepted b, rejected c, rejected d, correction x"),
        ([(b"bcd", 3, b"b")], "accepted b, cut c, cut d"),
        ([(b"bcd", 2, b"b")], "accepted b, cut c, rejected d"),
        ([(b"", 0, b"b")], "plain b"),
        # A character is whole, and of the kind of its first token that was not accepted.
        ([(EURO, 3, EURO + b"x")], "accepted €, bonus x"),
        ([(EURO[:2], 2, EURO)], "bonus €"),
        ([(SMILE[:2] + b"xy", 2, SMILE[:3]), (SMILE[3:], 1, SMILE[3:] + b"z")], "rejected �x, rejected y, correction 😀, bonus z"),  # noqa: E501
        ([(SMILE[:2], 2, SMILE[:3])], "bonus �"),  # the text ends inside it
        ([(b"b" + EURO[:2], 1, b"bx")], "accepted b, rejected �, correction x"),
        ([(EURO, 2, EURO[:2] + b"x")], "rejected €, correction �x"),
        ([([98, 256], 2, [98, 256])], "accepted b, accepted <|end|>"),
        ([([*EURO[:2], 257], 3, [*EURO[:2], 257, 98])], "accepted �, accepted <257>, bonus b"),
    ],
)  # fmt: skip
def test_pieces_are_whole_characters_in_order(cycles, shown):
    assert ", ".join(f"{kind} {text}" for kind, text in pieces(*cycles)[1:]) == shown


def test_without_a_tokenizer_token_ids_are_shown():
    drafts = Drafts.of([7], [DraftedCycle((8, 9), 1, (8, 3))], None)
    assert repr(DraftView.of(drafts)).startswith(" 7 8[- 9-]{+ 3+}\n")


NASTY = "<script>alert(1)</script> & \"'"


def view(*texts):
    made = [Piece(kind, text, (1,), 1) for kind, text in texts]
    return DraftView(tuple(made), ((3, 4), (1, 4)))


@pytest.mark.parametrize("kind", list(Kind))
def test_html_of_a_text_is_text(kind):
    shown = view((kind, NASTY + "\x1b]0;title\x07\u202e\n"))._repr_html_()
    assert "<script" not in shown
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", shown)
    assert NASTY in html.unescape(re.sub("<[^>]*>", "", shown))
    for tag in ("div", "span", "b", "u", "s", "small", "table", "tr", "td", "p"):
        assert len(re.findall(f"<{tag}[ >]", shown)) == shown.count(f"</{tag}>")


@pytest.mark.parametrize("color", [False, True])
def test_a_terminal_obeys_nothing_that_a_text_says(color):
    for kind in Kind:
        shown = view((kind, "\x1b[31mred\x07\r\x9b1m\u202e\u2028\u2066"), (kind, "é👩\u200d💻　x\ty")).text(color=color)
        ours = re.sub("\x1b\\[[0-9;]*m", "", shown) if color else shown
        assert "\\x1b[31mred\\x07\\r\\x9b1m\\u202e\\u2028\\u2066" in ours
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028\u2066]", ours)
        assert "é👩\u200d💻　x\ty" in ours


def test_every_kind_is_told_apart_without_colours_and_by_more_than_a_colour():
    kinds = (Kind.ACCEPTED, Kind.CORRECTION, Kind.BONUS, Kind.REJECTED, Kind.CUT)
    lines = [view((kind, "word")).text().splitlines()[0] for kind in kinds]
    assert lines == ["word", "{+word+}", "{*word*}", "[-word-]", "[~word~]"]
    elements = [re.search('7"><([a-z]+)', view((kind, "word"))._repr_html_())[1] for kind in kinds]
    assert len(set(elements)) == len(kinds)
    colored = [view((kind, "word")).text(color=True).splitlines()[0] for kind in kinds]
    assert len(set(colored)) == len(kinds)
    # A background of ours has a text of ours, and colours end where the text does.
    assert all(("48;5;" in line) == ("38;5;16" in line) and line.endswith("\x1b[0m") for line in colored)


def test_marks_in_a_text_are_no_marks_and_line_feeds_are_seen():
    assert view((Kind.ACCEPTED, "a[-1:] {*p} x+]")).text().splitlines()[0] == r"a[\-1:] {\*p} x+\]"
    shown = view((Kind.REJECTED, "\n\n"), (Kind.CORRECTION, "\n")).text().split("\n\n")[0]
    assert shown == "[-\\n\\n-]{+\\n\n+}"


def test_acceptance_by_position_stands_below():
    lines = view((Kind.ACCEPTED, "word")).text().splitlines()
    assert lines[-2].split() == ["draft", "1", "###############.....", "75%", "3", "of", "4", "accepted"]
    assert lines[-1].split()[:2] == ["draft", "2"]
    assert "1 of 4 accepted" in view((Kind.ACCEPTED, "word"))._repr_html_()
