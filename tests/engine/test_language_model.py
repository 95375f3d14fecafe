"""Compiled programs and the Python API."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

import qspec_jax
from pallas_kernels import QuantizedWeight
from qspec_jax.decoding import plan, speculative
from qspec_jax.decoding.chunks import Shape
from qspec_jax.device import memory
from qspec_jax.device.settings import _guards_transfers, usual_settings
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.errors import OutOfMemoryError, UsageError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def model():
    return tiny.language_model()


@pytest.fixture(scope="module")
def wide_model():
    """Large enough for its weights to outweigh everything else in a program."""
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "hidden_size": 256, "intermediate_size": 1024})
    return tiny.language_model(dataclasses.replace(config, num_layers=6))


SHAPE = Shape(rows=2, capacity=64)


def compiled_loop(model, **options):
    plan = model.plan(**options)
    with tiny.compiled_quickly():
        model.programs.lay_out_weights(plan)
    return model.programs.lower_loop(plan, SHAPE).compile().memory_analysis()


def compiled_fill(model, **options):
    plan = model.plan(**options)
    with tiny.compiled_quickly():
        model.programs.lay_out_weights(plan)
    return model.programs.lower_prefill(plan, SHAPE, 32).compile().memory_analysis()


def float_bytes(model):
    weights = [
        leaf
        for leaf in jax.tree.leaves(model.programs._laid_out.merge(model.programs.leaves), is_leaf=is_weight)
        if is_weight(leaf)
    ]
    return sum(8 * weight.packed.size for weight in weights)


def is_weight(leaf):
    return isinstance(leaf, QuantizedWeight)


@pytest.mark.contract
@pytest.mark.parametrize(
    "options", [{"mode": "w4a16"}, pytest.param({"draft": "w4a4"}, marks=pytest.mark.newest_jax)], ids=str
)
def test_weights_are_handed_to_the_program_once_and_stay_packed(wide_model, options):
    analysis = compiled_loop(wide_model, **options)
    cache = wide_model.decoder.create_cache(batch=2, capacity=SHAPE.capacity)
    assert float_bytes(wide_model) > 4 * wide_model.nbytes / 2
    assert analysis.argument_size_in_bytes < wide_model.nbytes + cache.nbytes + 4096
    # One layer dequantised at a time at most, of six.
    assert analysis.temp_size_in_bytes < float_bytes(wide_model) / 4


@pytest.mark.newest_jax
@pytest.mark.contract
@pytest.mark.parametrize("compiled", [compiled_loop, compiled_fill])
def test_the_programs_work_in_the_buffers_they_are_given(wide_model, compiled):
    cache = wide_model.decoder.create_cache(batch=2, capacity=SHAPE.capacity)
    assert compiled(wide_model, draft="w4a4").alias_size_in_bytes >= cache.nbytes


@pytest.mark.newest_jax
@pytest.mark.contract
def test_filling_a_row_copies_that_row_alone():
    """With many rows, what is needed besides the buffers given is far less than the cache."""
    model = tiny.language_model()
    shape = Shape(rows=64, capacity=512)
    analysis = model.programs.lower_prefill(model.plan("w4a16"), shape, 32).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < model.decoder.create_cache(batch=64, capacity=512).nbytes / 8


def test_draft_and_verify_read_the_same_arrays(model):
    """The one 4-bit copy: the state has no float linear and no second packing."""
    leaves = {tuple(leaf.shape): leaf.dtype for leaf in model.programs.leaves}
    config = model.config
    per_layer = (sum(config.qkv_sizes) + config.hidden_size) * config.hidden_size
    per_layer += 3 * config.hidden_size * config.intermediate_size
    packed = sum(leaf.size for leaf in model.programs.leaves if leaf.dtype == np.uint8)
    assert packed == config.num_layers * per_layer // 2
    largest_float = max(np.prod(shape) for shape, dtype in leaves.items() if dtype == np.float32)
    assert largest_float == config.vocab_size * config.hidden_size


def test_one_compilation_per_shape():
    model = tiny.language_model()
    for prompt in ([1], [1, 2, 3], list(range(30))):
        model.generate([prompt], draft="w4a8", max_new_tokens=8)
    assert len(model.programs) == 2
    model.generate([[1]], draft="w4a8", max_new_tokens=16)
    assert len(model.programs) == 2
    model.generate([[1]], draft="w4a8", draft_length=2, max_new_tokens=8)
    assert len(model.programs) == 3
    model.generate([[1], [2]], draft="w4a8", max_new_tokens=8)
    assert len(model.programs) == 5


def test_all_full_and_partial_batches_of_a_call_share_one_loop_program():
    model = tiny.language_model()
    prompts = [[5], list(range(30)), [6, 7], list(range(60)), [8]]
    results = model.generate(prompts, draft="w4a8", max_new_tokens=8, batch_size=2)
    assert len(results) == len(prompts)
    loops = [key for key in model.programs.compiled if key[0] == "loop"]
    assert len(loops) == 1
    assert len(model.programs) == 3  # prompts of up to 32 and of up to 64 tokens
    options = {"mode": "w4a16", "max_new_tokens": 8, "max_seq_len": 128}
    alone = [model.generate([prompt], **options)[0].token_ids for prompt in prompts]
    assert [result.token_ids for result in results] == alone


def test_a_second_run_compiles_and_traces_nothing(monkeypatch):
    model = tiny.language_model()
    traces = []
    original = speculative.generate
    monkeypatch.setattr(speculative, "generate", lambda *a, **k: traces.append(1) or original(*a, **k))
    first = model.generate(PROMPTS, draft="w4a8", max_new_tokens=32)
    again = model.generate(PROMPTS, draft="w4a8", max_new_tokens=32)
    assert len(traces) == 1
    assert first[0].stats.compile_s > 0
    assert again[0].stats.compile_s == 0
    assert [r.token_ids for r in first] == [r.token_ids for r in again]


def test_results_keep_the_order_of_prompts_across_batches(model):
    prompts = [[token] for token in range(5, 10)]
    one_batch = model.generate(prompts, mode="w4a16", max_new_tokens=6, batch_size=5)
    many = model.generate(prompts, mode="w4a16", max_new_tokens=6, batch_size=2)
    assert [r.token_ids for r in many] == [r.token_ids for r in one_batch]
    assert [r.prompt_token_ids for r in many] == prompts


def test_a_result_as_a_dictionary_has_the_documented_keys(model):
    entry = model.generate([[1, 2]], draft="w4a8", max_new_tokens=8)[0].to_dict()
    assert set(entry) == {
        *(
            "prompt",
            "prompt_token_ids",
            "choices",
            "reused_prompt_tokens",
            "text",
            "token_ids",
            "finish_reason",
            "error",
            "logprobs",
            "top_logprobs",
            "mode",
            "draft",
            "draft_length",
        ),
        *("cycles", "drafted", "accepted", "accepted_lengths", "acceptance_rate", "tokens_per_cycle"),
        *("waited_s", "prefill_s", "decode_s", "compile_s", "tokens_per_s", "device", "kernels"),
    }
    assert entry["mode"] == "qspec"
    assert entry["draft"] == "w4a8"
    assert entry["kernels"] == "reference"
    assert entry["acceptance_rate"] == entry["accepted"] / entry["drafted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[]]}, "prompt 1 is empty"),
        ({"prompts": [[96]]}, "token id outside 0..95"),
        ({"prompts": [[-1]]}, "token id outside 0..95"),
        ({"prompts": ["text"]}, "without a tokenizer"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"draft_length": 0}, "draft_length=0 must be between 1 and 16"),
        ({"draft_length": 17}, "draft_length=17 must be between"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"mode": "w4a2"}, "mode='w4a2' is unknown; use one of qspec, w4a16"),
        ({"draft": "w4a2"}, "draft='w4a2' is unknown; use one of auto, w4a4, w4a8, w4a16"),
        ({"draft": "w4a16", "draft_context": "full"}, "reads what verify='w4a16' reads, and costs a plain step; use"),
        ({"prompts": [[1] * 300]}, "a prompt of 300 tokens and max_new_tokens=8 do not fit the model's context of 256"),
        ({"max_seq_len": 9}, "do not fit max_seq_len=9; .* raise max_seq_len"),
        ({"max_seq_len": 1000}, "max_seq_len=1000 must be between 1 and the model's context of 256"),
    ],
)
def test_bad_arguments_are_refused_with_a_remedy_before_compiling(options, message):
    model = tiny.language_model()
    with pytest.raises(UsageError, match=message):
        model.generate(**{"prompts": [[1, 2, 3]], "max_new_tokens": 8, **options})
    assert len(model.programs) == 0


def test_a_prompt_that_cannot_be_served_fails_alone(model):
    prompts = [[5, 6], [1] * 255, [], [7]]
    results = model.generate(prompts, mode="w4a16", max_new_tokens=8, batch_size=2)
    expected = model.generate([[5, 6], [7]], mode="w4a16", max_new_tokens=8, batch_size=2)
    assert [results[0].token_ids, results[3].token_ids] == [one.token_ids for one in expected]
    assert [one.finish_reason for one in results] == ["length", "error", "error", "length"]
    assert "a prompt of 255 tokens and max_new_tokens=8 do not fit" in results[1].error
    assert results[2].error == "prompt 3 is empty; give it some text"
    assert results[1].to_dict()["error"] == results[1].error
    assert results[1].stats.cycles == results[1].stats.num_tokens == 0


def test_a_4_bit_mode_of_a_float_model_is_refused():
    model = tiny.language_model(quantization=None)
    with pytest.raises(UsageError, match="needs 4-bit weights"):
        model.generate([[1]], mode="w4a16", max_new_tokens=4)
    assert len(model.generate([[1]], mode="float", max_new_tokens=4)[0].token_ids) == 4


def test_a_prompt_that_fills_max_seq_len_exactly_works(model):
    long = model.generate([[3] * 24], mode="qspec", draft="w4a8", max_new_tokens=8, max_seq_len=32)[0]
    assert long.token_ids == model.generate([[3] * 24], mode="w4a16", max_new_tokens=8)[0].token_ids


class Letters:
    """A tokenizer, and its decoder of a stream, in which a token is a letter."""

    def stream_decoder(self):
        return self

    def decode(self, tokens):
        return "".join(chr(ord("A") + token) for token in tokens)

    push = decode

    def finish(self):
        return ""


@pytest.mark.newest_jax
@pytest.mark.parametrize(
    ("cycles_per_step", "expected"), [(1, [1] * 14), (5, [1, 5, 5, 3]), (13, [1, 13]), (100, [1, 13])]
)
def test_a_stream_yields_what_so_many_cycles_make(model, monkeypatch, cycles_per_step, expected):
    """Behind the token that the prompt yields; a cycle without drafts makes one."""
    ids = model.generate([[5, 6]], mode="w4a16", max_new_tokens=14)[0].token_ids
    monkeypatch.setattr(model, "tokenizer", Letters())
    options = {"mode": "w4a16", "max_new_tokens": 14, "chat": False}
    *pieces, result = model.stream([5, 6], cycles_per_step=cycles_per_step, **options)
    assert "".join(pieces) == result.text == Letters().decode(ids)
    assert [len(piece) for piece in pieces] == expected


def test_a_stream_without_cycles_between_its_pieces_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", Letters())
    with pytest.raises(UsageError, match="cycles_per_step=0 must be at least 1"):
        model.stream([5, 6], cycles_per_step=0)


def test_what_does_not_fit_the_memory_is_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(
        OutOfMemoryError, match=r"the weights of tiny need [\d.]+ kB and .* has 1\.00 kB free; use a smaller model"
    ):
        tiny.decoder()


def test_running_out_of_device_memory_becomes_one_message():
    failure = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    with pytest.raises(OutOfMemoryError, match="out of device memory while loading"):  # noqa: SIM117
        with memory.explain_out_of_memory("while loading"):
            raise failure


FOR_OTHER_PROGRAMS = {
    "a mesh": lambda: jax.set_mesh(jax.make_mesh((1,), ("x",))),
    "a guard of transfers": lambda: jax.transfer_guard("disallow_explicit"),
    "no jit": jax.disable_jit,
    "no ranks promoted": lambda: jax.numpy_rank_promotion("raise"),
    "older draws": lambda: jax.threefry_partitionable(False),
}


# What all threads are told, as environment variables tell them.
FOR_OTHER_PROCESSES = {
    "jax_disable_jit": (True, False),
    "jax_numpy_rank_promotion": ("raise", "allow"),
    "jax_threefry_partitionable": (False, True),
    "jax_transfer_guard": ("disallow_explicit", "allow"),
}


def test_what_jax_is_told_of_other_programs_does_not_reach_the_engine(model):
    options = {"draft": "w4a8", "max_new_tokens": 6, "sampling": [{"temperature": 0.9, "seed": 3}, None]}
    expected = [result.token_ids for result in model.generate([[5, 6, 7], [8, 9]], **options)]
    with contextlib.ExitStack() as stack:
        for setting in FOR_OTHER_PROGRAMS.values():
            stack.enter_context(setting())
        for name, (told, before) in FOR_OTHER_PROCESSES.items():
            jax.config.update(name, told)
            stack.callback(jax.config.update, name, before)
        new = LanguageModel(model.decoder, None, quantization=model.quantization, kernels="reference")
        results = new.generate([[5, 6, 7], [8, 9]], **options)
    assert [result.token_ids for result in results] == expected


@pytest.mark.parametrize("name", FOR_OTHER_PROGRAMS)
def test_usual_settings_hold_within_others_and_only_there(name):
    with FOR_OTHER_PROGRAMS[name]():
        before = _settings()
        assert before != _settings_of_the_engine()
        assert _settings() == before
    assert _settings_of_the_engine() == _settings()


def test_a_program_that_is_traced_may_ask_for_the_decoder_of_a_plan(model):
    plan = model.plan("w4a16")
    model.decoder_for(plan)
    assert jax.jit(lambda x: x + model.decoder_for(plan).config.num_layers)(1) == 3


def _settings():
    config = jax.config
    told = config.jax_disable_jit, config.jax_numpy_rank_promotion, config.jax_threefry_partitionable
    return *told, _guards_transfers(config), jax.sharding.get_mesh()


_settings_of_the_engine = usual_settings()(_settings)


def test_64_bits_of_jax_change_no_token(model):
    sampling = [{"temperature": 0.9, "seed": 3, "top_p": 0.9, "presence_penalty": 0.5, "logprobs": 1}, None]
    options = {"draft": "w4a8", "max_new_tokens": 6, "sampling": sampling}
    expected = [result.token_ids for result in model.generate([[5, 6, 7], [8, 9]], **options)]
    with jax.enable_x64(True):
        new = LanguageModel(model.decoder, None, quantization=model.quantization, kernels="reference")
        results = new.generate([[5, 6, 7], [8, 9]], **options)
    assert [result.token_ids for result in results] == expected


def test_group_sums_exist_only_once_an_asymmetric_draft_needs_them():
    model = tiny.language_model()
    before = model.nbytes
    model.generate([[1]], draft="w4a8", max_new_tokens=4)
    assert model.nbytes == before
    model.generate([[1]], draft="w4a4", max_new_tokens=4)
    assert model.nbytes > before
    assert model.quantization == QuantConfig()


def test_the_default_draft_is_w4a8_where_int4_is_not_faster(model):
    assert jax.default_backend() != "cpu" or model.plan().draft == View.of(Precision.W4A8)


@pytest.mark.parametrize(
    ("capability", "expected"), [("8.0", "w4a4"), ("8.9", "w4a4"), ("9.0", "w4a8"), ("10.0", "w4a8")]
)
def test_the_default_draft_follows_the_compute_capability(monkeypatch, capability, expected):
    device = type("Device", (), {"platform": "gpu", "compute_capability": capability})()
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert plan.default_draft_precision().value == expected


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite", "TPU7x"])
def test_the_default_draft_of_a_tpu_is_w4a8(monkeypatch, kind):
    """Memory bounds it already, or the matrix unit has no integers at all: W4A4 would take as long."""
    monkeypatch.setattr(jax, "local_devices", lambda: [type("Device", (), {"platform": "tpu", "device_kind": kind})()])
    assert plan.default_draft_precision() is Precision.W4A8


def test_unknown_kernels_and_dtypes_are_refused_before_anything_is_read():
    with pytest.raises(UsageError, match="kernels='cutlass' is unknown; use auto or one of"):
        qspec_jax.load("/nonexistent", kernels="cutlass")
    with pytest.raises(UsageError, match="dtype='float64' is not supported; use one of float32, bfloat16"):
        qspec_jax.load("/nonexistent", dtype="float64")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for GPU kernels where there is none")
def test_gpu_kernels_are_refused_on_the_cpu():
    with pytest.raises(UsageError, match="kernels='triton' does not work on this cpu device"):
        qspec_jax.load("/nonexistent", kernels="triton")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks for GPU kernels where there is none")
def test_kernels_asked_for_by_name_are_never_replaced_silently():
    model = tiny.language_model(kernels="triton", scan_layers=False)
    with pytest.raises(UsageError, match="implementation 'triton' needs an NVIDIA GPU; this is cpu; use 'reference'"):
        model.generate([[1]], mode="w4a16", max_new_tokens=4)
