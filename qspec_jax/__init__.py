"""QSpec for JAX: 4-bit drafts verified at 16-bit activations, from one set of weights and one KV cache."""

from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.device.compilation_cache import enable_compilation_cache
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.engine.load import load, save
from qspec_jax.engine.pipeline import Pipeline
from qspec_jax.engine.results import GenerationResult, GenerationStats, RunTotals
from qspec_jax.errors import CheckpointError, OutOfMemoryError, QSpecError, UnsupportedModelError, UsageError
from qspec_jax.model.config import ActivationQuantization, ModelConfig, QuantConfig
from qspec_jax.model.precision import Precision

__version__ = "0.1.0"

__all__ = [
    "ActivationQuantization",
    "CheckpointError",
    "GenerationResult",
    "GenerationStats",
    "LanguageModel",
    "ModelConfig",
    "OutOfMemoryError",
    "Pipeline",
    "Precision",
    "QSpecError",
    "QuantConfig",
    "RunTotals",
    "SamplingParams",
    "UnsupportedModelError",
    "UsageError",
    "enable_compilation_cache",
    "load",
    "save",
]
