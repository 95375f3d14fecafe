"""Calls of every operation of ``pallas_kernels`` at the widths of real models, with what they are compared by.

Batches are small: a case takes 100 MB at most. What is expected is the reference's result on the CPU: in float32 for
operations that round once at their end, and in the operands' dtype for those whose roundings the reference states.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import Layout
from qspec_jax.inspection.gated_cases import gated_cases, gated_value
from qspec_jax.inspection.kernel_case import ROWS, KernelCase, Widths, partial_sums, random_rows
from qspec_jax.inspection.matmul_cases import BY_GROUP, PER_TOKEN, matmul_cases

_EPSILON = 1e-5
PIECE = 32  # tokens of a piece of a prompt
_SLOTS, _LENGTHS = 320, (0, 63, 130, 300)
_BLOCK = {"block_size": 16}
_WINDOW = {"window": 100}
_CHOICE = {"num_blocks": 12, "recent": 64, "ahead": 17, **_BLOCK}
_ORDERED: dict[str, Any] = {"bits": 8, "clip_ratio": 0.9, "layout": Layout.WGMMA}
_TRANSFORMED = 512  # values at once, where not all are


def kernel_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    """Those of every operation."""
    yield from matmul_cases(widths, dtype)
    yield from gated_cases(widths, dtype)
    yield from _producer_cases(widths, dtype)
    yield from _attention_cases(widths, dtype)


def _producer_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    hidden, mlp = widths.hidden, widths.mlp
    case = functools.partial(KernelCase, dtype=dtype)

    def normed(k: int = hidden) -> tuple[Any, ...]:
        return random_rows(ROWS, k, dtype=dtype), random_rows(k, dtype=dtype, seed=2)

    def gated() -> tuple[Any, ...]:
        return (random_rows(ROWS, 2 * mlp, dtype=dtype),)

    updates = {
        "added to": lambda: (*normed(), random_rows(ROWS, hidden, dtype=dtype, seed=5)),
        "partial sums added to": lambda: (*normed(), partial_sums(ROWS, hidden, dtype=dtype, seed=5)),
    }
    tokens, gates = f"{ROWS}x{hidden}", f"{ROWS}x{2 * mlp}"
    epsilon = {"epsilon": _EPSILON}
    yield case("rms_norm", "rms_norm", tokens, num_inputs=hidden, operands=normed, options=epsilon)
    for what, update in updates.items():
        options = {"num_inputs": hidden, "operands": update, "options": epsilon, "keywords": ("update",)}
        yield case("rms_norm", "rms_norm", f"{tokens}, {what}", **options)
        options["options"] = {**PER_TOKEN, **epsilon}
        yield case("rms_norm_quantize", "rms_norm_quantize", f"{tokens}, {what}, 8 bits", measure="codes", **options)
    parts = {"num_inputs": mlp, "operands": lambda: (partial_sums(ROWS, 2 * mlp, dtype=dtype, seed=5),)}
    in_parts = f"{gates}, partial sums"
    yield case("swiglu", "swiglu", gates, num_inputs=1, operands=gated, wide=True)
    gated_alone = functools.partial(gated_value, transform=None, dtype=dtype)
    yield case("swiglu", "swiglu", in_parts, expected=gated_alone, **{**parts, "num_inputs": 1})
    codes = functools.partial(gated_alone, settings=PER_TOKEN)
    yield case(
        *("swiglu_quantize", "swiglu_quantize", f"{in_parts}, 8 bits"),
        expected=codes,
        options=PER_TOKEN,
        measure="codes",
        **parts,
    )
    yield case(
        *("hadamard", "hadamard", f"{ROWS}x{mlp}"),
        num_inputs=mlp,
        operands=lambda: (random_rows(ROWS, mlp, dtype=dtype),),
        wide=True,
    )
    gate = {"num_inputs": mlp, "operands": gated}
    for what, blocks in (("", {}), (f", blocks of {_TRANSFORMED}", {"block": _TRANSFORMED})):
        transformed = functools.partial(gated_value, transform=blocks.get("block", mlp), dtype="float32")
        yield case("swiglu_hadamard", "swiglu_hadamard", gates + what, expected=transformed, options=blocks, **gate)
    for what, settings in (
        ("8 bits", PER_TOKEN),
        ("4 bits, groups of 32", BY_GROUP),
        ("8 bits clipped, for WGMMA", _ORDERED),
    ):
        coded = functools.partial(case, measure="codes")
        inputs = mlp if settings is _ORDERED else hidden  # which that order divides
        produced = {"num_inputs": inputs, "options": settings}
        shape = f"{ROWS}x{inputs}, {what}"
        quantized = functools.partial(coded, "quantize_activations", "quantize_activations", shape)
        yield quantized(operands=lambda inputs=inputs: normed(inputs)[:1], **produced)
        produced["options"] = {**settings, **epsilon}
        normed_codes = functools.partial(coded, "rms_norm_quantize", "rms_norm_quantize", shape)
        yield normed_codes(operands=functools.partial(normed, inputs), **produced)
        for op in ("swiglu_quantize", "swiglu_hadamard_quantize"):
            block = _TRANSFORMED if "hadamard" in op and settings is _ORDERED else None
            product = functools.partial(
                gated_value, transform=(block or mlp) if "hadamard" in op else None, dtype=dtype, settings=settings
            )
            options = settings if block is None else {**settings, "block": block}
            yield coded(op, op, f"{gates}, {what}", expected=product, options=options, **gate)


def _attention_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    heads, kv_heads, head_dim = widths.num_heads, widths.num_kv_heads, widths.head_dim
    batch = len(_LENGTHS)
    shape = f"{batch} sequences, {heads}/{kv_heads} heads of {head_dim}, {_SLOTS} slots"
    case = functools.partial(KernelCase, dtype=dtype, num_inputs=head_dim)

    def cache() -> tuple[Any, ...]:
        arrays = (random_rows(batch, _SLOTS, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (3, 4))
        return (*arrays, jnp.asarray(_LENGTHS, jnp.int32))

    def attended(num_tokens: int) -> tuple[Any, ...]:
        return (random_rows(batch, num_tokens, heads, head_dim, dtype=dtype), *cache())

    def pieces() -> tuple[Any, ...]:
        rows, starts = jnp.asarray([1, 0, 1], jnp.int32), jnp.asarray([_SLOTS - 40, 0, 32], jnp.int32)
        return (random_rows(3, 32, heads, head_dim, dtype=dtype), *cache()[:2], rows, starts)

    def rotated(made: Callable[..., Any] = random_rows) -> tuple[Any, ...]:
        qkv = made(batch, ROWS, heads + 2 * kv_heads, head_dim, dtype=dtype)
        angles = 9 * random_rows(batch, ROWS, head_dim // 2, dtype="float32", seed=5)
        return (qkv, jnp.cos(angles), jnp.sin(angles), *cache())

    def masses() -> Any:
        return jnp.asarray(np.random.default_rng(6).random((batch, 2, kv_heads, _SLOTS // 16)), jnp.float32)

    def listed() -> tuple[Any, ...]:
        lengths = jnp.asarray(_LENGTHS, jnp.int32)
        table = pallas_kernels.choose_blocks(masses(), lengths, **_CHOICE, implementation="reference")
        return (*attended(1), table, jnp.int32(1))

    def flat(operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """With the heads of keys and values side by side, as the cache has them."""
        query, *both = operands[:3]
        return (query, *(one.reshape(*one.shape[:2], -1) for one in both), *operands[3:])

    def permuted(made: Callable[..., Any]) -> tuple[Any, ...]:
        return (*rotated(made), jnp.arange(batch, dtype=jnp.int32)[::-1])

    write = functools.partial(case, "rotate_and_write", "rotate_and_write")
    yield write(f"{shape}, {ROWS} tokens", operands=rotated)
    sums = functools.partial(permuted, partial_sums)
    yield write(f"{shape}, {ROWS} tokens, other rows, partial sums", operands=sums, keywords=("rows",))
    yield from _int8_cases(widths, dtype, attended=attended, rotated=rotated, listed=listed, shape=shape)
    for num_tokens in (1, ROWS):
        new = f"{shape}, {num_tokens} token" + "s" * (num_tokens > 1)
        operands = functools.partial(attended, num_tokens)
        attend = functools.partial(case, "decode_attention", shape=new, operands=operands, wide=True)
        yield attend(function="decode_attention")
        yield attend(function="decode_attention_with_masses", options=_BLOCK)
    windowed = {"shape": f"{new}, a window of 100", "operands": lambda: flat(attended(ROWS)), "wide": True}
    yield case("decode_attention", "decode_attention", options=_WINDOW, **windowed)
    yield case("decode_attention", "decode_attention_with_masses", options={**_BLOCK, **_WINDOW}, **windowed)
    prefill = functools.partial(case, "prefill_attention", "prefill_attention", wide=True)
    yield prefill(f"{shape}, 3 pieces of 32 tokens", operands=pieces)
    yield prefill(f"{shape}, 3 pieces, a window of 100", operands=lambda: flat(pieces()), options=_WINDOW)
    blocks = functools.partial(case, "block_attention", "block_attention", wide=True)
    yield blocks(f"{shape}, 12 blocks", operands=listed, options=_BLOCK)
    yield blocks(f"{shape}, 12 blocks, a window of 100", operands=lambda: flat(listed()), options={**_BLOCK, **_WINDOW})
    yield dataclasses.replace(
        case("block_attention", "choose_blocks", f"12 of {_SLOTS // 16} blocks", operands=tuple, options=_CHOICE),
        operands=lambda: (masses(), jnp.asarray(_LENGTHS, jnp.int32)),
        dtype="float32",
        measure="numbers",
    )


def _int8_cases(
    widths: Widths, dtype: str, *, attended: Callable[[int], Any], rotated: Any, listed: Any, shape: str
) -> Iterator[KernelCase]:
    """Those over a cache of int8, with the queries of the other ones."""
    case = functools.partial(KernelCase, dtype=dtype, num_inputs=widths.head_dim)

    def cache() -> Any:
        (batch, heads, head_dim), kv_heads = (len(_LENGTHS), widths.num_heads, widths.head_dim), widths.num_kv_heads
        sizes: Any = {"num_kv_heads": kv_heads, "head_dim": head_dim, "dtype": jnp.dtype(dtype)}
        empty = pallas_kernels.Int8Cache.zeros(batch=batch, capacity=_SLOTS, **sizes)
        qkv = random_rows(batch, _SLOTS, heads + 2 * kv_heads, head_dim, dtype=dtype, seed=3)
        angles = jnp.zeros((batch, _SLOTS, head_dim // 2), jnp.float32)
        arrays = qkv, jnp.cos(angles), jnp.sin(angles), empty, jnp.zeros(batch, jnp.int32)
        return pallas_kernels.prefill_int8(*arrays)[1]

    def with_cache(operands: tuple[Any, ...], place: int) -> tuple[Any, ...]:
        """Of the operands of another case, whose keys and values are at a place."""
        return (*operands[:place], cache(), *operands[place + 2 :])

    write, attend = "rotate_and_write_int8", "decode_attention_int8"
    for what, made in (("", random_rows), (", partial sums", partial_sums)):
        operands = functools.partial(lambda made: with_cache(rotated(made), 3), made)
        yield case(write, write, f"{shape}, {ROWS} tokens{what}", operands=operands)
    for num_tokens in (1, ROWS):
        new = f"{shape}, {num_tokens} token" + "s" * (num_tokens > 1)
        for what, window in (("", {}), (", a window of 100", _WINDOW)):
            operands = functools.partial(lambda count: with_cache(attended(count), 1), num_tokens)
            one = functools.partial(case, attend, shape=new + what, operands=operands, wide=True)
            yield one(function=attend, options=window)
            yield one(function=f"{attend}_with_masses", options={**_BLOCK, **window})
    yield from _piece_cases(widths, dtype, cache)
    for what, window in (("", {}), (", a window of 100", _WINDOW)):
        options: Any = {"operands": lambda: with_cache(listed(), 1), "options": {**_BLOCK, **window}, "wide": True}
        yield case(attend, "block_attention_int8", f"{shape}, 12 blocks{what}", **options)


def _piece_cases(widths: Widths, dtype: str, cache: Callable[[], Any]) -> Iterator[KernelCase]:
    """Pieces of two prompts, one of which goes on behind a block of keys."""
    heads, kv_heads, head_dim = widths.num_heads, widths.num_kv_heads, widths.head_dim
    rows, starts = jnp.asarray([1, 1, 1, -1, 0, 0], jnp.int32), jnp.asarray([128, 160, 192, 0, 0, 32], jnp.int32)

    def pieces(made: Callable[..., Any]) -> tuple[Any, ...]:
        qkv = made(len(rows), PIECE, heads + 2 * kv_heads, head_dim, dtype=dtype)
        angles = 9 * random_rows(len(rows), PIECE, head_dim // 2, dtype="float32", seed=5)
        return qkv, jnp.cos(angles), jnp.sin(angles), cache(), rows, starts

    op, function = "prefill_attention_int8", "prefill_pieces_int8"
    shape = f"{len(rows)} pieces of {PIECE} tokens, {heads}/{kv_heads} heads of {head_dim}"
    case = functools.partial(KernelCase, op, function, dtype=dtype, num_inputs=head_dim)
    yield case(shape + ", partial sums", operands=functools.partial(pieces, partial_sums))
    yield case(shape + ", a window of 100", operands=functools.partial(pieces, random_rows), options=_WINDOW)
