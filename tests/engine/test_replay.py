"""What lookup would have drafted, told by texts alone: the same as the device drafts."""

from __future__ import annotations

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax import SamplingParams
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.costs import CostTable, PassBytes
from qspec_jax.decoding.lookup import look_up
from qspec_jax.decoding.plan import AutoPlan, DecodingPlan, Lookup
from qspec_jax.decoding.programs import Programs
from qspec_jax.engine.choosing import Choosing
from qspec_jax.engine.replay import Replay, looked_up
from qspec_jax.engine.requests import Request
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.model.view import View

PLAIN = DecodingPlan(View())
LOOKUP = DecodingPlan(View(), Lookup(), 3)


@pytest.mark.parametrize("words", [2, 5, 40])
def test_the_host_finds_what_the_device_proposes(words):
    """At every place of a text: repeated at once, found once, or nowhere; what comes behind is not read."""
    text = np.random.default_rng(words).integers(0, words, 60).astype(np.int32)
    newest = np.arange(len(text))
    _, drafts = look_up(jnp.tile(text, (len(text), 1)), jnp.asarray(newest, jnp.int32), draft_length=5)
    behind = np.append(text, np.zeros(9, np.int32))
    np.testing.assert_array_equal(drafts, [looked_up(behind, place, 5) for place in range(len(text))])


def test_cycles_are_run_once_whatever_comes_at_a_time():
    text = np.tile([7, 8, 9, 1, 2, 3], 20).tolist()
    prompt, new = text[:10], [*text[10:60], 99, *text[61:]]
    whole = Replay(prompt, len(new)).go_on(new, 3, most=99)
    # 50 tokens that repeat, one that does not, and after it the same again once it is behind.
    assert whole[3] * 4 >= len(new) - 12
    assert sum(whole[:3]) > 0
    parts = Replay(prompt, len(new))
    counts = np.sum([parts.go_on(new[:end], 3, most=99) for end in range(1, len(new) + 1)], axis=0)
    assert counts.tolist() == whole


def test_there_are_no_more_cycles_than_are_asked_for_and_none_of_tokens_that_lookup_yielded():
    tokens = [1, 2, 3, 4] * 10
    replay = Replay([1, 2, 3, 4], len(tokens))
    assert sum(replay.go_on(tokens[:30], 3, most=2)) == 2
    assert sum(replay.go_on(tokens[:34], 3, most=9)) == 1
    replay.skip(tokens)
    assert sum(replay.go_on(tokens, 3, most=9)) == 0


class Compiled(Programs):
    """Programs of which nobody runs one."""

    def __init__(self, costs):
        self._lock, self._costs = threading.RLock(), costs

    def lay_out_weights(self, plan):
        pass

    def has_loop(self, plan, shape):
        return True


def test_tokens_count_alike_however_few_cycles_take_them(monkeypatch):
    """One text repeats itself, one never does: 4 tokens take lookup 1 cycle or 4, and 8 tokens of both take 5."""
    plan, costs = AutoPlan("auto", (PLAIN, LOOKUP)), CostTable(PassBytes(1000, 10))
    shape = Shape.of(plan, rows=2, capacity=64)
    options = {"burst_s": 0.5, "serves": False, "on_event": print}
    choosing = Choosing(Compiled(costs), plan, shape, **options)
    texts = [[1, 2, 3, 4] * 10, list(range(10, 50))]
    running = [RunningSequence(Request(text[:4], 56, SamplingParams())) for text in texts]
    for one, text in zip(running, texts, strict=True):
        one.receive(text[4:], finished=False, made_s=0.0)
    told = []
    monkeypatch.setattr(choosing._chooser, "note_replayed", lambda _, histogram: told.append(histogram))
    choosing.received(PLAIN, running)
    (cycles,) = told
    assert np.dot(cycles, [1, 2, 3, 4]) / sum(cycles) == pytest.approx(8 / 5)
    assert sum(cycles) == pytest.approx(9 + 33)  # as many as were run
    assert running[0].drafts["lookup"][1][1] > 0
    assert running[1].drafts["lookup"][1] == (0.0, 0.0)
    # Nothing is told twice, and nothing of what lookup has yielded.
    choosing.received(PLAIN, running)
    for one in running:
        one.receive([1, 2, 3, 4] * 5, finished=False, made_s=0.0)
    choosing.received(LOOKUP, running)
    choosing.received(PLAIN, running)
    assert told == [cycles]
