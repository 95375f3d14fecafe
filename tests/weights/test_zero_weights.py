"""Files that end in zeros, as a download leaves them that took its room first and was interrupted; and zeros meant."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from qspec_jax.errors import CheckpointError, CheckpointWarning
from qspec_jax.weights.resolve import open_source
from qspec_jax.weights.source import QuantizedTensor
from tests.weights.prequantized_packers import CASES, tiny_checkpoint
from tests.weights.tiny_checkpoints import gguf_tensors, hf_config, hf_tensors, write_gguf, write_hf

UP = "model.layers.1.mlp.up_proj"
CONFIG = hf_config("Qwen2ForCausalLM")
EMPTY = r": all (\w+ are zero|codes are the same) of {}, .* interrupted .*; compare the checksum .*, or fetch it again"
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"]


def written(path, kind):
    """A file of weights."""
    if kind in CASES:
        tiny_checkpoint(CASES[kind]).write(path)
    elif kind in ("float32", "float16", "bfloat16"):
        write_hf(path, CONFIG, hf_tensors(CONFIG, np.dtype(getattr(ml_dtypes, kind, kind))))
    else:
        tensors = gguf_tensors(CONFIG, hf_tensors(CONFIG))
        return write_gguf(path / "m.gguf", CONFIG, tensors, linear_type=GGMLQuantizationType[kind])
    return path / "model.safetensors"


def interrupt(file):
    """Leaves its last third as it is before it is written."""
    content = file.read_bytes()
    kept = len(content) * 2 // 3
    file.write_bytes(content[:kept] + bytes(len(content) - kept))


def read_all(source):
    for name in source.specs:
        with contextlib.suppress(CheckpointError):  # zeros in `g_idx` are an order of inputs that is not supported
            source.read(name)


def is_empty(tensor):
    arrays = (tensor.scale, tensor.offset) if isinstance(tensor, QuantizedTensor) else (tensor,)
    return not any(array.any() for array in arrays if array is not None)


@pytest.mark.parametrize(
    "kind", ["float32", "float16", "bfloat16", *(case for case in CASES if case != "qspec"), *TYPES]
)
def test_a_file_that_was_not_written_to_its_end_is_named_when_it_is_opened_and_when_it_is_read(tmp_path, kind):
    file = written(tmp_path, kind)
    whole = open_source(file.parent)  # a warning is an error
    assert not any(is_empty(whole.read(name)) for name in whole.specs)
    interrupt(file)
    with pytest.warns(CheckpointWarning, match=rf"{file.name}: its last 4,096 bytes are all zero"):
        source = open_source(file.parent)
    with pytest.warns(CheckpointWarning, match=EMPTY.format(".*")) as said:
        read_all(source)
    assert len(said) == 1, "once for a model"


@pytest.mark.filterwarnings("ignore:.*its last 4,096 bytes")
@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_every_tensor_that_is_never_zero_is_named_and_no_other(tmp_path, kind):
    config = hf_config("Qwen3ForCausalLM", attention_bias=True)
    tensors = {name: np.zeros_like(tensor) for name, tensor in hf_tensors(config).items()}
    tensors["lm_head.weight"][0] = 1  # else it equals the embedding
    write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, tensors))
    path = tmp_path / "m.gguf" if kind == "gguf" else write_hf(tmp_path, config, tensors)
    specs = open_source(path).specs
    for name, spec in specs.items():
        if spec.kind == "bias" or spec.part in ("attention.output", "mlp.down"):  # of layers put in, to be trained
            assert not open_source(path).read(name).any()
        elif name != "lm_head.weight":
            with pytest.warns(CheckpointWarning, match=EMPTY.format(name.replace(".", r"\."))):
                assert not open_source(path).read(name).any()


def test_a_head_in_codes_is_looked_at_as_well(tmp_path):
    tensors = gguf_tensors(CONFIG, hf_tensors(CONFIG))
    tensors["output.weight"][:] = 0
    file = write_gguf(tmp_path / "m.gguf", CONFIG, tensors, linear_type=GGMLQuantizationType.Q8_0)
    entry = open_source(file).entries["lm_head.weight"]
    assert entry.read_head is not None
    with pytest.warns(CheckpointWarning, match=r"all scales are zero of lm_head\.weight"):
        entry.read_head()


@pytest.mark.parametrize("case", CASES)
def test_codes_that_were_not_written_are_named_though_their_scales_are_there(tmp_path, case):
    checkpoint = tiny_checkpoint(CASES[case])
    names = [f"{UP}.{part}" for part in ("qweight", "weight_packed", "weight")]
    (name,) = (name for name in names if name in checkpoint.tensors)
    checkpoint.tensors[name] = np.zeros_like(checkpoint.tensors[name])
    source = open_source(checkpoint.write(tmp_path))
    with pytest.warns(CheckpointWarning, match=r"all codes are the same of layers\.1\.mlp\.up\.weight, as a"):
        source.read("layers.1.mlp.up.weight")


def test_rows_that_fill_a_linear_up_are_no_damage(tmp_path):
    tensors = hf_tensors(CONFIG)
    tensors["model.layers.1.mlp.up_proj.weight"][1:] = 0
    source = open_source(write_hf(tmp_path, CONFIG, tensors))
    assert source.read("layers.1.mlp.up.weight")[0].any()
