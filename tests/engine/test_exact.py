"""A model's own floats verify what a 4-bit copy of them drafts."""

from __future__ import annotations

import argparse
import dataclasses

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import qspec_jax
from pallas_kernels import QuantizedWeight, dequantize
from qspec_jax import QuantConfig, View, chat, evaluate, generate, info, serve
from qspec_jax.bench import __main__ as bench
from qspec_jax.bench.decode.parts import Setting, decoding_parts
from qspec_jax.bench.synthetic import synthetic_model
from qspec_jax.commands import options
from qspec_jax.decoding.plan import LOOKUP_MODES, VERIFY, plan_of
from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.inspection.model import describe_model
from qspec_jax.inspection.text import model_text
from qspec_jax.model.config import ActivationQuantization, ModelConfig, held_weights
from qspec_jax.model.layouts import linears
from qspec_jax.model.shards import parameters
from qspec_jax.weights.exact import _differences, open_exact
from qspec_jax.weights.placing import parts_of
from tests import tiny
from tests.weights.prequantized_packers import CASES, tiny_checkpoint
from tests.weights.tiny_checkpoints import gguf_tensors, hf_config, write_gguf, write_hf

EXACT = QuantConfig(group_size=32, symmetric=True, keep_floats=True)
FLOAT, CODES = View(weight_bits=None), View()
PROMPTS = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14]]
SAMPLING = [{}, {"temperature": 0.7, "seed": 5}, {"temperature": 1.0, "top_k": 20, "seed": 6}]
OPTIONS = {"max_new_tokens": 24, "max_seq_len": 64, "draft_length": 3, "draft": "w4a8"}


def arrays(model):
    """All arrays of a decoder by their paths, with the codes of a weight apart."""
    found = {}
    for path, parameter in parameters(model.decoder):
        value = parameter.get_value()
        found |= {f"{path}{part}": np.asarray(array) for part, array in parts_of(value).items()}
    return found


@pytest.fixture(scope="module")
def model():
    return tiny.language_model(quantization=EXACT)


def generated(model, **options):
    results = model.generate(PROMPTS, sampling=SAMPLING, **{**OPTIONS, **options})
    return [result.token_ids for result in results], sum(result.stats.accepted for result in results)


@pytest.fixture(scope="module")
def plain(model):
    """Tokens of plain decoding with the floats, all prompts together."""
    return generated(model, mode="float", batch_size=3)[0]


def test_tokens_are_those_of_plain_decoding_with_the_floats_alone_and_in_a_batch(model, plain):
    together, accepted = generated(model, batch_size=3)
    assert together == plain
    assert accepted > 0
    assert generated(model, batch_size=1)[0] == plain
    assert generated(model, mode="lookup", batch_size=3)[0] == plain


def test_a_broken_copy_costs_drafts_and_changes_no_token(model, plain):
    broken = tiny.language_model(quantization=EXACT)
    for _, parameter in parameters(broken.decoder):
        if isinstance(value := parameter.get_value(), QuantizedWeight):
            parameter.set_value(dataclasses.replace(value, scale=-value.scale))
    broken = qspec_jax.LanguageModel(broken.decoder, None, quantization=EXACT, kernels="reference")
    broken.programs.adopt(model.programs)
    tokens, accepted = generated(broken, batch_size=3)
    assert tokens == plain
    assert accepted < generated(model, batch_size=3)[1] / 2


def test_the_floats_are_those_of_the_checkpoint(model):
    alone, both = tiny.language_model(quantization=None), arrays(model)
    for path, array in arrays(alone).items():
        of_linear = path.endswith(("qkv.weight", "output.weight", "gate_up.weight", "down.weight"))
        np.testing.assert_array_equal(both[path.replace(".weight", ".floats") if of_linear else path], array)
    copied = arrays(tiny.language_model(quantization=dataclasses.replace(EXACT, keep_floats=False)))
    assert both.keys() == copied.keys() | {path for path in both if path.endswith(".floats")}
    for path, array in copied.items():
        np.testing.assert_array_equal(both[path], array)


