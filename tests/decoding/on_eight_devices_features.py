"""What requests can ask for, on meshes: run by ``test_on_mesh.py``, in a process with eight devices."""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.sharding import AxisType, Mesh

import pallas_kernels
import qspec_jax
from pallas_kernels import with_group_sums
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.bench import synthetic
from qspec_jax.bench.decode.measure import measure_parts
from qspec_jax.bench.decode.parts import Part, Setting, context_state
from qspec_jax.decoding import chunks, own_program, packing
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.device.mesh import make_mesh, shape_of
from qspec_jax.engine import requests, session
from qspec_jax.engine.prefixes import HeldChunks
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.errors import UsageError
from qspec_jax.evaluation.scores import logits_function
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.layouts import linears
from qspec_jax.model.precision import Precision
from qspec_jax.weights.checkpoint.restore import open_checkpoint
from tests import tiny
from tests.decoding.on_mesh import PROMPTS, model, tokens

MESH = "data=2,model=4"
BATCH = {"batch_size": 4, "max_new_tokens": 20, "max_seq_len": 64}


@pytest.fixture(scope="module")
def on_mesh():
    return model("smollm2_tied", MESH)


@pytest.fixture(scope="module")
def plain(on_mesh):
    return tokens(on_mesh.generate(PROMPTS, mode="w4a16", **BATCH))


def test_lookups_and_what_is_shown_of_drafts(on_mesh, plain):
    found = on_mesh.generate(PROMPTS, mode="lookup", keep_drafts=True, **BATCH)
    assert tokens(found) == plain
    for result in found:
        assert [token for cycle in result.drafts.cycles for token in cycle.tokens] == result.token_ids[1:]
    assert any(result.stats.acceptance_rate for result in found)


def test_drafts_that_read_part_of_the_cache(on_mesh, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (32,))
    options = {"batch_size": 2, "max_new_tokens": 24, "max_seq_len": 256}
    prompts = [[*range(30)] * 5, [*range(40, 70)] * 4]
    expected = tokens(on_mesh.generate(prompts, mode="w4a16", **options))
    drafted = on_mesh.generate(prompts, mode="qspec", draft="w4a8", draft_context=112, **options)
    assert tokens(drafted) == expected


def test_the_fastest_plan_is_chosen_and_changes_no_token(on_mesh, plain):
    assert tokens(on_mesh.generate(PROMPTS, mode="auto", draft="w4a8", **BATCH)) == plain


def test_scores_come_with_a_request_that_enters_beside_others(on_mesh, plain):
    pipeline = on_mesh.pipeline(on_mesh.plan("w4a16"), batch_size=4, max_seq_len=64)
    pipeline.submit(PROMPTS[0], max_new_tokens=20)
    pipeline._scheduler.advance(1)
    pipeline.submit(PROMPTS[1], max_new_tokens=20, sampling={"logprobs": 3})
    first, scored = pipeline.results()
    assert tokens([first, scored]) == plain[:2]
    text = jnp.asarray([[*PROMPTS[1], *scored.token_ids]], jnp.int32)
    logits = np.asarray(logits_function(model("smollm2_tied"), Precision.W4A16)(text))[0, len(PROMPTS[1]) - 1 : -1]
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.array(scored.token_ids)[:, None], 1)[:, 0]
    np.testing.assert_allclose(scored.logprobs, expected, atol=1e-3)


def test_logits_are_those_of_one_device(on_mesh):
    text = jnp.asarray([PROMPTS[1]], jnp.int32)
    together, alone = (
        np.asarray(logits_function(one, Precision.W4A16)(text)) for one in (on_mesh, model("smollm2_tied"))
    )
    np.testing.assert_allclose(together, alone, atol=2e-5 * np.abs(alone).max())


def test_drafts_with_zero_points_have_the_sums_of_each_devices_inputs():
    """Sums of other inputs would make drafts that are hardly accepted, and no token would tell."""
    on_mesh = model("llama2", "data=2,model=4", scan_layers=False)
    layer = on_mesh.decoder_for(on_mesh.plan(draft="w4a4")).layers[1]
    for linear in (layer.attention.qkv, layer.mlp.down):
        weight = linear.weight.get_value()
        for place in range(8):
            part = jax.tree.map(lambda array, place=place: np.asarray(array.addressable_shards[place].data), weight)
            expected = with_group_sums(jax.tree.map(jnp.asarray, dataclasses.replace(part, group_sum=None)), 32)
            np.testing.assert_array_equal(part.group_sum, expected.group_sum)


