"""Tries tiles of the Triton matmuls on the device: compiles, runs, compares and times them."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import QuantizedWeight, value_of
from pallas_kernels.backends.triton.tiles import TileConfig
from pallas_kernels.backends.triton.tuning import DECODE_ROWS
from pallas_kernels.w4a4_matmul import gpu_triton as w4a4_triton
from pallas_kernels.w4a16_matmul import gpu_triton as w4a16_triton
from qspec_jax.bench.kernels import operands
from qspec_jax.bench.kernels.operands import Workload
from qspec_jax.bench.timing import compile_calls, run_in_threads, time_calls
from qspec_jax.bench.tune.search import PREFILL_ROWS, Trial
from qspec_jax.bench.tune.tile_space import Problem

_CHECKED_ROWS = (1, 7, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 255, 256)
_SHIFT = 5  # rows that the last check moves rows by


class TritonLaboratory:
    """One problem on the default device. See :class:`qspec_jax.bench.tune.search.Laboratory`."""

    def __init__(self, problem: Problem, *, repeats: int, interpret: bool = False):
        """Makes the weights.

        Args:
            problem: the operation and the weight.
            repeats: timed runs of a candidate, of which the median counts.
            interpret: run the kernels without a GPU, slowly.
        """
        self.problem = problem
        self.repeats = repeats
        self.interpret = interpret
        plain = operands.random_weights(
            problem.k, problem.n, group_size=problem.group_size, symmetric=problem.symmetric
        )
        self.weights: Sequence[QuantizedWeight] = operands.weights_for(problem.op, plain)
        x = operands.random_rows(PREFILL_ROWS, problem.k)
        self._most_rows = operands.matmul_workload(problem.op, x, self.weights)

    def workload(self, rows: int) -> Workload:
        """The first rows of the largest number of them, so that row counts have their rows in common."""
        return self._most_rows.of_first(rows)

    def kernel(self, tiles: TileConfig) -> Callable[[Any, QuantizedWeight], jax.Array]:
        """The operation with given tiles, and with the sum of what its programs leave."""
        options: dict[str, Any] = {"config": tiles, "interpret": self.interpret}
        if self.problem.op == "w4a16":
            return lambda x, weight: value_of(w4a16_triton.w4a16_matmul(x, weight, **options))
        return lambda x, weight: value_of(w4a4_triton.w4a4_matmul(x, weight, dtype=jnp.bfloat16, **options))

    def trials(self, rows: int, tiles: Sequence[TileConfig], *, deadline: float) -> Iterator[Trial]:
        """Tries candidates in order until the deadline."""
        workload = self.workload(rows)
        batch = 2 * (os.cpu_count() or 1)
        for start in range(0, len(tiles), batch):
            if time.monotonic() >= deadline:
                return
            yield from self._try_batch(workload, tiles[start : start + batch], deadline)

    def _try_batch(self, workload: Workload, tiles: Sequence[TileConfig], deadline: float) -> Iterator[Trial]:
        tasks = [functools.partial(self._compile, workload, one) for one in tiles]
        # A compiler may fail in any way at tiles that it was not made for; such candidates are counted.
        programs = run_in_threads(tasks, errors=(Exception,))
        for one, program in zip(tiles, programs, strict=True):
            if time.monotonic() >= deadline:
                return
            yield Trial(one) if isinstance(program, Exception) else self._try(one, program, workload)

    def _compile(self, workload: Workload, tiles: TileConfig) -> jax.stages.Compiled:
        return compile_calls(self.kernel(tiles), workload.shared, workload.copies)

    def _try(self, tiles: TileConfig, program: jax.stages.Compiled, workload: Workload) -> Trial:
        try:
            outputs = program(workload.shared, list(workload.copies))
            error = workload.relative_error(outputs[0])
            timing = time_calls(program, workload.shared, workload.copies, repeats=self.repeats)
            # One order over K or another seldom shows after rounding to 16 bits, hence all copies.
            first_rows = b"".join(np.asarray(out[: DECODE_ROWS[0]]).tobytes() for out in outputs)
        except jax.errors.JaxRuntimeError:
            return Trial(tiles)
        return Trial(tiles, timing.microseconds, error, hashlib.sha256(first_rows).hexdigest())

    def rows_agree(self, decode: Mapping[int, TileConfig]) -> bool:
        """Compares whole results of many row counts, and of rows that stand elsewhere, bit for bit."""
        most = self.workload(_CHECKED_ROWS[-1]).shared
        # Sums of integers are exact; where large floats cancel, it shows how theirs were rounded.
        checked = [most, operands.cancelling(most)] if self.problem.op == "w4a16" else [most]
        return all(self._first_rows_agree(rows, decode) for rows in checked)

    def _first_rows_agree(self, most: Any, decode: Mapping[int, TileConfig]) -> bool:
        kernel = jax.jit(self.kernel(_bucket(decode, _CHECKED_ROWS[-1])))
        widest = [kernel(most, weight) for weight in self.weights]
        tasks = [functools.partial(self._agrees, rows, decode, most, widest) for rows in _CHECKED_ROWS]
        # Whatever went wrong, rows that have no result do not agree.
        return all(agrees is True for agrees in run_in_threads(tasks, errors=(Exception,)))

    def _agrees(self, rows: int, decode: Mapping[int, TileConfig], most: Any, widest: Sequence[jax.Array]) -> bool:
        kernel, shared = jax.jit(self.kernel(_bucket(decode, rows))), jax.tree.map(lambda a: a[:rows], most)
        moved = jax.tree.map(lambda a: jnp.roll(a, _SHIFT, axis=0), shared)
        return all(
            bool(_same_bits(kernel(shared, weight), expected, shift=0))
            and bool(_same_bits(kernel(moved, weight), expected, shift=_SHIFT))
            for weight, expected in zip(self.weights, widest, strict=True)
        )

    def relative_error(self, rows: int, tiles: TileConfig) -> float:
        """The error of the result for so many rows; NaN if there is none."""
        workload = self.workload(rows)
        try:
            return workload.relative_error(jax.jit(self.kernel(tiles))(workload.shared, self.weights[0]))
        except jax.errors.JaxRuntimeError:
            return float("nan")


def _bucket(decode: Mapping[int, TileConfig], rows: int) -> TileConfig:
    return decode[next(bucket for bucket in DECODE_ROWS if rows <= bucket)]


@functools.partial(jax.jit, static_argnames="shift")
def _same_bits(out: jax.Array, widest: jax.Array, *, shift: int) -> jax.Array:
    """Whether bfloat16 results equal the first ones of more rows, moved by ``shift``."""
    expected = jnp.roll(widest[: out.shape[0]], shift, axis=0)
    out_bits, expected_bits = (lax.bitcast_convert_type(a, jnp.uint16) for a in (out, expected))
    return jnp.array_equal(out_bits, expected_bits)