def test_programs_take_both_sets_of_weights_once_and_a_pass_is_known_to_read_one(model):
    floats = sum(array.nbytes for path, array in arrays(model).items() if path.endswith(".floats"))
    codes = sum(a.nbytes for path, a in arrays(model).items() if path.endswith((".packed", ".scale")))
    assert model.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model.programs.leaves))
    assert model.nbytes == floats + codes + sum(
        array.nbytes for path, array in arrays(model).items() if not path.endswith((".floats", ".packed", ".scale"))
    )
    both, embedding = model.nbytes, model.decoder.embedding.get_value().nbytes
    position = 2 * 2 * 2 * 16 * 4
    step, draft = both - codes - embedding + position, both - floats - embedding + position
    assert model.cycle_bytes(model.plan("float"), context=1) == step
    assert model.cycle_bytes(model.plan("w4a16"), context=1) == draft
    assert model.cycle_bytes(model.plan(draft_length=3), context=1) == step + 3 * draft


@pytest.mark.parametrize("mode", ["qspec", *LOOKUP_MODES, "auto"])
@pytest.mark.parametrize(
    ("verify", "held", "target"),
    [
        ("auto", (4, None), FLOAT),
        ("float", (4, None), FLOAT),
        ("w4a16", (4, None), CODES),
        ("auto", (4,), CODES),
        ("w4a16", (4,), CODES),
    ],
)
def test_a_mode_that_drafts_verifies_with_what_is_asked_for_or_the_model_is_for(mode, verify, held, target):
    plan = plan_of(mode, verify=verify, held=held)
    assert {one.verify for one in getattr(plan, "choices", (plan,))} == {target}


@pytest.mark.parametrize(("mode", "target"), [("float", FLOAT), ("w4a16", CODES), ("w4a8", View(activation_bits=8))])
def test_a_plain_mode_is_its_own_target(mode, target):
    for verify in {"auto", mode} & {*VERIFY}:
        assert plan_of(mode, verify=verify, held=(4, None)).verify == target
    assert plan_of("float", verify="float", held=(None,)).verify == FLOAT


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"verify": "w4a8"}, "verify='w4a8' is unknown; use one of auto, w4a16, w8a16, float"),
        ({"verify": None}, "verify=None is unknown"),
        ({"verify": np.array(["float", "auto"])}, "^verify="),
        (
            {"verify": "float"},
            "weights that this model does not hold; load it with verify='float', or use verify='w4a16'",
        ),
        ({"mode": "float", "verify": "float"}, "does not hold"),
        ({"verify": "float", "held": (None,)}, "mode='qspec' needs 4-bit weights"),
        ({"mode": "lookup", "held": (None,)}, "mode='lookup' needs 4-bit weights"),
        *[
            ({"mode": mode, "verify": "float", "held": (4, None)}, f"mode='{mode}' decodes plainly")
            for mode in ("w4a16", "w4a8", "w4a4")
        ],
        ({"mode": "float", "verify": "w4a16", "held": (4, None)}, "use verify='auto', or mode='w4a16' or 'qspec'"),
    ],
)
def test_targets_that_make_no_sense_are_refused_with_those_that_do(options, words):
    with pytest.raises(UsageError, match=words):
        plan_of(**{"mode": "qspec", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"verify": "bf16"}, "verify='bf16' is unknown"),
        ({"verify": "float", "quantization": None}, "leave quantization=None out, or verify='float'"),
        ({"verify": "w4a16", "quantization": None}, "leave quantization=None out, or use verify='float'"),
        ({"verify": "w4a16", "quantization": EXACT}, "leave keep_floats out, or use verify='float'"),
        ({"draft_model": "no/such"}, "draft_model is of verify='float'"),
        ({"quantization": np.array(["auto", "auto"])}, 'use "auto", a QuantConfig, or None'),
        ({"verify": "float", "draft_model": 7}, "^draft_model=7: use a path"),
        ({"verify": "float", "draft_model": "missing.gguf"}, "^draft_model 'missing.gguf': no such file"),
    ],
)
def test_loads_that_make_no_sense_are_refused_before_a_file_is_read(options, words, monkeypatch):
    monkeypatch.setattr("qspec_jax.engine.load.open_model", None)
    with pytest.raises((UsageError, CheckpointError), match=words):
        qspec_jax.load(**{"model": "default", **options})


def test_what_a_model_holds():
    assert [held_weights(one) for one in (None, QuantConfig(), EXACT)] == [(None,), (4,), (4, None)]
    with pytest.raises(UsageError, match="keep_floats must be True or False"):
        QuantConfig(keep_floats=1)


