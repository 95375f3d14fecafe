"""The devices that predictions are made for. Each figure says where it is from; none of a link has been measured."""

from __future__ import annotations

from qspec_jax.decoding.mesh_costs import Hardware, Links
from qspec_jax.device.bandwidth import COPY_BANDWIDTH

_USABLE = 0.9  # of the memory: the rest is XLA's, and of programs
# Measured on one H100 (docs/results.md): what a pass of Llama-3-8B shapes reaches of the copy bandwidth.
_OF_WEIGHTS, _OF_CACHE = 0.645, 0.92
_NVLINK = Links(450e9, 10e-6)  # NVLink 4, one direction, of its data sheet; the latency is a guess
_NETWORK = Links(50e9, 20e-6)  # 400 Gbit/s for each GPU; the latency is a guess

HARDWARE = {
    # Copies and matmuls as measured on one device.
    "h100": Hardware(
        "h100", _USABLE * 80e9, COPY_BANDWIDTH["H100"], _OF_WEIGHTS, _OF_CACHE, 825e12, 1571e12, _NVLINK, _NETWORK, 8
    ),
    "h200": Hardware(
        "h200", _USABLE * 141e9, COPY_BANDWIDTH["H200"], _OF_WEIGHTS, _OF_CACHE, 825e12, 1571e12, _NVLINK, _NETWORK, 8
    ),
    # Peaks of the data sheet, shares as those of a GPU; two links of 45 GB/s along an axis of the torus, within a pod.
    "v5e": Hardware(
        "v5e",
        _USABLE * 16e9,
        COPY_BANDWIDTH["TPU v5 lite"],
        _OF_WEIGHTS,
        _OF_CACHE,
        197e12,
        394e12,
        Links(90e9, 5e-6),
        Links(25e9, 50e-6),
        256,
    ),
}
