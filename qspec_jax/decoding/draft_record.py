"""What each cycle drafted and how much of it was accepted, for people to look at (``engine/draft_view.py``).

A part of the state only where somebody asks. The programs of others have none of it.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from qspec_jax.decoding.sampling import NO_TOKEN


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftRecord:
    """The cycles of each sequence, each at the place of its first token among the sequence's new tokens.

    Attributes:
        drafts: ``[B, capacity, W]`` int32, filled up with ``NO_TOKEN``; ``W`` is the longest draft of the plans.
        accepted: ``[B, capacity]`` int32, drafts that the verification agreed with; ``NO_TOKEN`` where no cycle began.
    """

    drafts: Int32[Array, "B capacity W"]
    accepted: Int32[Array, "B capacity"]

    @classmethod
    def idle(cls, rows: int, capacity: int, width: int) -> DraftRecord:
        """Of no cycle yet, in NumPy arrays."""
        drafts: Any = np.full((rows, capacity, width), NO_TOKEN, np.int32)
        accepted: Any = np.full((rows, capacity), NO_TOKEN, np.int32)
        return cls(drafts, accepted)

    def cleared(self) -> DraftRecord:
        """The same for other sequences."""
        return jax.tree.map(lambda array: jnp.full_like(array, NO_TOKEN), self)

    def after(
        self,
        place: Int32[Array, " B"],
        active: Bool[Array, " B"],
        draft_tokens: Int32[Array, "B gamma"],
        num_accepted: Int32[Array, " B"],
    ) -> DraftRecord:
        """The record after a cycle of the active rows, whose first tokens are at ``place``."""
        batch, missing = draft_tokens.shape[0], self.drafts.shape[2] - draft_tokens.shape[1]
        filled = jnp.pad(draft_tokens, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        rows, columns = jnp.arange(batch, dtype=jnp.int32), jnp.where(active, place, self.accepted.shape[1])
        return DraftRecord(
            self.drafts.at[rows, columns].set(filled, mode="drop"),
            self.accepted.at[rows, columns].set(num_accepted, mode="drop"),
        )
