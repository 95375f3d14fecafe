"""QSpec for JAX: 4-bit drafts verified at 16-bit activations, from one set of weights and one KV cache.

Importing the package imports nothing else of it, and no JAX, until one of its names is used (PEP 562): a command
answers ``--help`` and wrong options at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qspec_jax.decoding.own_program import begin_decoding
    from qspec_jax.decoding.plan import AutoPlan, DecodingPlan, Lookup
    from qspec_jax.decoding.sampling_params import SamplingParams
    from qspec_jax.decoding.speculative import cycle
    from qspec_jax.decoding.speedup import acceptance_for, expected_tokens
    from qspec_jax.decoding.state import DecodeState
    from qspec_jax.device.compilation_cache import enable_compilation_cache
    from qspec_jax.engine.answer import Answer, Piece
    from qspec_jax.engine.language_model import LanguageModel
    from qspec_jax.engine.load import load, save
    from qspec_jax.engine.pipeline import Pipeline
    from qspec_jax.engine.results import GenerationResult, GenerationStats, RunTotals
    from qspec_jax.engine.service import Service
    from qspec_jax.engine.session import Session
    from qspec_jax.engine.together import join
    from qspec_jax.errors import (
        CheckpointError,
        DeviceError,
        OutOfMemoryError,
        QSpecError,
        UnsupportedModelError,
        UsageError,
    )
    from qspec_jax.model.config import ActivationQuantization, ModelConfig, QuantConfig
    from qspec_jax.model.precision import Precision
    from qspec_jax.model.view import View
    from qspec_jax.quantization.rtn import quantize_rtn

__version__ = "0.1.0"

__all__ = [
    "ActivationQuantization",
    "Answer",
    "AutoPlan",
    "CheckpointError",
    "DecodeState",
    "DecodingPlan",
    "DeviceError",
    "GenerationResult",
    "GenerationStats",
    "LanguageModel",
    "Lookup",
    "ModelConfig",
    "OutOfMemoryError",
    "Piece",
    "Pipeline",
    "Precision",
    "QSpecError",
    "QuantConfig",
    "RunTotals",
    "SamplingParams",
    "Service",
    "Session",
    "UnsupportedModelError",
    "UsageError",
    "View",
    "acceptance_for",
    "begin_decoding",
    "cycle",
    "enable_compilation_cache",
    "expected_tokens",
    "join",
    "load",
    "quantize_rtn",
    "save",
]

# The module of each name, as the imports above have it.
_MODULES = {
    "ActivationQuantization": "qspec_jax.model.config",
    "CheckpointError": "qspec_jax.errors",
    "Answer": "qspec_jax.engine.answer",
    "AutoPlan": "qspec_jax.decoding.plan",
    "DecodeState": "qspec_jax.decoding.state",
    "DecodingPlan": "qspec_jax.decoding.plan",
    "DeviceError": "qspec_jax.errors",
    "GenerationResult": "qspec_jax.engine.results",
    "GenerationStats": "qspec_jax.engine.results",
    "LanguageModel": "qspec_jax.engine.language_model",
    "Lookup": "qspec_jax.decoding.plan",
    "ModelConfig": "qspec_jax.model.config",
    "OutOfMemoryError": "qspec_jax.errors",
    "Piece": "qspec_jax.engine.answer",
    "Pipeline": "qspec_jax.engine.pipeline",
    "Precision": "qspec_jax.model.precision",
    "QSpecError": "qspec_jax.errors",
    "QuantConfig": "qspec_jax.model.config",
    "RunTotals": "qspec_jax.engine.results",
    "SamplingParams": "qspec_jax.decoding.sampling_params",
    "Service": "qspec_jax.engine.service",
    "Session": "qspec_jax.engine.session",
    "UnsupportedModelError": "qspec_jax.errors",
    "UsageError": "qspec_jax.errors",
    "View": "qspec_jax.model.view",
    "acceptance_for": "qspec_jax.decoding.speedup",
    "begin_decoding": "qspec_jax.decoding.own_program",
    "cycle": "qspec_jax.decoding.speculative",
    "enable_compilation_cache": "qspec_jax.device.compilation_cache",
    "expected_tokens": "qspec_jax.decoding.speedup",
    "join": "qspec_jax.engine.together",
    "load": "qspec_jax.engine.load",
    "quantize_rtn": "qspec_jax.quantization.rtn",
    "save": "qspec_jax.engine.load",
}


def __getattr__(name: str) -> Any:
    """A public name on its first use; later ones find it in the module itself."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    """What is here and what will be."""
    return sorted({*globals(), *__all__})
