"""Prefix reuse: what prompts have in common is read once, and nobody's tokens, nor a bit of the cache, change by it."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from qspec_jax import SamplingParams
from qspec_jax.decoding import chunks
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.engine import requests
from qspec_jax.engine.intake import Intake
from qspec_jax.engine.prefixes import HeldChunks, NextChunk
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.model.cache import KV_INT8, KV_OF_MODEL, restart_multiple
from tests import tiny

ROWS, CAPACITY = 3, 128
PREFIX, OTHER = [*range(40, 70)], [*range(20, 82)]  # of 30 tokens, two chunks, and of 62, four
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=1.0, frequency_penalty=0.4, repetition_penalty=1.5, seed=7),
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(stop_token_ids=(27, 39)),
]


@pytest.fixture(autouse=True)
def _narrow_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (8, 16))
    monkeypatch.setattr(requests, "LEAST_SAVED", 8)


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


def asked(index, prefix, *, length=None, new_tokens=None):
    """A request behind a prefix."""
    rng = random.Random(index)
    own = [rng.randrange(96) for _ in range(length or rng.choice((1, 5, 9, 20)))]
    limit = new_tokens or rng.choice((1, 9, 30))
    return Request([*prefix, *own], limit, SAMPLING[index % 5], prefix_length=len(prefix))


def scheduler_of(model, mode="qspec", **options):
    """Whose programs are the same for all, whatever a test's requests need."""
    scheduler = Scheduler(model.programs, model.plan(mode, draft="w4a8"), rows=ROWS, capacity=CAPACITY, **options)
    scheduler.expect((), SamplingFeatures.of(SAMPLING))
    return scheduler


def finish(scheduler, wanted):
    """The tokens of each request."""
    sequences = [scheduler.add(one) for one in wanted]
    while scheduler.busy:
        scheduler.advance(4)
    return [sequence.token_ids for sequence in sequences]


def alone(model, wanted, mode="qspec"):
    """What each yields where nothing is reused."""
    scheduler, yielded = scheduler_of(model, mode), []
    for one in wanted:
        scheduler._rows.held = HeldChunks(ROWS)
        yielded += finish(scheduler, [one])
    assert scheduler.totals.reused_prompt_tokens == 0
    return yielded


@pytest.mark.parametrize("mode", ["qspec", "lookup-qspec"])
def test_a_shared_prefix_is_read_once_and_changes_no_token(model, mode):
    wanted = [asked(index, PREFIX) for index in range(12)]
    scheduler = scheduler_of(model, mode)
    assert finish(scheduler, wanted) == alone(model, wanted, mode)
    totals = scheduler.totals
    assert totals.reused_prompt_tokens == 11 * len(PREFIX)
    assert totals.computed_prompt_tokens == sum(len(one.token_ids) for one in wanted) - 11 * len(PREFIX)
    if scheduler._state.history is not None:
        for row, chunks in zip(np.asarray(scheduler._state.history), scheduler._rows.held._held, strict=True):
            prompt = [token for _, tokens in chunks for token in tokens]
            assert row[: len(prompt)].tolist() == prompt


def test_several_prefixes_at_once_change_no_token(model, monkeypatch):
    wanted = [asked(index, (PREFIX, OTHER, [])[index % 3]) for index in range(18)]
    expected = alone(model, wanted)
    for seed in (None, 1, 2):
        order = list(range(18))
        if seed is not None:
            random.Random(seed).shuffle(order)
        # With bursts between the chunks of a prompt, or all of them one after another.
        scheduler = scheduler_of(model, serves=seed == 1)
        assert finish(scheduler, [wanted[index] for index in order]) == [expected[index] for index in order]
        assert scheduler.totals.reused_prompt_tokens > 2.9 * (len(PREFIX) + len(OTHER))


@pytest.mark.contract
def test_the_cache_has_the_bits_that_it_would_have_without_reuse():
    """In bfloat16, where a sum in another order is another number."""
    model = tiny.language_model(dtype="bfloat16")
    wanted = [
        dataclasses.replace(asked(index, PREFIX, length=(10, 16, 25)[index], new_tokens=9), sampling=SamplingParams())
        for index in range(ROWS)
    ]

    def run(order):
        """The tokens of each request, and the bits of its row."""
        scheduler = Scheduler(model.programs, model.plan("w4a16"), rows=ROWS, capacity=CAPACITY)
        tokens = finish(scheduler, [wanted[index] for index in order])
        layers = jax.tree.map(lambda a: np.asarray(a).view(np.uint16), scheduler._state.cache.layers)
        ends = [len(wanted[index].token_ids) + len(ids) - 1 for index, ids in zip(order, tokens, strict=True)]
        bits = [jax.tree.leaves(jax.tree.map(lambda a: a[:, row, :end], layers)) for row, end in enumerate(ends)]  # noqa: B023
        return tokens, bits, scheduler.totals.reused_prompt_tokens

    tokens, bits, reused = run(range(ROWS))
    assert reused == 2 * len(PREFIX)
    for index in range(ROWS):
        own_tokens, own_bits, reused = run([index])
        assert reused == 0
        assert own_tokens == [tokens[index]]
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, own_bits[0], bits[index])))


