"""The two configurations of a model: what it computes, and how it is quantised.

``ModelConfig`` is read from a Hugging Face ``config.json`` (a GGUF file's metadata is first put in the
same terms), so no shape and no model name appears in code. Everything a supported architecture may
say is either honoured or refused with the list of what works.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from qspec_jax.errors import UnsupportedModelError, UsageError
from qspec_jax.model import fields
from qspec_jax.model.rope_scaling import DEFAULT_THETA, RopeScaling, number, read_rope, rope_parameters, shown, truth

DTYPES = ("float32", "bfloat16")  # of what is not quantised
KV_NAMES = ("model", "bf16", "int8")  # of what keys and values are kept as
GROUP_SIZES = (32, 64, 128)  # inputs per weight scale, besides None
WEIGHT_BITS = (4, 8)
HEAD_BITS = (8, 4)  # besides the 16 of a head as it is
DRAFT_HEADS = (4,)
WHOLE_ROW = "row"  # for people: the group size None
ACTIVATION_GROUP = 32  # of W4A4 drafts, unless somebody says otherwise; recipes that group channels keep to it
# Their options are in weights/huggingface/formats.py.
SUPPORTED_QUANTIZATION_METHODS = ("gptq", "awq", "compressed-tensors", "auto-round")
_MAKERS = {  # of others, for people
    "aqlm": "AQLM",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes (NF4, FP4 or INT8)",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "FBGEMM (8-bit floats)",
    "fp8": "8-bit floats",
    "hqq": "HQQ",
    "mlx": "MLX",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "4-bit floats (MXFP4)",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "quip": "QuIP",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
_TELLING = {  # keys of settings that do not name their method
    "bitsandbytes": {"load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type"},
    "gptq": {"desc_act", "damp_percent", "true_sequential", "sym"},
    "awq": {"zero_point", "q_group_size", "w_bit"},
    "compressed-tensors": {"config_groups"},
    "modelopt": {"quant_algo"},
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_DEFAULT_WINDOW = 4096  # of transformers' configs of Mistral and Qwen
_LARGEST_SIZE, _MOST_LAYERS = 2**31 - 1, 10_000  # beyond both, a config is damaged


@dataclasses.dataclass(frozen=True)
class Family:
    """How a ``config.json`` of an architecture is read; the defaults are those of Llama.

    Attributes:
        models: that are of it, for people.
        model_type: names it where ``architectures`` is missing.
        biases: of attention. ``configured``: ``attention_bias`` is for all projections. ``qkv``: query, key and value
            have one and the output has none, whatever the config says. ``none``: likewise, there are none.
        mlp_biases: ``mlp_bias`` counts; others have none, whatever the config says.
        qk_norm: queries and keys are normalised, head by head.
        head_dim: where the config has none; None for ``hidden_size / num_attention_heads``.
        kv_heads: where the config does not say (null is ``num_attention_heads``); None for ``num_attention_heads``.
        max_positions: where the config has none.
        sliding_window: the config's entry is ``ignored``, ``used`` if it is there, or ``optional``: used in the layers
            that ``use_sliding_window`` and its companions say.
    """

    models: str
    model_type: str
    biases: Literal["configured", "qkv", "none"] = "configured"
    mlp_biases: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None
    max_positions: int = 2048
    sliding_window: Literal["ignored", "used", "optional"] = "ignored"


FAMILIES = {
    "LlamaForCausalLM": Family("Llama 2, 3, 3.1+, SmolLM2", "llama", mlp_biases=True),
    "MistralForCausalLM": Family(
        "Mistral", "mistral", biases="none", kv_heads=8, max_positions=131072, sliding_window="used"
    ),
    "Qwen2ForCausalLM": Family(
        "Qwen2, Qwen2.5", "qwen2", biases="qkv", kv_heads=32, max_positions=32768, sliding_window="optional"
    ),
    "Qwen3ForCausalLM": Family(
        "Qwen3", "qwen3", qk_norm=True, head_dim=128, kv_heads=32, max_positions=32768, sliding_window="optional"
    ),
}


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
    rope_theta: float = DEFAULT_THETA
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
            if not 0 < (size := getattr(self, field)) <= (_MOST_LAYERS if field == "num_layers" else _LARGEST_SIZE):
                raise UnsupportedModelError(f"config: {field}={shown(size)} must be positive and of a possible size")
        if not 0 < self.head_dim <= _LARGEST_SIZE or self.head_dim % 2:
            raise UnsupportedModelError(f"config: head_dim={shown(self.head_dim)} must be positive and even (pairs)")
        if not self.rms_norm_eps > 0 or self.max_position_embeddings <= 0:
            values = f"rms_norm_eps={self.rms_norm_eps}, max_position_embeddings={shown(self.max_position_embeddings)}"
            raise UnsupportedModelError(f"config: {values} must be positive")
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
        if missing := [key for key in required if not _is_whole(config.get(key))]:
            raise UnsupportedModelError(f"config.json: missing or not an integer: {', '.join(missing)}")
        _refuse_unsupported_options(config)
        positions = _whole(config, "max_position_embeddings") or family.max_positions
        rope_theta, rope_scaling = read_rope({**config, "max_position_embeddings": positions})
        num_heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
        attention_bias = family.biases != "none" and truth(config, "attention_bias")
        stretched = rope_scaling.scaled_length if rope_scaling is not None else 0
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(config, family),
            head_dim=_whole(config, "head_dim") or family.head_dim or hidden_size // max(num_heads, 1),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_window=_sliding_window(config, family),
            qkv_bias=attention_bias or family.biases == "qkv",
            output_bias=attention_bias and family.biases == "configured",
            mlp_bias=family.mlp_biases and truth(config, "mlp_bias"),
            qk_norm=family.qk_norm,
            tie_word_embeddings=truth(config, "tie_word_embeddings"),
            max_position_embeddings=max(positions, stretched),
            bos_token_id=next(iter(token_ids(config.get("bos_token_id"), config["vocab_size"])), None),
            eos_token_ids=token_ids(config.get("eos_token_id"), config["vocab_size"]),
        )


def token_ids(named: Any, vocab_size: int) -> tuple[int, ...]:
    """The tokens that an entry names, one or a list of them. An id that no token has, such as -1, means none."""
    listed = named if isinstance(named, (list, tuple)) else [named]
    return tuple(dict.fromkeys(one for one in listed if _is_whole(one) and 0 <= one < vocab_size))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(config: Mapping[str, Any], key: str) -> int | None:
    """The integer of an entry, None if it is missing or null."""
    value = config.get(key)
    if value is not None and not _is_whole(value):
        raise UnsupportedModelError(f"config.json: {key}={shown(value)} is not an integer")
    return value


def _num_kv_heads(config: Mapping[str, Any], family: Family) -> int:
    """As transformers reads it: null is one for each query head, and missing is the default of the family."""
    num_heads = config["num_attention_heads"]
    if "num_key_value_heads" in config or family.kv_heads is None:
        named = _whole(config, "num_key_value_heads")
        return num_heads if named is None else named
    if num_heads % family.kv_heads:
        raise UnsupportedModelError(
            f"config.json lacks num_key_value_heads, and {family.kv_heads}, which {family.models} has then, does not "
            f"divide num_attention_heads={num_heads}; add the entry"
        )
    return family.kv_heads


def _family(config: Mapping[str, Any]) -> Family:
    named, model_type = config.get("architectures") or [], config.get("model_type")
    named = [str(name) for name in (named if isinstance(named, (list, tuple)) else [named])]
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
    if (activation := config.get("hidden_act") or "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act={activation!r} (supported: silu)")
    partial = number(rope_parameters(config), "partial_rotary_factor", number(config, "partial_rotary_factor", 1.0))
    if partial != 1.0:
        problems.append(f"partial_rotary_factor={partial} (supported: 1.0)")
    if (quantization := quantization_config(config)) is not None:
        method = quantization_method(quantization)
        if method not in SUPPORTED_QUANTIZATION_METHODS:
            maker = f" of {_MAKERS[method]}" if method in _MAKERS else ""
            algorithm = quantization.get("quant_algo") or quantization.get("quant_type")
            maker += f" ({shown(algorithm)})" if algorithm else ""
            problems.append(
                f"quantization_config{maker} with quant_method={method!r} (supported: "
                f"{', '.join(SUPPORTED_QUANTIZATION_METHODS)}; or use the unquantised checkpoint or a GGUF file)"
            )
    if problems:
        raise UnsupportedModelError(f"config.json asks for {'; '.join(problems)}")


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How a checkpoint says that it is quantised, also under the names of llm-compressor's beginnings and of MLX.

    Raises:
        UnsupportedModelError: it says so with something else than an object.
    """
    if (own := config.get("quantization_config")) and not isinstance(own, Mapping):
        raise UnsupportedModelError(f"config.json: quantization_config={shown(own)} is neither an object nor null")
    for key in ("quantization_config", "compression_config", "quantization"):
        if (found := config.get(key)) and isinstance(found, Mapping):
            return found
    return None


