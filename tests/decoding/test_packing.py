"""Chunks of several prompts in one pass: how they are cut, and everybody gets the tokens of a pass of their own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from qspec_jax.decoding import chunks, packing
from qspec_jax.decoding.chunks import CHUNK_WIDTHS, Shape
from qspec_jax.decoding.packing import PIECE, pack, sizes
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.prefixes import NextChunk
from qspec_jax.engine.reading import passes, with_more
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.view import Precision, View
from tests import tiny

CONFIG = dataclasses.replace(ModelConfig.from_hf(tiny.BASE_HF_CONFIG), max_position_embeddings=1024)
CAPACITY = 640
RANDOM = np.random.default_rng(0)


def prompt(length: int) -> list[int]:
    return RANDOM.integers(1, CONFIG.vocab_size, length).tolist()


SYSTEM = prompt(520)
SAMPLED = {"temperature": 0.8, "seed": 7}
# Lengths on both sides of a piece, more than a chunk, and prompts that begin alike: rows are copied for them.
GREEDY = [Request(prompt(length), 8, SamplingParams()) for length in (5, PIECE, PIECE + 1, 100, 1)]
ALIKE = [Request([*SYSTEM, *prompt(length)], 6, SamplingParams(**SAMPLED), prefix_length=520) for length in (3, 40, 7)]
# One that samples comes first: the programs of the others are the same.
REQUESTS = [Request(prompt(70), 8, SamplingParams(**SAMPLED)), *GREEDY, *ALIKE]
FEATURES = [
    Request(prompt(40), 6, SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5)),
    Request(prompt(35), 6, SamplingParams(logprobs=2)),
    Request(prompt(64), 6, SamplingParams(logit_bias={5: 4.0}, min_new_tokens=3)),
]


SIZES = packing._SIZES


@pytest.fixture(autouse=True)
def fewer_sizes(monkeypatch):
    """Each is a program, and what is read does not depend on how many there are."""
    monkeypatch.setattr(packing, "_SIZES", (2, 8, 64))


@functools.cache
def model_that_reads(packed: bool | None, longest: int | None):
    """One for all tests that read alike: they share programs."""
    model = tiny.language_model(CONFIG)
    model.programs.packing, model.programs._laid_out.longest_packed = packed, longest
    return model


def served(
    requests,
    mode: str,
    *,
    packed: bool | None,
    rows: int = 4,
    together: bool = True,
    longest: int | None = None,
    **options,
):
    """The sequences of some requests, all at once or one after the other, and their scheduler."""
    model = model_that_reads(packed, longest)
    plan = model.plan(mode, **options)
    scheduler = Scheduler(model.programs, plan, rows=rows, capacity=CAPACITY)
    sequences = []
    for request in requests:
        sequences.append(scheduler.add(request))
        while not together and scheduler.busy:
            scheduler.advance()
    scheduler.compile()
    compiled = model.programs.num_compilations
    while scheduler.busy:
        scheduler.advance()
    assert not together or model.programs.num_compilations == compiled
    return sequences, scheduler


def tokens(sequences) -> list[list[int]]:
    return [one.token_ids for one in sequences]


def of(expected, requests) -> list[list[int]]:
    return [expected[tuple(request.token_ids)] for request in requests]


@pytest.fixture(scope="module")
def one_by_one():
    """What each request yields, by itself, where each chunk has a pass, and the row to itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_WIDTHS", CHUNK_WIDTHS[-1:])  # fewer programs
        sequences, _ = served(REQUESTS, "w4a16", packed=False, together=False)
    return {tuple(one.request.token_ids): one.token_ids for one in sequences}


@pytest.mark.parametrize(
    ("mode", "options", "some_sizes"),
    [("qspec", {}, (2, 8, 64)), ("lookup", {}, (64,)), ("qspec", {"draft_context": 128}, (64,))],
    ids=["qspec", "lookup", "blocks"],
)
def test_prompts_that_are_read_together_yield_what_they_yield_alone(one_by_one, mode, options, some_sizes, monkeypatch):
    monkeypatch.setattr(packing, "_SIZES", some_sizes)
    sequences, scheduler = served(REQUESTS, mode, packed=True, **options)
    assert tokens(sequences) == of(one_by_one, REQUESTS)
    assert scheduler.totals.reused_prompt_tokens == 2 * 512
    kinds = {key[0] for key in scheduler._programs.compiled}
    assert kinds == {"pieces", "loop"}
    for row in [] if (history := scheduler._state.history) is None else np.asarray(history).tolist():
        texts = [[*one.request.token_ids, *one.token_ids] for one in sequences]
        assert any(row[: len(text)] == text for text in texts), "drafts would be looked up in another text"


