"""Reading checkpoints: from a name or a path to tensors under canonical names."""

from qspec_jax.loading.parameters import (
    CheckpointSource,
    FourBitFormat,
    ParameterSpec,
    QuantizedTensor,
    TensorEntry,
    check_entries,
    expected_parameters,
)
from qspec_jax.loading.resolve import open_source, resolve_model

__all__ = [
    "CheckpointSource",
    "FourBitFormat",
    "ParameterSpec",
    "QuantizedTensor",
    "TensorEntry",
    "check_entries",
    "expected_parameters",
    "open_source",
    "resolve_model",
]
