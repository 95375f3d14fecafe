"""Which programs GPUs run from CUDA graphs, as options of XLA's compiler.

A graph runs without the host, which pays where a program repeats it: a cycle of decoding is hundreds of kernels of a
few microseconds. A prefill runs once, and to record it takes longer than to launch it: 2 to 3 ms of a pass of
Llama-3-8B (lab notebook, 053).
"""

from __future__ import annotations

import enum
import functools

import jax

_OPTION = "xla_gpu_enable_command_buffer"
# What XLA records if nobody says otherwise, and messages. Each of them would end a graph, 65 times in a step of 32
# layers: 13% longer on two H200s.
_WITH_MESSAGES = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,COLLECTIVES"
# XLA's experimental kernels for messages are not used: one process would have others than several, and outside of
# graphs.
_NO_KERNELS = {"xla_gpu_experimental_use_collective_kernels": ""}


class Graphs(enum.Enum):
    """What of a program is recorded: nothing, what XLA chooses, or messages between devices as well."""

    NONE = ""
    USUAL = None
    WITH_MESSAGES = _WITH_MESSAGES


@functools.cache
def compiler_options(graphs: Graphs, *, on_mesh: bool) -> dict[str, str]:
    """Options of XLA for programs of these devices, of those that it knows."""
    if jax.default_backend() != "gpu":
        return {}
    options = dict(_NO_KERNELS) if on_mesh else {}
    if graphs is not Graphs.USUAL:
        options[_OPTION] = graphs.value
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
