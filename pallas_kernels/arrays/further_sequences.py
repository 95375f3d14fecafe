"""Sequences of a pass that have no row of the key/value cache: they fill up the tiles of rows that matmuls read.

Operations on a cache have one length for each of its rows. Queries may be of more sequences: those after the first
ones write nothing and see nothing, and what comes out for them is read by nobody.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.arrays.partial_sums import PartialSums


def call_for_rows(
    module: Any, op: str, queries: Array | PartialSums, *arrays: Any, lengths: Int32[Array, " B"], **options: Any
) -> Any:
    """The function ``op`` of an implementation, for queries ``[B_all, T, heads, HD]`` of ``B`` sequences or more.

    One whose file says ``FURTHER_SEQUENCES`` takes them, and leaves their results unspecified. Others are called for
    the first ``B``, and the results of those after them are zeros.

    Args:
        module: the implementation.
        op: name of the function, which takes ``queries``, ``arrays``, ``lengths`` and ``options``.
        queries, arrays: its arguments before ``lengths``.
        lengths: of the rows of the cache.
        options: its other arguments, by name.

    Returns:
        what it returns: the result for the queries, or that and more, which is of the rows of the cache.

    Raises:
        ValueError: there are fewer sequences than lengths.
    """
    count, num_rows = queries.shape[0], lengths.shape[0]
    if count < num_rows:
        raise ValueError(f"{op}: there are {count} sequences and {num_rows} lengths; use at least as many sequences")
    function = getattr(module, op)
    if count == num_rows or getattr(module, "FURTHER_SEQUENCES", False):
        return function(queries, *arrays, lengths=lengths, **options)
    first = jax.tree.map(lambda array: array[..., :num_rows, :, :, :], queries)  # parts of sums have an axis before
    results = function(first, *arrays, lengths=lengths, **options)
    out, *others = results if isinstance(results, tuple) else (results,)
    out = jnp.pad(out, ((0, count - num_rows), *[(0, 0)] * (out.ndim - 1)))
    return (out, *others) if isinstance(results, tuple) else out
