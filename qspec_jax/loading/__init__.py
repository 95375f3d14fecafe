"""Reading checkpoints: from a name or a path to tensors under canonical names."""

from qspec_jax.loading.parameters import CheckpointSource, FourBitFormat, QuantizedTensor, TensorEntry, check_entries
from qspec_jax.loading.resolve import open_source, resolve_model
from qspec_jax.model.parameters import ParameterSpec, expected_parameters

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
