"""Pallas on TPUs: decoding in words of 32 bits, what the matmuls share, and which generation there is."""