def test_a_row_is_copied_beside_prompts_that_are_read_from_the_beginning(one_by_one):
    """The prompt that is read from the beginning has come first."""
    model = model_that_reads(True, None)
    scheduler = Scheduler(model.programs, model.plan("w4a16"), rows=4, capacity=CAPACITY)
    scheduler.add(dataclasses.replace(ALIKE[0], max_new_tokens=20))
    while not scheduler._rows.decoding():
        scheduler.advance(1)
    sequences = [scheduler.add(request) for request in (GREEDY[3], ALIKE[1])]
    while scheduler.busy:
        scheduler.advance()
    assert tokens(sequences) == of(one_by_one, (GREEDY[3], ALIKE[1]))
    assert scheduler.totals.reused_prompt_tokens == 512


def test_a_prompt_alone_is_read_as_it_is_beside_others(one_by_one):
    alone, _ = served(REQUESTS, "w4a16", packed=True, rows=1, together=False)
    assert tokens(alone) == of(one_by_one, REQUESTS)


def test_pieces_see_no_more_than_a_window():
    hf = {**tiny.BASE_HF_CONFIG, **tiny.FAMILIES["mistral_sliding_window"], "sliding_window": 40}
    decoder, tokens = tiny.decoder(ModelConfig.from_hf({**hf, "num_hidden_layers": 1})), prompt(70)
    pieces = pack([(1, 0, tokens)], rows=2, capacity=128).pieces
    places = {"rows": pieces.rows[:3], "starts": pieces.starts[:3], "ends": pieces.ends[:1]}

    @jax.jit
    def both(in_pieces, places, whole):
        cache = decoder.create_cache(batch=2, capacity=128)
        found, _ = decoder.read_pieces(in_pieces, cache, **places, view=View())
        return found[0, 0], decoder(whole, cache, precision=View())[0][1, -1]

    found, expected = both(pieces.tokens[:3], places, np.asarray([tokens, tokens], np.int32))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_sampling_needs_of_prompts_is_there(monkeypatch):
    monkeypatch.setattr(packing, "_SIZES", (8,))
    expected, found = (served(FEATURES, "w4a16", packed=packed)[0] for packed in (False, True))
    assert tokens(found) == tokens(expected)
    np.testing.assert_allclose(found[1].logprobs, expected[1].logprobs, atol=1e-5)


def test_a_prompt_of_another_would_be_noticed(one_by_one, monkeypatch):
    """Pieces that attend to the row of somebody else."""
    monkeypatch.setattr(packing, "_SIZES", (8,))
    assert tokens(served(GREEDY, "w4a16", packed=True)[0]) == of(one_by_one, GREEDY)
    right = packing.pack

    def wrong(chunks, **sizes):
        packed = right(chunks, **sizes)
        packed.pieces.rows[packed.pieces.rows >= 0] ^= 1
        return packed

    monkeypatch.setattr(packing, "pack", wrong)
    assert tokens(served(GREEDY, "w4a16", packed=True)[0]) != of(one_by_one, GREEDY)


def test_chunks_are_cut_into_pieces():
    chunks = [(3, 0, range(70)), (0, 512, range(100, 132)), (1, 5, [7])]
    packed = pack(chunks, rows=4, capacity=CAPACITY)
    pieces = packed.pieces
    assert packed.places == [0, 1, 2]
    assert pieces.rows.tolist() == [3, 3, 3, 0, 1, -1, -1, -1]
    assert pieces.starts[:5].tolist() == [0, 32, 64, 512, 5]
    assert pieces.num_tokens.tolist() == [32, 32, 6, 32, 1, 0, 0, 0]
    assert pieces.tokens[2].tolist() == [*range(64, 70), *[0] * 26]
    assert pieces.ends[:3].tolist() == [2 * PIECE + 5, 4 * PIECE - 1, 4 * PIECE]