def test_penalties_know_the_tokens_of_a_reused_prefix(model):
    """Half of all tokens are in the prefix, and none of them may come again."""
    prefix = [*range(0, 96, 2)]
    wanted = [
        Request([*prefix, 1], 8, SamplingParams(repetition_penalty=penalty), prefix_length=len(prefix))
        for penalty in (1.0, 1e6, 1.0, 1e6)
    ]
    scheduler = scheduler_of(model)
    got = finish(scheduler, wanted)
    assert scheduler.totals.reused_prompt_tokens == 3 * len(prefix)
    assert got == alone(model, wanted)
    assert not set(got[1]) & {*prefix, 1}
    assert set(got[0]) & {*prefix, 1}


def test_a_row_that_was_filled_again_is_no_holder(model):
    scheduler = scheduler_of(model)
    wanted = [asked(index, prefix) for index, prefix in enumerate([PREFIX, *[[]] * ROWS, PREFIX, PREFIX])]
    finish(scheduler, wanted[:1])
    finish(scheduler, wanted[1 : 1 + ROWS])
    got = finish(scheduler, wanted[-2:-1])
    assert scheduler.totals.reused_prompt_tokens == 0
    got += finish(scheduler, wanted[-1:])
    assert scheduler.totals.reused_prompt_tokens == len(PREFIX)
    assert got == alone(model, wanted[-2:])


def test_a_prompt_prefers_the_row_that_holds_its_beginning(model):
    scheduler, prefixes = scheduler_of(model), (PREFIX, OTHER, [*range(16)])
    for index in range(9):
        finish(scheduler, [asked(index, prefixes[index % 3])])
    assert scheduler.totals.reused_prompt_tokens == 2 * sum(map(len, prefixes))


def test_a_cancelled_holder_still_holds_what_it_has_read(model):
    scheduler = scheduler_of(model, serves=True)
    wanted = [asked(index, OTHER, new_tokens=30) for index in range(3)]
    cancelled = scheduler.add(wanted[0])
    scheduler.advance(1)
    scheduler.advance(1)
    assert cancelled.num_read == 2 < len(cancelled.chunks)
    scheduler.cancel(cancelled)
    assert finish(scheduler, wanted[1:]) == alone(model, wanted[1:])
    assert scheduler.totals.reused_prompt_tokens == 32 + 62


def test_a_holder_that_ended_early_or_goes_on_serves_as_well(model):
    """The first ends with a stop token of its own, the second is at it while the others enter."""
    rows = [asked(0, PREFIX, new_tokens=30), *(asked(index, PREFIX, new_tokens=40) for index in (1, 2, 3))]
    expected = alone(model, rows)
    stop = SamplingParams(stop_token_ids=(expected[0][3],))
    scheduler = scheduler_of(model)
    ended = finish(scheduler, [dataclasses.replace(rows[0], sampling=stop)])[0]
    assert ended == expected[0][: len(ended)]
    assert len(ended) <= 4
    assert finish(scheduler, rows[1:]) == expected[1:]
    assert scheduler.totals.reused_prompt_tokens == 3 * len(PREFIX)


def test_reuse_compiles_nothing(model):
    finish(scheduler_of(model), [asked(index, [], length=20) for index in range(5)])
    before = model.num_compilations
    finish(scheduler_of(model), [asked(index, PREFIX) for index in range(5)])
    assert model.num_compilations == before


def test_long_common_beginnings_are_shared_without_a_word(model):
    wanted = [Request([*OTHER, index], 4, SamplingParams()) for index in range(4)]
    scheduler = scheduler_of(model)
    assert finish(scheduler, wanted) == alone(model, wanted)
    assert scheduler.totals.reused_prompt_tokens == 3 * 48


@pytest.mark.parametrize(
    ("length", "prefix_length", "starts"),
    [
        (40, 0, [0, 16, 32]),
        (40, 30, [0, 16, 30]),  # two chunks of 16 and one of 8 become one of 16
        (40, 32, [0, 16, 32]),  # whole chunks need no cut
        (46, 33, [0, 16, 32]),  # nor is one made where no width is saved
        (46, 46, [0, 16, 32]),
        (13, 12, [0, 12]),
    ],
)
def test_where_a_prompt_is_cut_depends_on_itself_alone(length, prefix_length, starts):
    request = Request(list(range(length)), 1, SamplingParams(), prefix_length=prefix_length)
    chunks = request.chunks()
    assert [start for start, _ in chunks] == starts
    assert [token for _, tokens in chunks for token in tokens] == list(range(length))


