"""The two configurations of a model: what it computes, and how it is quantised.

``ModelConfig`` is read from a Hugging Face ``config.json`` (a GGUF file's metadata is first put in the
same terms), so no shape and no model name appears in code. Everything a supported architecture may
say is either honoured or refused with the list of what works.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qspec_jax.errors import UnsupportedModelError, UsageError

DTYPES = ("float32", "bfloat16")  # of what is not quantised
GROUP_SIZES = (32, 64, 128)  # inputs per weight scale, besides None
WHOLE_ROW = "row"  # for people: the group size None
ACTIVATION_GROUP = 32  # of W4A4 drafts, unless somebody says otherwise; recipes that group channels keep to it
SUPPORTED_QUANTIZATION_METHODS = ("gptq", "awq", "compressed-tensors")  # options: weights/huggingface/layouts.py


@dataclasses.dataclass(frozen=True)
class Family:
    """How a ``config.json`` of an architecture is read; the defaults are those of Llama.

    Attributes:
        models: that are of it, for people.
        model_type: names it where ``architectures`` is missing.
        biases: of attention. ``configured``: ``attention_bias`` is for all projections. ``qkv``: query, key and value
            have one and the output has none, whatever the config says.
        qk_norm: queries and keys are normalised, head by head.
        head_dim: where the config has none; None for ``hidden_size / num_attention_heads``.
        sliding_window: the config's entry is ``ignored``, ``used`` if it is there, or ``optional``: used in the layers
            that ``use_sliding_window`` and its companions say.
    """

    models: str
    model_type: str
    biases: Literal["configured", "qkv"] = "configured"
    qk_norm: bool = False
    head_dim: int | None = None
    sliding_window: Literal["ignored", "used", "optional"] = "ignored"


FAMILIES = {
    "LlamaForCausalLM": Family("Llama 2, 3, 3.1+, SmolLM2", "llama"),
    "MistralForCausalLM": Family("Mistral", "mistral", sliding_window="used"),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", "qwen2", biases="qkv", sliding_window="optional"),
    "Qwen3ForCausalLM": Family("Qwen3", "qwen3", qk_norm=True, head_dim=128, sliding_window="optional"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, as ``rope_scaling`` of a Hugging Face config.

    Attributes:
        kind: ``linear`` divides every frequency by ``factor``; ``llama3`` only the low ones, with a
            smooth transition between the two wavelength bounds.
        factor: the divisor.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: used by ``llama3``.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder. Field names follow Hugging Face where they exist there.

    ``down_hadamard`` belongs to rotated models (``quantization/rotation.py``): the inputs of the down projection go
    through ``pallas_kernels.hadamard`` first, ``hadamard_block`` of them at a time (None: all), as its weight expects.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    down_hadamard: bool = False
    hadamard_block: int | None = None
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, field) <= 0:
                raise UnsupportedModelError(f"config: {field}={getattr(self, field)} must be positive")
        if self.head_dim <= 0 or self.head_dim % 2:
            raise UnsupportedModelError(f"config: head_dim={self.head_dim} must be positive and even (rotary pairs)")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"config: num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output rows of the query, key and value projections."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a parsed Hugging Face ``config.json``.

        Raises:
            UnsupportedModelError: the architecture or one of its options is not supported; the message
                names those that are, or a required entry is missing.
        """
        family = _family(config)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [key for key in required if not isinstance(config.get(key), int)]:
            raise UnsupportedModelError(f"config.json: missing or not an integer: {', '.join(missing)}")
        _refuse_unsupported_options(config)
        rope_theta, rope_scaling = _rope(config)
        num_heads = config["num_attention_heads"]
        attention_bias = bool(config.get("attention_bias", False))
        eos = config.get("eos_token_id")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or family.head_dim or config["hidden_size"] // num_heads,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_window=_sliding_window(config, family),
            qkv_bias=attention_bias or family.biases == "qkv",
            output_bias=attention_bias and family.biases == "configured",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        )


def _family(config: Mapping[str, Any]) -> Family:
    named, model_type = list(config.get("architectures") or []), config.get("model_type")
    if not named:
        named = [name for name, family in FAMILIES.items() if family.model_type == model_type]
    for name in named:
        if name in FAMILIES:
            return FAMILIES[name]
    supported = ", ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
    given = ", ".join(named) or str(model_type or "nothing")
    raise UnsupportedModelError(f"config.json names {given}, which is not supported; supported: {supported}")