def test_a_conversation_grows(monkeypatch):
    """Its rows move into those of a larger cache, on the same devices."""
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (32,))
    monkeypatch.setattr(session, "_LEAST_CAPACITY", 64)
    on_mesh = model("llama2", "model=2", with_text=True)
    talk, options = on_mesh.session(), {"max_new_tokens": 30}
    first = talk.generate([*range(40, 60)], **options)
    again = talk.generate([*range(40, 60), *first.token_ids, *range(20)], **options)
    assert again.stats.reused_prompt_tokens == 20 + 30 - 1
    assert talk._scheduler.shape.capacity == 128
    fresh = [on_mesh.generate(result.prompt_token_ids, **options)[0] for result in (first, again)]
    assert tokens([first, again]) == tokens(fresh)


def test_prefixes_are_copied_from_rows_of_the_same_device_alone(on_mesh, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_WIDTHS", (16,))
    monkeypatch.setattr(requests, "LEAST_SAVED", 8)
    shared = [7, 3, 9, 1] * 4
    wanted = [Request([*shared, 20 + index, 5], 6 + index, SamplingParams(), prefix_length=16) for index in range(8)]

    def finish(scheduler, some):
        sequences = [scheduler.add(one) for one in some]
        while scheduler.busy:
            scheduler.advance(4)
        return [sequence.token_ids for sequence in sequences]

    plan = on_mesh.plan("w4a16")
    together, apart = (Scheduler(on_mesh.programs, plan, rows=4, capacity=64) for _ in range(2))
    yielded = finish(together, wanted)
    assert together.totals.reused_prompt_tokens == 6 * len(shared)  # all but the first one on each device
    for one, expected in zip(wanted, yielded, strict=True):
        apart._rows.held = HeldChunks(4, 2)
        assert finish(apart, [one]) == [expected]


def test_rows_are_a_multiple_of_the_devices_that_share_them(on_mesh, plain):
    assert tokens(on_mesh.generate(PROMPTS[:3], mode="w4a16", **{**BATCH, "batch_size": 3})) == plain[:3]
    assert Scheduler(on_mesh.programs, on_mesh.plan("w4a16"), rows=3, capacity=64).shape.rows == 4


def test_devices_stop_once_the_rows_of_all_have_finished(on_mesh):
    pipeline = on_mesh.pipeline(on_mesh.plan("w4a16"), batch_size=4, max_seq_len=64)
    for prompt in PROMPTS[:4]:
        pipeline.submit(prompt, max_new_tokens=20)
    assert [len(result.token_ids) for result in pipeline.results()] == [20] * 4
    assert pipeline.totals.cycles == 19  # the first token comes with the prompt


def test_a_request_that_is_cancelled_leaves_the_others_alone(on_mesh, plain):
    scheduler = Scheduler(on_mesh.programs, on_mesh.plan("w4a16"), rows=4, capacity=64)
    sequences = [scheduler.add(Request(prompt, 20, SamplingParams())) for prompt in PROMPTS[:5]]
    scheduler.advance(2)
    scheduler.cancel(sequences[2])  # a row of the second part
    while scheduler.busy:
        scheduler.advance(4)
    kept = [0, 1, 3, 4]
    assert [sequences[index].token_ids for index in kept] == [plain[index] for index in kept]
    assert len(sequences[2].token_ids) < 20


def test_two_threads_do_not_wait_for_each_others_messages(on_mesh, plain):
    def run(_):
        return tokens(on_mesh.generate(PROMPTS, mode="w4a16", **BATCH))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(6))) == [plain] * 6


def test_parts_of_a_cycle_are_timed(on_mesh):
    plan = on_mesh.plan(draft="w4a8", draft_length=2)
    setting = Setting.create(batch=4, context=32, longest_draft=2)
    (one,) = measure_parts(on_mesh, [Part("verify", plan)], setting, repeats=1, repetitions=1)
    assert (one.status, one.reason) == ("ok", None)
    assert one.num_bytes["weights"] < model("smollm2_tied").nbytes / 3  # those of a device
    position = 2 * on_mesh.config.num_layers * 32 * 4  # one head, which two devices have
    assert one.num_bytes["cache"] == 2 * (32 + 3) * position
    longer, shorter = (on_mesh.cycle_bytes(on_mesh.plan("w4a16"), rows=4, context=length) for length in (33, 32))
    assert longer - shorter == 2 * position


