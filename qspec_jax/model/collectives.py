"""What the devices that share a model tell each other, in the program of one of them.

Each has some channels of every sum over inputs, and some tokens of the vocabulary. Sums are gathered and added in the
order of the devices, never in that of a library: the order of a library depends on where in a message a number lies,
so that a token would have other bits beside others than alone. What is gathered is a ``PartialSums``, which the norm
kernels add as they load it. Each device rounds its own sum to the dtype of the model first, as it would if it were
alone: a kernel that shares a sum among programs leaves float32 and one that does not has rounded, and which of them
runs depends on the number of rows. It also halves the messages.

The axis is None where a device has all of a model: nothing is told then.

Where devices reach each other's memory, a program of decoding sends the sums of its steps into mailboxes
(``pallas_kernels/backends/mosaic/mailbox.py``), which takes a third of the time and gives the same bits.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels import MAX_DECODE_TOKENS, PartialSums, value_of
from qspec_jax.errors import UsageError

_mailbox: contextvars.ContextVar[Any] = contextvars.ContextVar("mailbox", default=None)


@contextlib.contextmanager
def sending_to(mailbox: Any) -> Generator[None]:
    """Sums that are traced in this context are sent to mailboxes, where they fit; None for none."""
    token = _mailbox.set(mailbox)
    try:
        yield
    finally:
        _mailbox.reset(token)


def current_mailbox() -> Any:
    """Where sums are sent in this context, for another one; None for messages."""
    return _mailbox.get()


def meet() -> None:
    """Has devices that write to each other's mailboxes wait for each other: each turn of a loop begins so."""
    if (mailbox := _mailbox.get()) is not None:
        mailbox.meet()


def _taking(y: Any, axis: str) -> Any:
    """The mailbox that takes sums over an axis; None if they are to be sent as messages."""
    mailbox = _mailbox.get()
    return mailbox if mailbox is not None and mailbox.axis == axis and mailbox.takes(y) else None


def is_bound(axis: str) -> bool:
    """Whether this is the program of a device on a mesh with such an axis."""
    try:
        lax.axis_size(axis)
    except NameError:
        return False
    return True


def check_varying(tokens: Any, cache: Any) -> None:
    """Refuses tokens of each device of a ``jax.shard_map`` beside a cache of all: the carry of a loop keeps its kind.

    Raises:
        UsageError: that is so, which JAX finds out where it checks what varies.
    """
    kinds = (getattr(jax.typeof(jax.tree.leaves(one)[0]), "manual_axis_type", None) for one in (tokens, cache))
    given, kept = (getattr(kind, "varying", frozenset()) for kind in kinds)  # empty where nobody checks
    if given - kept:
        raise UsageError(
            f"tokens vary over {', '.join(sorted(given - kept))} and the cache does not; use jax.shard_map with "
            "check_vma=False, which the kernels need as well"
        )


def add_up(y: Float[Array, "*batch N"] | PartialSums, axis: str | None) -> Float[Array, "*batch N"] | PartialSums:
    """The sums over all inputs, of those over the inputs of each device, which are rounded to their dtype.

    Where a sequence has many tokens, a prefill, each device adds up those of some and tells the others: the same sums
    from fewer bytes.
    """
    if axis is None:
        return y
    if (mailbox := _taking(y, axis)) is not None:
        return mailbox.add_up(y)
    own, count = value_of(y), lax.axis_size(axis)
    if own.ndim == 3 and own.shape[1] > MAX_DECODE_TOKENS and own.shape[1] % count == 0:
        batch, tokens, outputs = own.shape
        shares = own.reshape(batch, count, tokens // count, outputs)
        share = PartialSums(lax.all_to_all(shares, axis, split_axis=1, concat_axis=0), own.dtype)
        return lax.all_gather(share.value(), axis, axis=1, tiled=True)
    return PartialSums(lax.all_gather(own, axis), own.dtype)


def embed(table: Float[Array, "V D"], tokens: Int32[Array, "B T"], axis: str | None) -> Float[Array, "B T D"]:
    """Rows of a table, of which each device has some."""
    if axis is None:
        return jnp.take(table, tokens, axis=0)
    place = tokens - lax.axis_index(axis) * table.shape[0]
    is_here = (place >= 0) & (place < table.shape[0])
    rows = jnp.take(table, jnp.where(is_here, place, 0), axis=0)
    rows = jnp.where(is_here[..., None], rows, jnp.zeros((), rows.dtype))  # one device's is not zero: exact
    return lax.psum(rows, axis) if (mailbox := _taking(rows, axis)) is None else mailbox.add_up(rows)


def most_likely(logits: Float32[Array, "B T V"], axis: str | None) -> Int32[Array, "B T"]:
    """The lowest of the most likely tokens, of logits of which each device has some."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if axis is None:
        return best
    largest = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
    # One message, in which a float32 travels as its bits.
    pair = lax.bitcast_convert_type(largest, jnp.int32), best + lax.axis_index(axis) * logits.shape[-1]
    bits, tokens = jnp.moveaxis(_gathered(jnp.stack(pair), axis), 1, 0)
    device = jnp.argmax(lax.bitcast_convert_type(bits, jnp.float32), axis=0)
    return jnp.take_along_axis(tokens, device[None], axis=0)[0]


def _gathered(words: Int32[Array, "*batch"], axis: str) -> Int32[Array, "n ..."]:
    """A few words of each device."""
    mailbox = _mailbox.get()
    found = mailbox.gather(words) if mailbox is not None and mailbox.axis == axis else None
    return lax.all_gather(words, axis) if found is None else found


def all_logits(logits: Float32[Array, "B T V"], axis: str | None) -> Float32[Array, "B T all_V"]:
    """The logits of the whole vocabulary, of which each device has some."""
    return logits if axis is None else lax.all_gather(logits, axis, axis=logits.ndim - 1, tiled=True)


def sum_over(number: Int32[Array, ""], axis: str | None) -> Int32[Array, ""]:
    """The sum of a whole number over the devices of an axis."""
    return number if axis is None else lax.psum(number, axis)


def own_rows(flags: Bool[Array, " rows"], num_rows: int, axis: str | None) -> Bool[Array, " own_rows"]:
    """Of flags of all rows those of this device, of which each has so many."""
    return flags if axis is None else lax.dynamic_slice_in_dim(flags, lax.axis_index(axis) * num_rows, num_rows)


def rows_of_all(tree: Any, axis: str | None) -> Any:
    """Arrays of rows, of which each device has some, of all rows."""
    return tree if axis is None else jax.tree.map(lambda rows: lax.all_gather(rows, axis, tiled=True), tree)
