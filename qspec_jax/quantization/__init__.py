"""Ways to turn float weights into 4-bit ones."""

from qspec_jax.quantization.rtn import quantize_rtn

__all__ = ["quantize_rtn"]
