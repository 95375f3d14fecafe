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
# Those of pallas_kernels, the best first, torch's, and pairs of Mosaic programs, which the library does not choose yet.
TORCH, PAIRS = "torch", "mosaic_pairs"
W4A16_ALONE = (TORCH, PAIRS)
IMPLEMENTATIONS = ("triton", "mosaic", "tpu", "reference", *W4A16_ALONE)
