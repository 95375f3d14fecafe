"""Kernels that start before the one before them has ended: programmatic dependent launch, on NVIDIA Hopper.

A kernel that signals lets the next one start. That one then does what does not depend on the first, and waits for its
end. Here the kernels whose results a matmul reads signal (``gpu_triton.start_next``; a Hadamard transform alone does
not), and a Mosaic matmul copies the first tiles of its weight before it waits: they are on their way before there are
activations to multiply.

This is right only in programs of which two things hold, so nothing of it happens outside of :func:`early_launch`:

- No kernel of the program writes a 4-bit weight: each is one of the program's arguments as it is, neither cut out of an
  array (a scan over layers) nor copied or computed. What the last program before this one wrote is safe behind any
  other kernel of this one.
- What a kernel that signals has written is read by kernels of this package alone, until one of those that does not
  signal has ended. XLA's own read what they are given through the path for data that nobody writes meanwhile
  (``ld.global.nc``), unless the kernel before them is one of its own that signals.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax

_enabled: Any = jax.make_user_context(False)  # a part of the key under which jit finds what it traced


def early_launch(enabled: bool = True) -> AbstractContextManager[None]:
    """A program traced in this context has kernels that start early, or has none."""
    return _enabled(enabled)


def is_enabled() -> bool:
    """Whether a kernel that is traced now may start early, and let the next one."""
    return bool(_enabled.value)


def is_supported() -> bool:
    """Whether it does anything: from jax 0.12 on, on the GPUs for which there are Mosaic kernels.

    Before, a command buffer held a Mosaic kernel as a CUDA graph of its own, and such a graph does not start early.
    """
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 12):
        return False
    return str(getattr(jax.local_devices()[0], "compute_capability", "")).startswith("9.")
