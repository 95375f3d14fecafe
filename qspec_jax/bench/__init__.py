"""``python -m qspec_jax.bench``: what the kernels reach on this machine, and which tiles suit it."""
