"""Which generation of TPU a program is for: that of the device, or of one that is only described.

A program may be compiled for a TPU that is not there, within a mesh that describes it
(``jax.sharding.use_abstract_mesh``); see ``qspec_jax/bench/tpu/compiler.py``.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import described_device

_WITHOUT_INTEGERS = ("TPU7x",)  # device kinds whose matrix unit multiplies floating point alone


def device_kind() -> str:
    """As JAX names it: ``TPU v5 lite``, ``TPU v6 lite``, ``TPU7x``."""
    described = described_device()
    return jax.local_devices()[0].device_kind if described is None else described.device_kind


def has_integer_unit() -> bool:
    """Whether the matrix unit multiplies int8; where it does not, the compiler converts both operands."""
    return not device_kind().startswith(_WITHOUT_INTEGERS)