def test_pieces_are_those_of_one_device_after_the_other():
    """Each has as many rows, and as many pieces as the one that needs most of them."""
    chunks = [(4, 0, range(70)), (1, 32, range(40)), (5, 0, [7]), (4, 70, [8])]
    packed = pack(chunks, rows=6, capacity=CAPACITY, num_devices=3)
    pieces = packed.pieces
    assert packed.places == [0, 1, 2, 3]
    assert pieces.rows.reshape(3, 8).tolist() == [[1, 1, *[-1] * 6], [-1] * 8, [4, 4, 4, 5, 4, *[-1] * 3]]
    assert pieces.starts.reshape(3, 8)[2, :5].tolist() == [0, 32, 64, 0, 70]
    assert pieces.ends[:4].tolist() == [18 * PIECE + 5, PIECE + 7, 19 * PIECE, 20 * PIECE]
    full = pack([(row, 0, range(512)) for row in (0, 1, 2, 3, 4, 12)], rows=16, capacity=CAPACITY, num_devices=2)
    assert full.places == [0, 1, 2, 3, 5]  # the second one has room, and not for a row of the first


def test_what_does_not_fit_is_left_for_another_pass():
    chunks = [(row, 0, range(500)) for row in range(5)]
    assert pack(chunks, rows=8, capacity=CAPACITY).places == [0, 1, 2, 3]
    assert pack(chunks[:1], rows=1, capacity=CAPACITY).places == [0]


@pytest.mark.parametrize(
    ("needed", "expected"),
    [([16, 16, 16, 14, 16, 1, 2], [0, 1, 2, 3, 5]), ([16, 16, 16, 16, 1], [0, 1, 2, 3]), ([1], [0])],
)
def test_what_is_left_of_a_pass_goes_to_later_chunks(needed, expected):
    packed = pack([(row, 0, range(PIECE * count)) for row, count in enumerate(needed)], rows=64, capacity=512)
    assert packed.places == expected
    read = [row for row in dict.fromkeys(packed.pieces.rows.tolist()) if row >= 0]
    assert read == expected


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (512, [(0, [5, 7, 0, 1, 3, 6]), (0, [2, 4])]),  # copies of rows come first in a pass
        (256, [(0, [5, 3, 6]), (512, [0, 1, 2, 4, 7])]),
        (0, [(64, [6]), (128, [3]), (256, [5]), (512, [0, 1, 2, 4, 7])]),
    ],
)
def test_each_chunk_is_read_once(longest, expected):
    lengths = [500, 500, 500, 100, 400, 256, 40, 500]
    chunks = [(NextChunk(row, 9 if row in (5, 7) else row, 0), (0, range(count))) for row, count in enumerate(lengths)]
    read = passes(chunks, rows=8, capacity=CAPACITY, longest_packed=longest)
    assert [(some.width, [one.row for one in some.chunks]) for some in read] == expected