def _refuse_unsupported_options(config: Mapping[str, Any]) -> None:
    problems = []
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        problems.append(f"hidden_act={activation!r} (supported: silu)")
    rope = config.get("rope_parameters") or {}
    if (partial := config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={partial} (supported: 1.0)")
    if (quantization := quantization_config(config)) is not None:
        method = quantization.get("quant_method", "unknown")
        if method not in SUPPORTED_QUANTIZATION_METHODS:
            problems.append(
                f"quantization_config with quant_method={method!r} (supported: "
                f"{', '.join(SUPPORTED_QUANTIZATION_METHODS)}; or use the unquantised checkpoint or a GGUF file)"
            )
    if problems:
        raise UnsupportedModelError(f"config.json asks for {'; '.join(problems)}")


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How a checkpoint says that it is quantised, also under the name that llm-compressor used at first."""
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, Mapping) else None


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads both spellings: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``."""
    parameters = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    theta = config.get("rope_theta") or parameters.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(theta), None
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise UnsupportedModelError(f"config.json: rope scaling {kind!r} is not supported; supported: linear, llama3")
    if missing := [key for key in needed[kind] if parameters.get(key) is None]:
        raise UnsupportedModelError(f"config.json: rope scaling {kind!r} lacks {', '.join(missing)}")
    numbers = {key: float(parameters[key]) for key in needed[kind]}
    if kind == "linear":
        return float(theta), RopeScaling("linear", numbers["factor"])
    original = int(numbers.pop("original_max_position_embeddings"))
    return float(theta), RopeScaling("llama3", original_max_position_embeddings=original, **numbers)


def _sliding_window(config: Mapping[str, Any], family: Family) -> int | None:
    window = config.get("sliding_window")
    if window is None or family.sliding_window == "ignored":
        return None
    if family.sliding_window == "optional":
        if not config.get("use_sliding_window", False):
            return None
        num_full = config.get("max_window_layers", 28)  # without layer_types, the first ones
        kinds = set(config.get("layer_types") or []) or {
            "full_attention" if layer < num_full else "sliding_attention"
            for layer in range(config["num_hidden_layers"])
        }
        if len(kinds) > 1:
            raise UnsupportedModelError(
                "config.json mixes sliding and full attention layers; supported: the same attention in every layer"
            )
        if kinds == {"full_attention"}:
            return None
    return int(window)


@dataclasses.dataclass(frozen=True)
class ActivationQuantization:
    """How a draft precision turns activations into integers, on the fly.

    Attributes:
        group_size: inputs that share a scale, or None for one scale per token.
        symmetric: absmax scaling without an offset; otherwise minimum and maximum are both met.
        clip_ratio: fraction of the absolute maximum (or of the range) that is kept.
        outlier_groups: groups of each token, those with the widest range, that take 8 bits in ``W4A4``; all of
            them in a linear that has no more.
    """

    group_size: int | None = None
    symmetric: bool = True
    clip_ratio: float = 1.0
    outlier_groups: int = 0

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size <= 0:
            raise UsageError(f"activation group_size={self.group_size} must be positive, or None for per token")
        if not 0.0 < self.clip_ratio <= 1.0:
            raise UsageError(f"clip_ratio={self.clip_ratio} must be in (0, 1]")
        if self.outlier_groups < 0:
            raise UsageError(f"outlier_groups={self.outlier_groups} must not be negative")
        if self.outlier_groups and self.group_size is None:
            raise UsageError(f"outlier_groups={self.outlier_groups} needs groups: set group_size, to 32 for example")


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How weights are stored and how the two draft precisions quantise activations.

    Attributes:
        group_size: inputs per weight scale: 32, 64, 128, or None for the whole row.
        symmetric: weights rounded around zero point 8 without an offset.
        w4a4: activations of ``Precision.W4A4``. By default the loudest group of a token keeps 8 bits; with more
            ``outlier_groups`` acceptance rises towards that of ``w4a8``.
        w4a8: activations of ``Precision.W4A8``.

    Embedding, norms, biases and LM head are never quantised. A checkpoint whose weights are 4-bit
    already (GPTQ, AWQ, compressed-tensors, GGUF Q4_0 and Q4_1) keeps its own codes and groups:
    ``group_size`` and ``symmetric`` then apply only to its other linears.
    """

    group_size: int | None = 32
    symmetric: bool = False
    w4a4: ActivationQuantization = ActivationQuantization(ACTIVATION_GROUP, symmetric=False, outlier_groups=1)
    w4a8: ActivationQuantization = ActivationQuantization()

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise UsageError(f"group_size={self.group_size} is not supported; use 32, 64, 128 or None (whole row)")


def parse_group_size(value: int | str) -> int | None:
    """A group size as recipes and options write it: a number, or ``row`` for the whole row.

    Raises:
        UsageError: it is neither.
    """
    if value == WHOLE_ROW:
        return None
    try:
        return int(value)
    except ValueError as error:
        raise UsageError(f"group_size={value!r} is not supported; use a number or {WHOLE_ROW!r}") from error