def quantization_method(settings: Mapping[str, Any]) -> str:
    """The name of the method of a ``quantization_config``, by the options that it alone has if it is not named."""
    named = settings.get("quant_method")
    if named is None:
        named = next((method for method, keys in _TELLING.items() if settings.keys() & keys), "unknown")
        named = "mlx" if named == "unknown" and {"bits", "group_size"} <= settings.keys() else named
    named = str(named).lower().removeprefix("intel/")
    return named.replace("auto_round", "auto-round").replace("compressed_tensors", "compressed-tensors")


def _sliding_window(config: Mapping[str, Any], family: Family) -> int | None:
    config = {"sliding_window": _DEFAULT_WINDOW, **config}  # null is none, but missing is not
    if config["sliding_window"] is None or family.sliding_window == "ignored":
        return None
    if family.sliding_window == "optional":
        listed = _layer_types(config)
        if not truth(config, "use_sliding_window"):
            return None
        num_full = _whole(config, "max_window_layers")  # without layer_types, the first ones
        kinds = listed or {
            "full_attention" if layer < (28 if num_full is None else num_full) else "sliding_attention"
            for layer in range(min(config["num_hidden_layers"], _MOST_LAYERS))
        }
        if len(kinds) > 1:
            raise UnsupportedModelError(
                "config.json mixes sliding and full attention layers; supported: the same attention in every layer"
            )
        if kinds == {"full_attention"}:
            return None
    window = _whole(config, "sliding_window")
    if window is not None and window <= 0:
        raise UnsupportedModelError(f"config.json: sliding_window={shown(window)} must be positive, or null for none")
    return window


