"""``bench kernels``: single operations by the GPU's own clock."""
