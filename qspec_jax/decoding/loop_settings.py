"""How the loop of a plan runs on a device, besides what it computes."""

from __future__ import annotations

import jax

from pallas_kernels import Layout, QuantizedWeight
from pallas_kernels.backends import early_launch
from pallas_kernels.float_matmul.reference import MAX_ROWS
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.model.cache import KV_OF_MODEL
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.layouts import linears
from qspec_jax.model.precision import Precision


def launches_early(decoder: Decoder, plan: DecodingPlan, rows: int) -> bool:
    """Whether the kernels of a loop may start early (``backends/early_launch.py``); ask after ``lay_out_weights``.

    They may where every weight is one of the loop's arguments, Mosaic multiplies all of them, and XLA has nothing to do
    between a kernel that signals and the matmul behind it: no matmul in floating point, no padding of rows, no sums of
    activation codes for asymmetric weights, no norms of single heads that it puts together, no LM head of many rows.
    What no GPU has run so does not start early: nested weights, quantised heads, a cache of int8.
    """
    if decoder.scan_layers or decoder.config.qk_norm or not early_launch.is_supported():
        return False
    if not {view.precision for view in plan.views} <= {Precision.W4A16, Precision.W4A8}:
        return False
    if decoder.quantized_head is not None or decoder.kv != KV_OF_MODEL:
        return False
    if any(n > MAX_ROWS or (n > 8 and n % 8) for n in (rows, rows * (plan.draft_length + 1))):
        return False
    weights = [linear.weight.get_value() for linear in linears(decoder)]
    return all(
        isinstance(w, QuantizedWeight) and w.bits == 4 and w.layout is Layout.WGMMA and w.symmetric for w in weights
    )


def cycles_per_check(plan: DecodingPlan) -> int:
    """Cycles that a loop runs between two looks at whether to go on.

    On a GPU the host waits for the device at each look, and queues kernels ahead between them. On an H100 a look costs
    about 0.1 ms, and a step of an 8B model 2.6 ms (docs/results.md).
    """
    if jax.default_backend() != "gpu":
        return 1
    return 4 if plan.draft_view is None else 2