COMMANDS = {
    "generate": (generate, ["--prompt", "x", "--model"]),
    "chat": (chat, ["--model"]),
    "serve": (serve, []),
    "info": (info, []),
    "evaluate": (evaluate, ["--text", __file__, "--model"]),
    "decode": (bench, ["decode", "--model"]),
    "throughput": (bench, ["throughput", "--model"]),
    "speedup": (bench, ["speedup", "--model"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--verify", "float", "--draft-model", "missing.gguf"], "error: draft_model 'missing.gguf': no such file"),
        (["--draft-model", "default"], "error: --draft-model is of --verify float"),
    ],
    ids=["missing", "alone"],
)
def test_commands_refuse_a_draft_model_before_a_weight_is_read(command, arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("qspec_jax.engine.load.open_model", None)
    module, line = COMMANDS[command]
    assert module.main([*line, "default", *arguments]) != 0
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mode": "float"}, {"quantization": None}),
        ({"mode": "qspec"}, {"quantization": "auto", "verify": "auto", "draft_model": None}),
        (
            {"mode": "float", "verify": "float", "draft_model": "copy"},
            {"quantization": "auto", "verify": "float", "draft_model": "copy"},
        ),
        (
            {"mode": "auto", "verify": "float", "group_size": "128"},
            {"quantization": QuantConfig(128), "verify": "float", "draft_model": None},
        ),
    ],
)
def test_options_say_which_weights_are_loaded(given, expected):
    defaults = {"verify": "auto", "draft_model": None, "group_size": None}
    assert options.weights_of(argparse.Namespace(**{**defaults, **given})) == expected


def test_synthetic_models_have_floats_that_their_codes_mean():
    made = synthetic_model(ModelConfig.from_hf(tiny.BASE_HF_CONFIG), quantization=EXACT, kernels="reference")
    for linear in linears(made.decoder):
        np.testing.assert_allclose(linear.floats.get_value(), dequantize(linear.weight.get_value()), rtol=1e-6)
    parts = decoding_parts(made, ["w4a16", "float", "qspec", "lookup"], drafts=["w4a8"], draft_lengths=[3])
    assert [str(part) for part in parts[:2]] == ["step float", "step w4a16"]
    assert {part.plan.verify for part in parts if part.name in ("verify", "cycle")} == {FLOAT}
    setting = Setting.create(batch=1, context=16, longest_draft=3)
    weights = {part.name: part.num_bytes(made, setting)["weights"] for part in parts}
    floats = sum(linear.floats.get_value().nbytes for linear in linears(made.decoder))
    codes = sum(linear.weight.get_value().nbytes for linear in linears(made.decoder))
    assert weights["verify"] - weights["draft"] == floats - codes


