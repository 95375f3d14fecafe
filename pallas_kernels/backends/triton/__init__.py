"""Pallas Triton: tiles, the launch of a matmul, nibble decoding."""
