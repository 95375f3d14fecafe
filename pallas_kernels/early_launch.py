"""Kernels that start before the one before them has ended: programmatic dependent launch, on NVIDIA Hopper.

A kernel that signals lets the next one start. That one then does what does not depend on the first, and waits for its
end. Here the kernels around the matmuls signal (``gpu_triton.start_next``), and a Mosaic matmul copies the first tiles
of its weight before it waits: they are on their way before there are activations to multiply.

This is right only in programs of which two things hold, so nothing of it happens outside of :func:`early_launch`:

- No kernel of the program writes a 4-bit weight: each is one of the program's arguments as it is, neither cut out of an
  array (a scan over layers) nor copied or computed. What the last program before this one wrote is safe behind any
  other kernel of this one.
- XLA starts none of its own kernels early, nor Triton's: it compiles kernels that read what the one before them writes
  as if nobody wrote it while they run. :data:`COMPILER_OPTIONS` tell it so. They also forbid command buffers, where a
  Mosaic kernel is a CUDA graph of its own (jax 0.11), which does not start before what is before it has ended.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax

COMPILER_OPTIONS: dict[str, Any] = {"xla_gpu_enable_pdl": False, "xla_gpu_graph_min_graph_size": 1_000_000}

_enabled: Any = jax.make_user_context(False)  # a part of the key under which jit finds what it traced


def early_launch() -> AbstractContextManager[None]:
    """A program traced in this context has kernels that start early; compile it with :data:`COMPILER_OPTIONS`."""
    return _enabled(True)


def is_enabled() -> bool:
    """Whether a kernel that is traced now may start early, and let the next one."""
    return bool(_enabled.value)


def is_supported() -> bool:
    """Whether it does anything: from jax 0.11 on, on the GPUs for which there are Mosaic kernels."""
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11):
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