def _layer_types(config: Mapping[str, Any]) -> set[str]:
    listed = config.get("layer_types") or []
    if not isinstance(listed, list):
        raise UnsupportedModelError(f"config.json: layer_types={shown(listed)} is not a list")
    kinds = {str(kind) for kind in listed}
    if others := sorted(kinds - set(_LAYER_TYPES)):
        raise UnsupportedModelError(
            f"config.json: layer_types has {shown(others[0])} (supported: {', '.join(_LAYER_TYPES)})"
        )
    return kinds


@typing.no_type_check  # it takes values of any type, and checks them itself
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
        object.__setattr__(self, "group_size", fields.whole("activation group_size", self.group_size, or_none=True))
        object.__setattr__(self, "symmetric", fields.truth("symmetric", self.symmetric))
        object.__setattr__(self, "clip_ratio", fields.real("clip_ratio", self.clip_ratio))
        object.__setattr__(self, "outlier_groups", fields.whole("outlier_groups", self.outlier_groups))
        if self.group_size is not None and self.group_size <= 0:
            raise UsageError(f"activation group_size={self.group_size} must be positive, or None for per token")
        if not 0.0 < self.clip_ratio <= 1.0:
            raise UsageError(f"clip_ratio={self.clip_ratio} must be in (0, 1]")
        if self.outlier_groups < 0:
            raise UsageError(f"outlier_groups={self.outlier_groups} must not be negative")
        if self.outlier_groups and self.group_size is None:
            raise UsageError(f"outlier_groups={self.outlier_groups} needs groups: set group_size, to 32 for example")


class HeadFields(typing.TypedDict, total=False):
    """What may be said of the LM head alone: fields of a :class:`QuantConfig`."""

    head_bits: int | None
    draft_head: int | None


