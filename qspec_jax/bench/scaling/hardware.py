"""The devices that predictions are made for. Each figure says where it is from."""

from __future__ import annotations

from qspec_jax.decoding.mesh_costs import Hardware, Links
from qspec_jax.device.bandwidth import COPY_BANDWIDTH

_USABLE = 0.9  # of the memory: the rest is XLA's, and of programs
# What a pass of Llama-3-8B shapes reaches of the copy bandwidth, besides its time for each layer, measured on one GPU.
_SHARES = {"of_weights": 0.95, "of_cache": 0.92}
# Measured with two H200s (page 063 of the lab notebook): letters that a kernel writes into the memory of the other GPU,
# each value with as many bytes that say that it is there. The data sheet of NVLink 4 says 450 GB/s.
_NVLINK = Links(170e9, 2.2e-6)
# What NCCL makes of it (page 052) with messages of half a megabyte, and a message with the kernel before it: so do GPUs
# of several processes.
NCCL = Links(130e9, 9e-6)
_NETWORK = Links(50e9, 20e-6)  # 400 Gbit/s for each GPU; the latency is a guess
_GPU = {"bf16": 825e12, "int8": 1571e12, "links": _NVLINK, "network": _NETWORK, "host": 8, **_SHARES}

HARDWARE = {
    # Copies and matmuls as measured on one device, and a layer as on one of each kind.
    "h100": Hardware("h100", _USABLE * 80e9, COPY_BANDWIDTH["H100"], layer_s=25e-6, **_GPU),
    "h200": Hardware("h200", _USABLE * 141e9, COPY_BANDWIDTH["H200"], layer_s=34e-6, **_GPU),
    # Peaks of the data sheet; two links of 45 GB/s along an axis of the torus, within a pod. That it reads its weights
    # at the share of an H100 whose layers cost nothing besides, and latencies, are guesses.
    "v5e": Hardware(
        "v5e",
        _USABLE * 16e9,
        COPY_BANDWIDTH["TPU v5 lite"],
        layer_s=0.0,
        of_weights=0.645,
        of_cache=0.92,
        bf16=197e12,
        int8=394e12,
        links=Links(90e9, 5e-6),
        network=Links(25e9, 50e-6),
        host=256,
    ),
}