def one_prompt(*lengths):
    """Chunks of a prompt."""
    starts = [sum(lengths[:count]) for count in range(len(lengths))]
    return [(start, tuple(range(start, start + length))) for start, length in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize(
    ("prompts", "begun", "room", "most", "longest", "expected"),
    [
        ([(512, 512, 512, 512, 100)], [0], 64, 99, 512, [4]),  # as many as a pass has room for
        ([(512, 512, 512, 100)], [1], 64, 99, 512, [3]),  # with the last one
        ([(512, 512, 512, 512)], [0], 16, 99, 512, [1]),
        ([(512,) * 4, (512,) * 4], [0, 0], 64, 99, 512, [2, 2]),
        ([(512,) * 4, (512, 40), (20,)], [0, 0, 0], 64, 99, 512, [2, 2, 1]),
        ([(512,) * 4, (512,) * 4], [0, 0], 64, 1, 512, [2, 1]),  # others wait
        ([(512,) * 4, (512,) * 4], [0, 0], 64, 0, 512, [1, 1]),
        ([(512,) * 4] * 4, [0] * 4, 64, 99, 512, [1] * 4),  # a full pass already
        ([(512,) * 4] * 5, [0] * 5, 64, 99, 512, [2, 2, 2, 1, 1]),  # the second of two passes has room
        ([(500, 512, 512)], [0], 64, 99, 512, [1]),  # a prefix ends within a piece
        ([(480, 512, 512)], [0], 64, 99, 512, [3]),
        ([(200, 512)], [0], 64, 99, 256, [1]),  # the next one shares no pass
        ([(512, 200)], [0], 64, 99, 256, [1]),  # nor does this one
        ([(512, 512)], [0], 64, 99, 0, [1]),
    ],
)
def test_a_pass_that_has_room_takes_more_of_the_same_prompts(prompts, begun, room, most, longest, expected):
    of_rows = {row: one_prompt(*lengths) for row, lengths in enumerate(prompts)}
    next_chunks = [NextChunk(row, row, index) for row, index in enumerate(begun)]
    found = with_more(next_chunks, of_rows, room=room, most=most, longest_packed=longest, rows_of_device=5)
    assert [one.count for one in found] == expected
    for one in found:
        start, tokens = one.text(of_rows[one.row])
        assert start == of_rows[one.row][one.index][0]
        assert list(tokens) == list(range(start, start + len(tokens)))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_long_prompt_alone_is_read_in_as_few_passes_as_hold_it(rows, one_by_one, monkeypatch):
    """Its chunks stay what they are: others may copy some of them."""
    model, sizes_of_passes = model_that_reads(True, None), []
    scheduler = Scheduler(model.programs, model.plan("w4a16"), rows=rows, capacity=CAPACITY)
    read_pieces = model.programs.read_pieces

    def noting(plan, shape, state, pieces, *others):
        sizes_of_passes.append(int((np.asarray(pieces.rows) >= 0).sum()))
        return read_pieces(plan, shape, state, pieces, *others)

    monkeypatch.setattr(model.programs, "read_pieces", noting)
    read, note = [], scheduler._pace.note_reading
    monkeypatch.setattr(
        scheduler._pace, "note_reading", lambda *, chunks, **k: (read.append(chunks), note(chunks=chunks, **k))
    )
    long = scheduler.add(ALIKE[0])
    while scheduler.busy:
        scheduler.advance()
    assert tokens([long]) == of(one_by_one, ALIKE[:1])
    assert [len(ids) for _, ids in ALIKE[0].chunks()] == [512, 11]
    assert sizes_of_passes == [17]
    other = scheduler.add(ALIKE[1])
    while scheduler.busy:
        scheduler.advance()
    assert tokens([other]) == of(one_by_one, ALIKE[1:2])
    assert sizes_of_passes == [17, 2]  # of 48 tokens behind the 512 that a row holds
    assert scheduler.totals.reused_prompt_tokens == 512
    assert read == [2, 1]  # chunks that took time: what is copied takes none


@pytest.mark.parametrize(
    ("rows", "capacity", "expected"),
    [
        (64, 640, (2, 8, 16, 32, 64)),
        (1, 8192, (2, 8, 16, 32, 64)),
        (1, 640, (2, 8, 16, 20)),
        (1, 64, (2,)),
        (2, 256, (2, 8, 16)),
    ],
)
def test_no_pass_is_larger_than_what_rows_hold(rows, capacity, expected, monkeypatch):
    monkeypatch.setattr(packing, "_SIZES", SIZES)
    assert sizes(rows, capacity) == expected


@pytest.mark.parametrize(
    ("widths", "rows", "expected"),
    [
        ((32, 256), 1, (2, 8, 16)),
        ((32, 512), 1, (2, 8, 16, 32, 64)),  # such a prompt may have more chunks
        ((256,), 3, (2, 8, 16, 32, 64)),  # of 48 pieces a pass has 64
        ((256,), 64, (2, 8, 16, 32, 64)),
    ],
)
def test_programs_for_several_chunks_of_a_prompt_wait_for_one_that_has_them(widths, rows, expected, monkeypatch):
    monkeypatch.setattr(packing, "_SIZES", SIZES)
    assert packing.sizes_for(widths, rows, 4096) == expected


def test_a_number_of_pieces_that_has_no_program_is_an_error(monkeypatch):
    """It was compiled for ever, as nothing is compiled for it."""
    model = tiny.language_model(CONFIG)
    model.programs.packing, plan, shape = True, model.plan("w4a16"), Shape(1, CAPACITY)
    asked: list = []
    monkeypatch.setattr(Programs, "compile", lambda self, *given: asked.append(given) or (len(asked) > 1 and 1 / 0))
    with pytest.raises(ValueError, match="no program 'pieces' of size 3 is compiled for Shape"):
        model.programs._program(("pieces", plan.verify, shape, 3), plan, shape, (CAPACITY,))
    assert len(asked) == 1


def test_a_program_that_nobody_foresaw_is_compiled_when_it_is_needed(one_by_one, monkeypatch):
    monkeypatch.setattr(packing, "_SIZES", (16, 64))  # of which 16 pieces hold a prompt of one chunk
    model = tiny.language_model(CONFIG)
    model.programs.packing = True
    scheduler = Scheduler(model.programs, model.plan("w4a16"), rows=1, capacity=CAPACITY)
    short, long = scheduler.add(REQUESTS[0]), None
    while scheduler.busy:
        scheduler.advance()
        if long is None and not scheduler.busy:
            before = model.programs.num_compilations
            long = scheduler.add(ALIKE[0])
    assert tokens([short, long]) == of(one_by_one, (REQUESTS[0], ALIKE[0]))
    assert model.programs.num_compilations == before + 1


@pytest.mark.parametrize(
    ("longest", "widths", "kinds"),
    [
        (0, (64, 512), {64, 512}),
        (256, (64, 512), {"pieces", 512}),
        (CHUNK_WIDTHS[-1], (64, 512), {"pieces"}),
        (256, (512,), {512}),
        (256, (), set()),
    ],
)
def test_programs_are_those_of_the_chunks(longest, widths, kinds):
    programs, plan = Programs(tiny.decoder(CONFIG)), DecodingPlan(Precision.W4A16)
    programs._laid_out.longest_packed = longest
    wanted = programs._wanted([plan], Shape.of(plan, rows=2, capacity=CAPACITY), widths)
    names = [name for name in wanted if name[0] != "loop"]
    assert {"pieces" if name[0] == "pieces" else name[-1] for name in names} == kinds


def test_long_chunks_may_be_read_alone(one_by_one, monkeypatch):
    """Which depends on their own length, so that a prompt has the same bits whoever comes with it."""
    monkeypatch.setattr(packing, "_SIZES", (8,))
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (64, 512))
    sequences, scheduler = served(REQUESTS, "w4a16", packed=None, longest=64)
    assert tokens(sequences) == of(one_by_one, REQUESTS)
    assert {key[0] for key in scheduler._programs.compiled} == {"pieces", "prefill", "loop"}


