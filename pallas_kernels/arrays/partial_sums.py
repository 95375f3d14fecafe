"""A matmul's result before its last addition: what programs, or devices, that shared the sum over K have left.

The operation that reads the result adds the parts as it loads them, which saves a kernel. Whoever does it, the order
is the same, and so are the bits::

    y = round((parts[0] + parts[1]) + (parts[2] + parts[3]))        and so on for other numbers of parts
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arrays.shown import with_shapes


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartialSums:
    """``[..., N]`` as the parts of its sums.

    Attributes:
        parts: ``[P, ..., N]``: float32 of programs; of devices, of the dtype that each has rounded its own to.
        dtype: that the result is rounded to. It is added up in float32.
    """

    parts: Float[Array, "P *batch N"]
    dtype: DTypeLike = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return with_shapes(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return self.parts.shape[1:]

    def reshape(self, *shape: int) -> PartialSums:
        """As the array of the result would be."""
        return PartialSums(self.parts.reshape(len(self.parts), *shape), self.dtype)

    def value(self) -> Float[Array, "*batch N"]:
        """The result."""
        return tree_sum([self.parts[index].astype(jnp.float32) for index in range(len(self.parts))]).astype(self.dtype)


def value_of(array: Float[Array, "*batch N"] | PartialSums) -> Float[Array, "*batch N"]:
    """The array itself, or that of which these are the parts."""
    return array.value() if isinstance(array, PartialSums) else array


def tree_sum(parts: Sequence[Any]) -> Any:
    """Neighbours first, so that sums within a program and across programs make one tree."""
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]