@pytest.mark.parametrize(("mesh", "split"), [("model=2", 2), ("data=2,model=4", 4), ("data=2", 1), (None, 1)])
def test_parts_of_weights_that_a_device_has_decide_whether_prompts_share_a_pass(mesh, split, monkeypatch):
    asked, answers = [], {"alike": None}

    def rows_alike(weight, *_, **__):
        asked.append(weight.packed.size)
        return answers["alike"]

    monkeypatch.setattr(pallas_kernels, "prefill_is_alike", lambda _: True)
    monkeypatch.setattr(pallas_kernels, "rows_alike", rows_alike)
    one = model("smollm2_tied", mesh)
    assert Programs(one.decoder, one.mesh).longest_packed == 512
    assert split * sum(asked) == sum(linear.weight.get_value().packed.size for linear in linears(one.decoder))
    answers["alike"] = 1
    assert Programs(one.decoder, one.mesh).longest_packed == 0


TEXTS = np.random.default_rng(0).integers(1, 90, (9, 150)).tolist()
# One that samples comes first: the programs of the others are the same. Three begin alike, by two chunks.
PACKED = [
    Request(text[:length], 6, SamplingParams(temperature=0.8 * (index % 2 == 0), seed=index))
    for index, (text, length) in enumerate(zip(TEXTS, (70, 5, 32, 33, 150, 1, 129, 64, 90), strict=True))
]
ALIKE = TEXTS[4][:128]
PACKED += [Request([*ALIKE, *some], 6, SamplingParams(), prefix_length=128) for some in ([7], [8, 9], [3] * 40)]


