"""What ``bench kernels`` can time, by name; imports no JAX, so that a wrong name is refused at once."""

from __future__ import annotations

WEIGHT_ONLY = ("w4a16", "w8a16")  # of nested weights the second
MATMULS = (*WEIGHT_ONLY, "w4a8", "w4a4")
BASELINE = "bf16"
XLA = "xla"  # what multiplies the bfloat16 weights of the baseline
PRODUCERS = (
    *("quantize_a8", "quantize_a4", "swiglu", "swiglu_a8", "swiglu_a4"),
    *("hadamard", "swiglu_hadamard", "swiglu_hadamard_a8", "swiglu_hadamard_a4"),
)
OPS = (*MATMULS, BASELINE, *PRODUCERS)
# Those of pallas_kernels, the best first, and torch's.
TORCH = "torch"
IMPLEMENTATIONS = ("triton", "mosaic", "tpu", "reference", TORCH)