def test_nothing_asks_the_model_between_bursts(monkeypatch):
    """To go through its modules takes as long as reading several prompts."""
    model = tiny.language_model(CONFIG)
    scheduler = Scheduler(model.programs, model.plan("w4a16"), rows=2, capacity=CAPACITY)
    scheduler.add(GREEDY[0])
    scheduler.advance()

    def asked(*_, **__):
        raise AssertionError("the model was gone through")

    monkeypatch.setattr(packing, "longest_packed", asked)
    monkeypatch.setattr(nnx, "iter_modules", asked)
    monkeypatch.setattr(nnx, "split", asked)
    sequences = [scheduler.add(request) for request in (GREEDY[1], GREEDY[4])]
    while scheduler.busy:
        scheduler.advance()
    assert all(one.finished for one in sequences)


def test_a_cache_of_int8_reads_prompts_together(monkeypatch):
    """Blocks of keys that one pass completes, or begins; rows that are copied; and a long prompt of two chunks."""
    monkeypatch.setattr(packing, "_SIZES", (64,))
    requests = [*REQUESTS, Request(prompt(300), 20, SamplingParams()), Request(prompt(125), 8, SamplingParams())]
    model = tiny.language_model(CONFIG)
    model.decoder.kv = KV_INT8

    def run(packed, mode):
        model.programs.packing = packed
        scheduler = Scheduler(model.programs, model.plan(mode), rows=4, capacity=CAPACITY)
        sequences = [scheduler.add(request) for request in requests]
        while scheduler.busy:
            scheduler.advance()
        return tokens(sequences), scheduler.totals.reused_prompt_tokens

    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", CHUNK_WIDTHS[-1:])
    assert model.programs.longest_packed == 0, "no kernels for it"
    expected = run(None, "w4a16")
    assert expected[1] == 2 * 512
    assert run(True, "w4a16") == expected
    assert run(True, "qspec") == expected
