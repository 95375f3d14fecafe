"""``bench tpu``: what the TPU's compiler makes of the kernels, on a machine without a TPU."""