def read_by(mesh, requests, *, packed, rows=4, mode="w4a16"):
    """Tokens of some requests, the pieces of each device by pass, and the scheduler."""
    one, passes = model("smollm2_tied", mesh), []
    one.programs.packing, read_pieces = packed, Programs.read_pieces

    def noting(self, plan, shape, state, pieces, *others):
        passes.append((pieces.rows.reshape(self.num_row_shards, -1) >= 0).sum(1).tolist())
        return read_pieces(self, plan, shape, state, pieces, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_WIDTHS", (64,))
        patch.setattr(packing, "_SIZES", (8,))
        patch.setattr(Programs, "read_pieces", noting)
        scheduler = Scheduler(one.programs, one.plan(mode), rows=rows, capacity=192)
        sequences = [scheduler.add(one) for one in requests]
        while scheduler.busy:
            scheduler.advance()
    one.programs.packing = None
    return [one.token_ids for one in sequences], passes, scheduler


@pytest.fixture(scope="module")
def one_by_one():
    return read_by(None, PACKED, packed=False)[0]


@pytest.mark.parametrize(
    ("mesh", "rows", "reused"), [("data=2", 4, 2), ("data=4", 8, 2), ("model=2", 4, 3), ("data=2,model=2", 4, 2)]
)
def test_devices_that_share_rows_read_pieces_of_their_own(mesh, rows, reused, one_by_one):
    """More prompts than rows; prompts of three chunks; copies of rows of the same device; and one alone."""
    found, passes, scheduler = read_by(mesh, PACKED, packed=True, rows=rows)
    assert found == one_by_one
    assert scheduler.totals.reused_prompt_tokens == reused * 128
    assert max(map(max, passes)) in (7, 8)  # of the 8 that a device may read
    before = scheduler._programs.num_compilations
    alone, passes, _ = read_by(mesh, PACKED[4:5], packed=True, rows=rows)
    assert alone == one_by_one[4:5]
    assert passes == [[5, *[0] * (len(passes[0]) - 1)]]  # the others have nothing to read
    assert scheduler._programs.num_compilations == before
    assert {key[0] for key in scheduler._programs.compiled} == {"pieces", "loop"}
    assert read_by(mesh, PACKED, packed=False, rows=rows)[:2] == (one_by_one, [])


def test_what_sampling_and_lookups_need_of_prompts_is_on_their_device():
    penalised = [SamplingParams(repetition_penalty=1.5, presence_penalty=0.1 * index, logprobs=2) for index in range(6)]
    wanted = [Request(TEXTS[index][: 20 * index + 5], 6, one) for index, one in enumerate(penalised)]
    found, _, scheduler = read_by("data=2", wanted, packed=True, mode="lookup")
    assert found == read_by(None, wanted, packed=False)[0]
    texts = [[*one.token_ids, *new] for one, new in zip(wanted, found, strict=True)]
    for row in np.asarray(scheduler._state.history).tolist():
        assert any(row[: len(text)] == text for text in texts), "drafts would be looked up in another text"


def test_a_device_copies_a_row_while_another_decodes():
    """Which is in the last row of the other one, for which no row is meant."""
    long = [dataclasses.replace(PACKED[index], max_new_tokens=20) for index in (4, 6, 0)]
    requests = [*long[:2], dataclasses.replace(PACKED[1], max_new_tokens=1), long[2], PACKED[9]]
    found, passes, scheduler = read_by("data=2", requests, packed=True)
    assert scheduler.totals.reused_prompt_tokens == 128
    assert passes[-1] == [1, 0]
    assert found == read_by(None, requests, packed=False)[0]


def test_more_layers_need_no_more_programs_to_be_made(monkeypatch):
    """Of random weights and caches: a GPU's compiler takes a second for each."""
    compiled = []

    def note(event, *_, **__):
        compiled.append(event)

    monitoring.register_event_duration_secs_listener(note)
    options = {"dtype": jnp.dtype("float32"), "kernels": REFERENCE, "scan_layers": False}
    monkeypatch.setattr(synthetic, "decoder_options", lambda *_: options)
    programs = []
    for layers in (2, 5):
        config = dataclasses.replace(model("llama2").config, num_layers=layers)
        one = synthetic.synthetic_model(config, quantization=QuantConfig(group_size=32, keep_floats=True), mesh=MESH)
        jax.block_until_ready(one.programs.made(functools.partial(context_state, setting=Setting(4, 20, 64))))
        programs.append(sum("backend_compile" in event for event in compiled))
        compiled.clear()
    monitoring.unregister_event_duration_listener(note)
    assert programs[0] > 0 == programs[1]


def test_a_model_of_floats_and_a_copy_is_saved_as_on_one_device(tmp_path):
    exact = QuantConfig(group_size=32, symmetric=True, keep_floats=True)
    qspec_jax.save(tiny.language_model(quantization=exact), tmp_path / "one")
    loaded = qspec_jax.load(tmp_path / "one", mesh="data=2,model=2", kernels="reference", dtype="float32")
    qspec_jax.save(loaded, tmp_path / "mesh")
    one, mesh = (open_checkpoint(tmp_path / name).manifest for name in ("one", "mesh"))
    assert mesh.arrays == one.arrays
    assert mesh.quantization == one.quantization == exact


def test_a_program_of_ones_own_is_refused(on_mesh):
    plan = on_mesh.plan("w4a16")
    with pytest.raises(UsageError, match=r"on a mesh .model=4.*load the model without a mesh"):
        own_program.begin_decoding(
            on_mesh.decoder_for(plan), jnp.ones((1, 8), jnp.int32), jnp.full(1, 8), plan=plan, max_new_tokens=8
        )


def test_what_was_compiled_while_weights_were_read_is_not_compiled_again(tmp_path):
    qspec_jax.save(model("llama2"), tmp_path / "saved")
    options = {"batch_size": 2, "max_seq_len": 64}

    def compile_ahead(shapes):
        pipeline = shapes.pipeline(**options)
        pipeline.submit(PROMPTS[0], max_new_tokens=8)
        pipeline.compile()

    where = {"mesh": "data=2,model=2", "kernels": "reference", "dtype": "float32"}
    loaded = qspec_jax.load(tmp_path / "saved", compile_ahead=compile_ahead, **where)
    assert loaded.num_compilations == 2  # the loop, and one width of prefill
    pipeline = loaded.pipeline(**options)
    pipeline.submit(PROMPTS[0], max_new_tokens=8)
    assert [len(result.token_ids) for result in pipeline.results()] == [8]
    assert loaded.num_compilations == 2


def test_a_model_says_where_it_is(on_mesh):
    assert repr(on_mesh).endswith("reference kernels on data=2,model=4)")
    assert shape_of(on_mesh.mesh) == (2, 4)


def test_a_mesh_of_jax_is_used_as_it_is_arranged():
    devices = np.array(jax.devices()[:6])
    turned = make_mesh(Mesh(devices.reshape(3, 2), ("model", "data")))
    assert shape_of(turned) == (2, 3)
    assert [device.id for device in turned.devices[1]] == [1, 3, 5]
    explicit = make_mesh(jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,)))
    assert explicit.axis_types == (AxisType.Auto,) * 2
    assert shape_of(explicit) == (1, 2)
    assert make_mesh(Mesh(devices[3:4], ("model",))).size == 1  # not the default device


def test_more_devices_than_there_are_is_refused_with_meshes_that_fit():
    with pytest.raises(UsageError, match="has 16 devices, and there are 8; use up to data=2,model=4 or data=8,model=1"):
        make_mesh("data=4,model=4")