def test_prompts_share_what_rows_of_any_cache_can_go_on_from(model, monkeypatch):
    monkeypatch.undo()
    multiple = restart_multiple(KV_INT8)
    assert chunks.CHUNK_WIDTHS[-1] % multiple == 0
    tokenizer: Any = SimpleNamespace(system_length=lambda messages, ids: 200, apply_chat=lambda messages: [1] * 250)
    for kv, expected in ((KV_OF_MODEL, 200), (KV_INT8, 128)):
        intake = Intake(model.config, tokenizer, (), "tiny", restart_multiple(kv))
        request = intake.request([{"role": "user", "content": "a"}], max_new_tokens=1)
        assert request.prefix_length == expected


def test_a_short_prefix_makes_no_second_piece(monkeypatch):
    monkeypatch.undo()

    def cut(prefix_length, rest):
        request = Request([1] * (prefix_length + rest), 1, SamplingParams(), prefix_length=prefix_length)
        return [len(tokens) for _, tokens in request.chunks()]

    assert cut(20, 30) == [50]
    assert cut(100, 150) == [250]
    assert cut(100, 60) == [100, 60]
    assert cut(700, 60) == [512, 188, 60]
    assert cut(512, 60) == [512, 60]


class Rows:
    """What a device would hold: of each row, the tokens by position and the chunks they were read in."""

    def __init__(self, count):
        self.rows = [[] for _ in range(count)]

    def read(self, following, chunks):
        """Reads a chunk, of the same prompt's beginning or else wrongly."""
        start, tokens = chunks[following.index]
        held = [entry for entry in self.rows[following.source] if entry[0] < start]
        assert held == [
            (at + place, at, token) for at, chunk in chunks[: following.index] for place, token in enumerate(chunk)
        ]
        self.rows[following.row] = held + [(start + place, start, token) for place, token in enumerate(tokens)]


@pytest.mark.parametrize("seed", range(20))
def test_a_row_reads_from_one_that_holds_its_beginning_whatever_is_done_first(seed):
    rng = random.Random(seed)
    count = rng.choice((1, 2, 5))
    device, held, prompts, num_read = Rows(count), HeldChunks(count), {}, {}
    for _ in range(200):
        prompts = {row: chunks for row, chunks in prompts.items() if rng.random() < 0.7}  # some end, or are cancelled
        while len(prompts) < count and rng.random() < 0.7:
            chunks = [(3 * place, [rng.randrange(2)] * 3) for place in range(rng.randrange(1, 5))]
            row = held.room_for(chunks, [row for row in range(count) if row not in prompts])
            prompts[row], num_read[row] = chunks, 0
        left = {row: chunks for row, chunks in prompts.items() if num_read[row] < len(chunks)}
        while left:
            next_chunks, later = held.plan(left)
            assert sorted([*later, *(one.row for one in next_chunks)]) == sorted(left)
            assert next_chunks
            rng.shuffle(next_chunks)
            for one in next_chunks:
                assert num_read[one.row] <= one.index
                device.read(one, left[one.row])
                held.note(one.row, left[one.row][: one.index + 1])
                num_read[one.row] = one.index + 1
            left = {row: left[row] for row in later}


def test_of_rows_that_begin_alike_one_reads_and_the_others_follow():
    held = HeldChunks(4)
    common = [(0, [1, 2]), (2, [3, 4])]
    reading = {row: [*common, (4, [row])] for row in range(3)}
    next_chunks, later = held.plan(reading)
    assert (next_chunks, later) == ([NextChunk(0, 0, 0)], [1, 2])
    held.note(0, common[:1])
    next_chunks, later = held.plan({row: reading[row] for row in later})
    assert (next_chunks, later) == ([NextChunk(1, 0, 1)], [2])
    held.note(1, common)
    assert held.plan({2: reading[2]}) == ([NextChunk(2, 1, 2)], [])


def test_a_row_is_chosen_in_one_look_at_each():
    """64 requests that come together were 50 ms of asking every row of every row."""

    class Rows(list):
        def __contains__(self, row):
            raise AssertionError("looked through once more")

    held = HeldChunks(8, 2)
    held.note(5, [(0, [1, 2]), (2, [3])])
    assert held.room_for([(0, [1, 2]), (2, [9])], Rows([0, 4, 6])) in (4, 6)
    assert held.room_for([(0, [7]), (1, [9])], Rows([6, 0, 1])) in (0, 1)  # whose device has most idle rows
