"""What is said of a model is what loading finds, and no weight is read for it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import pytest
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import qspec_jax
from qspec_jax import info
from qspec_jax.engine.load import open_model
from qspec_jax.errors import RequantizationWarning, UsageError
from qspec_jax.inspection import machine, text
from qspec_jax.inspection.choices import kernel_choices
from qspec_jax.inspection.model import describe_model
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import num_bytes
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.model.placement import decoder_options
from qspec_jax.weights.checkpoint.save import save_checkpoint
from tests import tiny
from tests.weights import tiny_checkpoints
from tests.weights.prequantized_packers import CASES, tiny_checkpoint

LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with a tokenizer, and a GGUF file and a checkpoint without one."""
    folder = tmp_path_factory.mktemp("models")
    config = tiny_checkpoints.hf_config("Qwen3ForCausalLM")
    tensors = tiny_checkpoints.hf_tensors(config)
    tiny_checkpoints.write_hf(folder / "hf", config, tensors, num_shards=2)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "</s>": 2, "<|im_end|>": 3}, unk_token="<unk>"))
    words.save(str(folder / "hf/tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    template = "\n{# a comment #}\n{{ messages[0]['content'] }}<|im_end|>"
    (folder / "hf/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    llama = tiny_checkpoints.hf_config()
    tensors = tiny_checkpoints.gguf_tensors(llama, tiny_checkpoints.hf_tensors(llama))
    tiny_checkpoints.write_gguf(folder / "model.gguf", llama, tensors)
    (folder / "empty").mkdir()
    made = tiny.language_model(quantization=QuantConfig(group_size=None, symmetric=True))
    qspec_jax.save(made, folder / "saved", recipe={"name": "gptq"})
    return folder


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch, models):
    def refuse(*arguments, **options):
        raise AssertionError("a weight was read")

    for reads in ("huggingface.directory._read_floats", "gguf.source._read", "checkpoint.restore._read_arrays"):
        monkeypatch.setattr(f"qspec_jax.weights.{reads}", refuse)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf", ["Qwen3ForCausalLM", "14 as floats, rounded", "32, asymmetric", "{# a c", "3 '<|im"]),
        ("model.gguf", ["GGUF file", "Llama, ", "tokenizer       none:", "end tokens      2\n"]),
        ("saved", ["checkpoint of qspec_jax", "recipe gptq", "a scale per row, symmetric", "it was saved without one"]),
    ],
)
def test_it_is_shown_in_80_columns(models, capsys, name, said):
    assert info.main([str(models / name)]) == 0
    shown = capsys.readouterr().out
    for words in said:
        assert words in shown
    assert max(len(line) for line in shown.splitlines() if "/" not in line) <= text.WIDTH


def packed(case):
    return tiny_checkpoint(CASES[case])


def with_settings_beside(path):
    """As AutoGPTQ wrote them."""
    settings = (checkpoint := packed("gptq")).config.pop("quantization_config")
    (checkpoint.write(path) / "quantize_config.json").write_text(json.dumps(settings))


def half_packed(path):
    checkpoint, module = packed("gptq"), "model.layers.1.mlp.down_proj"
    checkpoint.tensors = {name: one for name, one in checkpoint.tensors.items() if not name.startswith(module)}
    checkpoint.tensors[f"{module}.weight"] = checkpoint.floats[f"{module}.weight"]
    checkpoint.write(path)


def only_said_to_be_packed(path):
    config = tiny_checkpoints.hf_config()
    packed_config = config | {"quantization_config": packed("awq").config["quantization_config"]}
    tiny_checkpoints.write_hf(path, packed_config, tiny_checkpoints.hf_tensors(config))


def gguf_of(kind):
    def write(path):
        config = tiny_checkpoints.hf_config()
        tensors = tiny_checkpoints.gguf_tensors(config, tiny_checkpoints.hf_tensors(config))
        tiny_checkpoints.write_gguf(path / "m.gguf", config, tensors, linear_type=GGMLQuantizationType[kind])

    return write


ROUNDED = "rounding to nearest, as it is read"


@pytest.mark.parametrize(
    ("write", "method"),
    [
        (lambda path: packed("gptq").write(path), "gptq"),
        (with_settings_beside, "gptq"),
        (half_packed, f"gptq; {ROUNDED}"),
        pytest.param(
            *(only_said_to_be_packed, ROUNDED), marks=pytest.mark.filterwarnings("ignore:.*linears are floats")
        ),
        (lambda path: packed("compressed_8").write(path), "compressed-tensors"),
        (lambda path: packed("qspec").write(path), "QSpec release"),
        (gguf_of("Q4_0"), "of the file's types"),
        (gguf_of("Q8_0"), "of the file's types"),
        (gguf_of("Q5_1"), ROUNDED),
        (gguf_of("F16"), ROUNDED),
    ],
)
def test_the_method_is_that_of_the_codes_and_not_of_the_config(models, tmp_path, capsys, write, method):
    write(tmp_path)
    assert info.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["method"] == method


def test_json_has_all_of_it_and_is_written_too(models, capsys):
    assert info.main([str(models / "saved"), "--json", "--output", str(models / "facts.json")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((models / "facts.json").read_text())
    assert facts["disk_bytes"] > 10_000
    assert set(facts["kernels"]) == {"verify w4a16", "draft w4a8", "prefill w4a16"}


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_memory_is_that_of_the_loaded_model(models, monkeypatch, kv):
    facts = describe_model(models / "saved", dtype="bfloat16", kv=kv)["memory"]
    monkeypatch.undo()
    loaded = qspec_jax.load(models / "saved", dtype="bfloat16", kv=kv)
    assert facts["kv"] == loaded.decoder.kv
    assert facts["weight_bytes"] == loaded.nbytes
    assert facts["cache_bytes"][256][8] == loaded.decoder.create_cache(batch=8, capacity=256).nbytes
    left = facts["free_bytes"] - facts["weight_bytes"]
    assert facts["largest_batch"][256] == left // facts["cache_bytes"][256][1]


@pytest.fixture(scope="module")
def with_scales(tmp_path_factory):
    """Scales of files, of which float16 does not hold all; and checkpoints of them, with a head of 4 bits."""
    folder = tmp_path_factory.mktemp("scales")
    for name in ("gptq_8", "awq"):
        tiny_checkpoint(CASES[name]).write(folder / name)
    config = tiny_checkpoints.hf_config()
    tensors = tiny_checkpoints.gguf_tensors(config, tiny_checkpoints.hf_tensors(config))
    tiny_checkpoints.write_gguf(folder / "q8.gguf", config, tensors, linear_type=GGMLQuantizationType.Q8_0)
    opened = open_model(folder / "q8.gguf", "auto", head_bits=4)
    options = {"tokenizer": None, "quantization": opened.quantization, "recipe": {"name": "keep"}}
    with pytest.warns(RequantizationWarning, match="the LM head is stored as Q8_0"):
        read = opened.read(**decoder_options("auto", None))
    save_checkpoint(folder / "saved", read, **options)
    return folder


@pytest.mark.parametrize("asked", [{"quantization": QuantConfig(group_size=32)}, {"verify": "float"}])
@pytest.mark.parametrize("name", ["gptq_8", "awq", "q8.gguf", "saved"])
def test_scales_and_heads_are_counted_as_they_are_loaded(with_scales, monkeypatch, name, asked):
    facts = describe_model(with_scales / name, **asked)["memory"]
    monkeypatch.undo()
    opened = open_model(with_scales / name, **{"quantization": "auto", **asked})
    assert facts["weight_bytes"] == num_bytes(opened.read(**decoder_options("auto", None)))


@pytest.mark.parametrize(("verify", "target"), [("auto", "w8a16"), ("w4a16", "w4a16"), ("float", "float")])
def test_kernels_are_those_of_the_target_that_was_asked_for(with_scales, verify, target):
    passes = describe_model(with_scales / "saved", verify=verify)["kernels"]
    assert set(passes) == {f"verify {target}", "draft w4a8", f"prefill {target}"}


@pytest.mark.parametrize("bits", [16, 8])
def test_a_head_that_a_checkpoint_has_not_is_refused_as_by_loading(with_scales, bits):
    with pytest.raises(UsageError, match=f"head_bits={bits}: the LM head of saved is stored in 4 bits alone"):
        describe_model(with_scales / "saved", heads={"head_bits": bits})


@pytest.mark.parametrize(("free", "largest"), [(None, None), (10, {256: 0})])
def test_what_does_not_fit_or_is_unknown_is_said(models, monkeypatch, free, largest):
    monkeypatch.setattr("qspec_jax.inspection.model.available_bytes", lambda: free)
    facts = describe_model(models / "saved")
    assert facts["memory"]["largest_batch"] == largest
    assert ("do not fit" in text.model_text(facts)) is (free is not None)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["no/such.gguf"], 1, "no such file or directory"),
        (["{}/empty"], 1, "has no config.json"),
        (["{}/saved", "--kernels", "triton"], 2, "kernels='triton' does not work on this cpu device"),
        (["{}/hf", "--group-size", "128"], 2, "cannot quantise this model"),
        (["{}/saved", "--kv", "bf16", "--dtype", "float32"], 2, "kv='bf16' is the cache of a model in bfloat16"),
        (["{}/hf", "--mesh", "model=7"], 2, "mesh: model=7 does not split"),
        (["{}/hf", "--mesh", "pipe=2"], 2, "use data=N,model=N"),
        (["--mesh", "model=2"], 2, "--mesh is of a MODEL, which is missing"),
    ],
)
def test_errors_are_those_of_the_other_commands(models, capsys, arguments, code, line):
    assert info.main([argument.format(models) for argument in arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert line in said


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_a_mesh_shares_weights_heads_and_rows_without_so_many_devices(models, capsys, kv):
    def memory(*arguments):
        assert info.main([f"{models}/saved", "--json", "--kv", kv, *arguments]) == 0
        return json.loads(capsys.readouterr().out)["memory"]

    one, two, four = memory(), memory("--mesh", "model=2"), memory("--mesh", "data=3,model=2")
    assert one["weight_bytes"] > two["weight_bytes"] > one["weight_bytes"] / 2  # norms are on both
    rounded_up = {"model": 0, "int8": 2}[kv]  # scales of keys, which a block shares: a byte for each of two layers
    assert two["cache_bytes_per_token"] * 2 == one["cache_bytes_per_token"] + rounded_up
    assert four["weight_bytes"] == two["weight_bytes"]
    assert four["kv"] == kv
    first = next(iter(one["cache_bytes"]))
    assert four["cache_bytes"][first]["8"] == two["cache_bytes"][first]["1"] * 3
    assert four["largest_batch"][first] % 3 == 0
    assert info.main([f"{models}/saved", "--mesh", "data=3,model=2"]) == 0
    assert "on each device of data=3,model=2" in " ".join(capsys.readouterr().out.split())


def on_gpu(monkeypatch, capability):
    client = SimpleNamespace(platform_version="cuda 13000")
    device = SimpleNamespace(platform="gpu", compute_capability=capability, client=client, device_kind="a GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda *_: [device])


def runs(monkeypatch, capability, config=LLAMA_8B):
    on_gpu(monkeypatch, capability)
    formats = dict.fromkeys(layer_anatomy(config).linears, WeightFormat(128, True))
    passes = kernel_choices(config, quantization=QuantConfig(), formats=formats, kernels=None, dtype="bfloat16")
    return {(name.split()[0], choice.part): choice for name, choices in passes.items() for choice in choices}


def test_a_gpu_without_kernels_runs_the_reference_and_says_why(monkeypatch):
    choices = runs(monkeypatch, "7.5")
    assert {choice.runs for choice in choices.values()} == {"reference"}
    assert choices["verify", "mlp.down"].others["triton"].endswith("8.0 or newer; this one has 7.5")


@pytest.mark.newest_jax
def test_kernels_are_those_that_the_models_own_calls_select(monkeypatch):
    pytest.importorskip("pallas_kernels.backends.mosaic.registers", exc_type=ImportError)
    choices = runs(monkeypatch, "9.0")
    assert {choices[one, "mlp.down"].runs for one in ("verify", "draft", "prefill")} == {"mosaic"}
    assert choices["verify", "mlp.down"].others["triton"] == "comes after mosaic, which serves the call"
    gates = {one: choices[one, "mlp.gate_up"].op for one in ("verify", "draft", "prefill")}
    assert gates == {"verify": "w4a16_swiglu", "draft": "w4a4_swiglu_quantize", "prefill": "w4a16_matmul"}
    assert [one for one, part in choices if part.startswith("swiglu")] == ["prefill"]
    assert choices["verify", "decode_attention"].runs == "triton"
    assert choices["prefill", "prefill_attention"].runs == "triton"
    assert choices["draft", "rms_norm_quantize"].others["mosaic"] == "does not exist for this operation"


def test_without_a_model_versions_devices_and_kernels_are_shown(capsys, monkeypatch):
    assert info.main([]) == 0
    shown = capsys.readouterr().out
    for words in (
        "qspec-jax",
        "jaxlib 0.",
        "device          cpu",
        "triton kernels  do not run here: needs an NVIDIA GPU",
    ):
        assert words in shown

    def fail():
        raise RuntimeError("Unable to initialize backend 'foo': no such thing")

    monkeypatch.setattr(jax, "default_backend", fail)
    facts = machine.describe_machine()
    assert "no such thing" in facts["problem"]
    assert facts["devices"] == []
    assert "no such thing" in text.machine_text(facts)
    assert info.main(["--self-test", "--op", "swiglu"]) == 1
    assert "error: JAX" in capsys.readouterr().err
