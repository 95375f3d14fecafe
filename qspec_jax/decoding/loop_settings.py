"""How the loop of a plan runs on a device, besides what it computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32

from pallas_kernels.backends import early_launch
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.model.cache import KVCache
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.view import View

# A step of the demo model without and with early launches, on an H200 with jax 0.12, ms: 0.743 and 0.709 with one row,
# 0.774 and 0.786 with 8, 1.228 and 1.300 with 64 (docs/lab-notebook/015).
_FEW_ROWS = 4


def launches_early(decoder: Decoder, plan: DecodingPlan, cache: KVCache) -> bool:
    """Whether the kernels of a loop may start early (``backends/early_launch.py``); ask after ``lay_out_weights``.

    They may where nothing in any pass of the plan is an obstacle: the passes are traced to find out, as the loop traces
    them again. Most that are one read with XLA what our kernels have written: biases behind Triton kernels, norms of
    single heads, more rows than the LM head's kernel serves, products that XLA computes. Where no matmul reads its
    weight ahead, more than a few rows keep the device busy, and what starts early takes the room of what still runs.

    Args:
        decoder: with arrays or shapes.
        plan: what a cycle does.
        cache: of the loop, arrays or shapes.
    """
    if decoder.scan_layers or not early_launch.is_supported():
        return False
    passes = [(plan.verify, plan.draft_length + 1, plan.weigh)]
    passes += [] if plan.draft_view is None else [(plan.draft_view, 1, None)]
    with early_launch.early_launch():
        programs = [_traced(decoder, cache, *one) for one in passes]
    if any(early_launch.obstacle(program) is not None for program in programs):
        return False
    return len(cache.lengths) <= _FEW_ROWS or any(map(early_launch.reads_ahead, programs))


def _traced(decoder: Decoder, cache: KVCache, view: View, num_tokens: int, weigh: int | None) -> Any:
    """The pass that reads so many new tokens of each row, as a jaxpr."""
    graph, parameters = nnx.split(decoder)
    tokens = jax.ShapeDtypeStruct((cache.lengths.shape[0], num_tokens), jnp.int32)

    def run(parameters: nnx.State, tokens: Int32[Array, "B T"], cache: KVCache) -> Any:
        return nnx.merge(graph, parameters).run(tokens, cache, precision=view, weigh=weigh)

    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (parameters, cache))
    return jax.make_jaxpr(run)(shapes[0], tokens, shapes[1])


def cycles_per_check(plan: DecodingPlan) -> int:
    """Cycles that a loop runs between two looks at whether to go on.

    On a GPU the host waits for the device at each look, and queues kernels ahead between them. On an H100 a look costs
    about 0.1 ms, and a step of an 8B model 2.6 ms (docs/results.md).
    """
    if jax.default_backend() != "gpu":
        return 1
    return 4 if plan.draft_view is None else 2
