"""What memories of devices copy in a second: the least time of a pass follows from it."""

from __future__ import annotations

import jax

# By a part of the name of the kind of device. GPUs as measured on one, TPUs by the data sheet.
COPY_BANDWIDTH = {"H100": 3.03e12, "H200": 4.3e12, "TPU v5 lite": 0.82e12}


def copy_bandwidth() -> float | None:
    """Bytes per second of the first device of this process; None if it is not known."""
    kind = jax.local_devices()[0].device_kind
    return next((one for name, one in COPY_BANDWIDTH.items() if name in kind), None)