# Files: the floats of a Hugging Face directory, and a copy of them in another file.
def load(path, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qspec_jax.engine.load.open_tokenizer", lambda path: None)
        return qspec_jax.load(path, kernels="reference", dtype="float32", **options)


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A directory of floats, which the copies below mean exactly or round."""
    case = tiny_checkpoint(CASES["gptq"])
    return write_hf(tmp_path_factory.mktemp("float") / "model", hf_config(), case.floats)


def changed(checkpoint, **factors):
    """With tensors whose name ends so multiplied by a number."""
    for name, array in checkpoint.tensors.items():
        for ending, factor in factors.items():
            if name.endswith(ending):
                checkpoint.tensors[name] = (array * factor).astype(array.dtype)
    return checkpoint


def copy_of(kind, floats, folder):
    """A file with a 4-bit copy of the floats."""
    if kind in ("gguf", "q8_0"):
        config, tensors = hf_config(), load_file(floats / "model.safetensors")
        linear_type = gguf.GGMLQuantizationType.Q4_0 if kind == "gguf" else gguf.GGMLQuantizationType.Q8_0
        return write_gguf(folder / "copy.gguf", config, gguf_tensors(config, tensors), linear_type=linear_type)
    if kind == "checkpoint":
        settings = ActivationQuantization(group_size=32)
        qspec_jax.save(load(floats, quantization=QuantConfig(w4a8=settings)), folder / "copy")
        return folder / "copy"
    return tiny_checkpoint(CASES[kind]).write(folder / "copy")


@pytest.mark.parametrize("kind", ["gptq", "gguf", "checkpoint"])
def test_a_copy_from_a_checkpoint_keeps_its_codes_beside_the_floats(kind, floats, tmp_path):
    path = copy_of(kind, floats, tmp_path)
    model, copied, alone = (load(floats, verify="float", draft_model=path), load(path), load(floats, quantization=None))
    both = arrays(model)
    for name, array in arrays(copied).items():
        if name.endswith((".packed", ".scale", ".offset")):
            np.testing.assert_array_equal(both[name], array)
    for name, array in arrays(alone).items():
        np.testing.assert_array_equal(both[name.replace(".weight", ".floats") if name not in both else name], array)
    assert model.quantization == dataclasses.replace(copied.quantization, keep_floats=True)
    assert model.plan().verify == FLOAT


def test_a_copy_of_8_bits_is_rounded_to_the_4_that_drafts_read(floats, tmp_path):
    model = load(floats, verify="float", draft_model=copy_of("q8_0", floats, tmp_path))
    assert {linear.weight.get_value().bits for linear in linears(model.decoder)} == {4}
    for linear in linears(model.decoder):
        weight = linear.weight.get_value()
        error = np.linalg.norm(dequantize(weight) - linear.floats.get_value())
        assert error < 0.2 * np.linalg.norm(linear.floats.get_value())


def test_a_copy_is_rounded_to_the_largest_symmetric_groups_unless_others_are_asked_for(floats):
    assert load(floats, verify="float").quantization == QuantConfig(32, True, keep_floats=True)
    asked = load(floats, verify="float", quantization=QuantConfig(None))
    assert asked.quantization == QuantConfig(None, keep_floats=True)
    assert load(floats, quantization=asked.quantization).plan().verify == FLOAT
    assert load(floats, verify="w4a16").quantization == QuantConfig()


def test_info_says_what_both_take_and_which_codes_draft(floats, tmp_path):
    path = copy_of("gptq", floats, tmp_path)
    facts = describe_model(floats, verify="float", draft_path=path, dtype="float32", kernels="reference")
    assert facts["memory"]["weight_bytes"] == load(floats, verify="float", draft_model=path).nbytes
    assert facts["quantization"]["linears"] == {"4-bit codes, kept": 14}
    runs = {choice["part"]: choice["op"] for choice in facts["kernels"]["verify float"]}
    assert (runs["mlp.down"], runs["lm_head"]) == ("float_matmul", "float_matmul")
    assert "verify          float" in model_text(facts)


REFUSED = {
    "floats": (lambda floats, folder: floats, "draft_model=model has no 4-bit weights; leave it out"),
    "family": (
        lambda floats, folder: tiny_checkpoint(CASES["gptq"], "Qwen3ForCausalLM", rope_theta=5e5).write(
            folder / "copy"
        ),
        "its rope_theta is 500000.0, not 10000.0; its qk_norm is True, not False",
    ),
    "norms": (
        lambda floats, folder: changed(tiny_checkpoint(CASES["gptq"]), **{"0.input_layernorm.weight": 1.1}).write(
            folder / "copy"
        ),
        "its layers.0.attention_norm.weight has other values",
    ),
    "weights": (
        lambda floats, folder: changed(tiny_checkpoint(CASES["gptq"]), **{"0.self_attn.o_proj.scales": 2}).write(
            folder / "copy"
        ),
        "its layers.0.attention.output.weight is no rounding of the same weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_copy_of_another_model_is_refused_with_what_differs(case, floats, tmp_path):
    write, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        open_exact(floats, "auto", write(floats, tmp_path))


@pytest.mark.parametrize(
    ("field", "value"), [("num_layers", 3), ("hidden_size", 128), ("mlp_bias", True), ("down_hadamard", True)]
)
def test_a_copy_of_another_shape_is_refused_by_the_field(field, value):
    config = ModelConfig.from_hf(hf_config())
    assert not list(_differences(config, dataclasses.replace(config, eos_token_ids=(7,), rms_norm_eps=1e-5)))
    (problem,) = _differences(config, dataclasses.replace(config, **{field: value}))
    assert problem == f"its {field} is {value}, not {getattr(config, field)}"