@typing.no_type_check  # it takes values of any type, and checks them itself
@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How weights are stored and how the two draft precisions quantise activations.

    Attributes:
        group_size: inputs per weight scale: 32, 64, 128, or None for the whole row.
        symmetric: weights rounded around the middle of the codes without an offset.
        bits: 4, or 8 for nested weights: drafts read the upper four bits of what verification reads.
        w4a4: activations of ``Precision.W4A4``. By default the loudest group of a token keeps 8 bits; with more
            ``outlier_groups`` acceptance rises towards that of ``w4a8``.
        w4a8: activations of ``Precision.W4A8``.
        head_bits: 8 or 4 to round the LM head to; None for the head as it is. In 8 bits it is nested,
            and one that a GGUF file has in Q8_0 keeps its codes.
        draft_head: 4 for drafts that read an LM head in 4 bits: the upper half of one in 8, or a copy of one as it is.
            None for the head that verifies.
        keep_floats: the linears of the checkpoint are kept in floating point besides: they verify what the 4-bit copy
            drafts.

    Embedding, norms and biases are never quantised, and the LM head only if asked for. A checkpoint whose weights are
    codes already (GPTQ, AWQ, compressed-tensors, GGUF Q4_0, Q4_1 and Q8_0) keeps its own codes and groups:
    ``group_size``, ``symmetric`` and ``bits`` then apply only to its other linears.
    """

    group_size: int | None = 32
    symmetric: bool = False
    w4a4: ActivationQuantization = ActivationQuantization(ACTIVATION_GROUP, symmetric=False, outlier_groups=1)
    w4a8: ActivationQuantization = ActivationQuantization()
    keep_floats: bool = False
    bits: int = 4
    head_bits: int | None = None
    draft_head: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_size", fields.whole("group_size", self.group_size, or_none=True))
        object.__setattr__(self, "symmetric", fields.truth("symmetric", self.symmetric))
        object.__setattr__(self, "keep_floats", fields.truth("keep_floats", self.keep_floats))
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise UsageError(f"group_size={self.group_size} is not supported; use 32, 64, 128 or None (whole row)")
        object.__setattr__(self, "bits", fields.whole("bits", self.bits))
        if self.bits not in WEIGHT_BITS:
            raise UsageError(f"bits={self.bits} is not supported; use 4, or 8 for nested weights")
        if self.bits == 8 and self.keep_floats:
            raise UsageError(
                "bits=8 (--bits 8) and keep_floats=True (--keep-floats) are two ways to verify a 4-bit draft; "
                "use one of them"
            )
        for name, allowed in (("head_bits", HEAD_BITS), ("draft_head", DRAFT_HEADS)):
            object.__setattr__(self, name, fields.whole(name, getattr(self, name), or_none=True))
            if getattr(self, name) not in (None, *allowed):
                raise UsageError(
                    f"{name}={getattr(self, name)} is not supported; use {' or '.join(map(str, allowed))} or None"
                )
        if self.head_bits is not None and self.keep_floats:
            raise UsageError(
                "head_bits (--head-bits) rounds the LM head, and verify='float' (keep_floats, --keep-floats) keeps a "
                "model's own output; use draft_head (--draft-head) for drafts, and --head-bits 16 where a checkpoint "
                "has a rounded head"
            )
        for name in ("w4a4", "w4a8"):
            if not isinstance(value := getattr(self, name), ActivationQuantization):
                raise UsageError(f"{name} is of type {type(value).__name__}; use an ActivationQuantization")

    @property
    def has_quantized_head(self) -> bool:
        """Whether there is an LM head in codes, for all passes or for drafts."""
        return self.head_bits is not None or self.draft_head is not None


def held_weights(quantization: QuantConfig | None) -> tuple[int | None, ...]:
    """``weight_bits`` of the views that a model can serve: 4 or 8 for codes, None for a checkpoint's own floats.

    Codes alone serve None as well, dequantised, which is no float of a checkpoint.
    """
    if quantization is None:
        return (None,)
    if quantization.bits == 8:
        return (8, 4)
    return (4, None) if quantization.keep_floats else (4,)


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
