"""Pallas Triton: tiles, the launch of a matmul, nibble decoding, producers of activations, measured tiles."""
