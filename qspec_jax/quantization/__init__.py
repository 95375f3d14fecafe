"""Ways to turn float weights into 4-bit ones: pure functions from arrays to arrays."""
