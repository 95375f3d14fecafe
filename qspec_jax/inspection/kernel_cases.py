"""Calls of every operation of ``pallas_kernels`` at the widths of real models, with what they are compared by.

Batches are small: a case takes 100 MB at most. What is expected is the reference's result on the CPU: in float32 for
operations that round once at their end, and in the operands' dtype for those whose roundings the reference states.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import Layout, QuantizedWeight, pack_codes, with_layout

_EPSILON = 1e-5
_SLOTS, _LENGTHS = 320, (0, 63, 130, 300)
_BLOCK = {"block_size": 16}
_CHOICE = {"num_blocks": 12, "recent": 64, "ahead": 17, **_BLOCK}
_PER_TOKEN: dict[str, Any] = {"bits": 8}
_BY_GROUP: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False, "outlier_groups": 1}
_ROWS = 5  # a verification of four drafts


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of a model: hidden size, size of its MLP, and its heads.

    Attributes:
        weight: group size (None: whole rows) and symmetry of its 4-bit weights.
    """

    name: str
    hidden: int
    mlp: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    weight: tuple[int | None, bool]


DEMO = Widths("SmolLM2-135M", 576, 1536, 9, 3, 64, (32, False))
LLAMA_8B = Widths("Llama-3-8B", 4096, 14336, 32, 8, 128, (128, True))


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One call of an operation.

    Attributes:
        op: the operation's name, that of its folder.
        function: of ``pallas_kernels``.
        shape: for people.
        dtype: of its operands.
        num_inputs: that a result adds up.
        operands: makes them, on the default device.
        options: of the call.
        measure: of the error: ``relative``, the share of ``codes`` that differ, or that of whole ``numbers``.
        wide: whether the reference gets float32 operands.
        expected: what is expected instead of the reference's own result on the same operands.
    """

    op: str
    function: str
    shape: str
    dtype: str
    num_inputs: int
    operands: Callable[[], tuple[Any, ...]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Literal["relative", "codes", "numbers"] = "relative"
    wide: bool = False
    expected: Callable[[tuple[Any, ...]], Any] | None = None

    def call(self, operands: tuple[Any, ...], implementation: str) -> Any:
        """The result of an implementation.

        Raises:
            NotImplementedError: it cannot serve the call.
        """
        return getattr(pallas_kernels, self.function)(*operands, **self.options, implementation=implementation)

    def laid_out(self, operands: tuple[Any, ...], implementation: str) -> tuple[Any, ...]:
        """The operands with weights, and codes for them, in the order that the implementation reads."""
        weights = [one for one in operands if isinstance(one, QuantizedWeight)]
        if not weights:
            return operands
        best = functools.partial(pallas_kernels.best_layout, implementation=implementation)
        layout = best(weights[0], jnp.dtype("bfloat16" if self.op == "w4a4_matmul" else self.dtype))
        return tuple(_in_layout(one, layout) for one in operands)


def _in_layout(operand: Any, layout: Layout) -> Any:
    return with_layout(operand, layout) if isinstance(operand, QuantizedWeight) else operand


def kernel_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    """Those of every operation."""
    yield from _matmul_cases(widths, dtype)
    yield from _producer_cases(widths, dtype)
    yield from _attention_cases(widths, dtype)


def _matmul_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    hidden, mlp = widths.hidden, widths.mlp
    heads = (widths.num_heads + 2 * widths.num_kv_heads) * widths.head_dim
    case = functools.partial(KernelCase, dtype=dtype, wide=True)
    for inputs, outputs in ((hidden, heads), (mlp, hidden)):
        group_size = widths.weight[0] or inputs
        shape = f"{_ROWS}x{inputs} by {outputs}x{inputs}, groups of {group_size}"
        weight = functools.partial(_weight, outputs, inputs, group_size, symmetric=widths.weight[1])
        yield case(
            *("w4a16_matmul", "w4a16_matmul", shape),
            num_inputs=inputs,
            operands=lambda k=inputs, weight=weight: (_rows(_ROWS, k, dtype=dtype), weight()),
        )
        for bits in (8, 4):
            codes = {"bits": bits} if bits == 8 else {"bits": bits, "group_size": group_size}
            yield case(
                *("w4a4_matmul", "w4a4_matmul", f"{shape}, {bits} bits"),
                num_inputs=inputs,
                options={"dtype": jnp.float32},
                operands=lambda k=inputs, weight=weight, codes=codes: (_codes(k, dtype, codes), weight()),
            )
    yield case(
        *("float_matmul", "float_matmul", f"{_ROWS}x{hidden} by 4096x{hidden}"),
        num_inputs=hidden,
        operands=lambda: (_rows(_ROWS, hidden, dtype=dtype), _rows(4096, hidden, dtype=dtype, seed=2)),
    )


def _producer_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    hidden, mlp = widths.hidden, widths.mlp
    case = functools.partial(KernelCase, dtype=dtype)

    def normed(k: int = hidden) -> tuple[Any, ...]:
        return _rows(_ROWS, k, dtype=dtype), _rows(k, dtype=dtype, seed=2)

    def gated() -> tuple[Any, ...]:
        return (_rows(_ROWS, 2 * mlp, dtype=dtype),)

    tokens, gates = f"{_ROWS}x{hidden}", f"{_ROWS}x{2 * mlp}"
    epsilon = {"epsilon": _EPSILON}
    yield case("rms_norm", "rms_norm", tokens, num_inputs=hidden, operands=normed, options=epsilon)
    yield case("swiglu", "swiglu", gates, num_inputs=1, operands=gated, wide=True)
    yield case(
        *("hadamard", "hadamard", f"{_ROWS}x{mlp}"),
        num_inputs=mlp,
        operands=lambda: (_rows(_ROWS, mlp, dtype=dtype),),
        wide=True,
    )
    gate = {"num_inputs": mlp, "operands": gated}
    transformed = functools.partial(_gated, transform=True, dtype="float32")
    yield case("swiglu_hadamard", "swiglu_hadamard", gates, expected=transformed, **gate)
    for what, settings in (("8 bits", _PER_TOKEN), ("4 bits, groups of 32", _BY_GROUP)):
        coded = functools.partial(case, measure="codes")
        produced = {"num_inputs": hidden, "options": settings}
        yield coded(
            "quantize_activations",
            "quantize_activations",
            f"{tokens}, {what}",
            operands=lambda: normed()[:1],
            **produced,
        )
        produced["options"] = {**settings, **epsilon}
        yield coded("rms_norm_quantize", "rms_norm_quantize", f"{tokens}, {what}", operands=normed, **produced)
        for op in ("swiglu_quantize", "swiglu_hadamard_quantize"):
            product = functools.partial(_gated, transform="hadamard" in op, dtype=dtype, settings=settings)
            yield coded(op, op, f"{gates}, {what}", expected=product, options=settings, **gate)


def _attention_cases(widths: Widths, dtype: str) -> Iterator[KernelCase]:
    heads, kv_heads, head_dim = widths.num_heads, widths.num_kv_heads, widths.head_dim
    batch = len(_LENGTHS)
    shape = f"{batch} sequences, {heads}/{kv_heads} heads of {head_dim}, {_SLOTS} slots"
    case = functools.partial(KernelCase, dtype=dtype, num_inputs=head_dim)

    def cache() -> tuple[Any, ...]:
        arrays = (_rows(batch, _SLOTS, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (3, 4))
        return (*arrays, jnp.asarray(_LENGTHS, jnp.int32))

    def attended(num_tokens: int) -> tuple[Any, ...]:
        return (_rows(batch, num_tokens, heads, head_dim, dtype=dtype), *cache())

    def pieces() -> tuple[Any, ...]:
        rows, starts = jnp.asarray([1, 0, 1], jnp.int32), jnp.asarray([_SLOTS - 40, 0, 32], jnp.int32)
        return (_rows(3, 32, heads, head_dim, dtype=dtype), *cache()[:2], rows, starts)

    def rotated() -> tuple[Any, ...]:
        qkv = _rows(batch, _ROWS, heads + 2 * kv_heads, head_dim, dtype=dtype)
        angles = 9 * _rows(batch, _ROWS, head_dim // 2, dtype="float32", seed=5)
        return (qkv, jnp.cos(angles), jnp.sin(angles), *cache())

    def masses() -> Any:
        return jnp.asarray(np.random.default_rng(6).random((batch, 2, kv_heads, _SLOTS // 16)), jnp.float32)

    def listed() -> tuple[Any, ...]:
        lengths = jnp.asarray(_LENGTHS, jnp.int32)
        table = pallas_kernels.choose_blocks(masses(), lengths, **_CHOICE, implementation="reference")
        return (*attended(1), table, jnp.int32(1))

    yield case("rotate_and_write", "rotate_and_write", f"{shape}, {_ROWS} tokens", operands=rotated)
    yield from _int8_cases(widths, dtype, attended=attended, rotated=rotated, listed=listed, shape=shape)
    for num_tokens in (1, _ROWS):
        new = f"{shape}, {num_tokens} token" + "s" * (num_tokens > 1)
        operands = functools.partial(attended, num_tokens)
        attend = functools.partial(case, "decode_attention", shape=new, operands=operands, wide=True)
        yield attend(function="decode_attention")
        yield attend(function="decode_attention_with_masses", options=_BLOCK)
    yield case("prefill_attention", "prefill_attention", f"{shape}, 3 pieces of 32 tokens", operands=pieces, wide=True)
    yield case("block_attention", "block_attention", f"{shape}, 12 blocks", operands=listed, options=_BLOCK, wide=True)
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
        qkv = _rows(batch, _SLOTS, heads + 2 * kv_heads, head_dim, dtype=dtype, seed=3)
        angles = jnp.zeros((batch, _SLOTS, head_dim // 2), jnp.float32)
        arrays = qkv, jnp.cos(angles), jnp.sin(angles), empty, jnp.zeros(batch, jnp.int32)
        return pallas_kernels.prefill_int8(*arrays)[1]

    def with_cache(operands: tuple[Any, ...], place: int) -> tuple[Any, ...]:
        """Of the operands of another case, whose keys and values are at a place."""
        return (*operands[:place], cache(), *operands[place + 2 :])

    write, attend = "rotate_and_write_int8", "decode_attention_int8"
    yield case(write, write, f"{shape}, {_ROWS} tokens", operands=lambda: with_cache(rotated(), 3))
    for num_tokens in (1, _ROWS):
        new = f"{shape}, {num_tokens} token" + "s" * (num_tokens > 1)
        one = functools.partial(
            case, attend, shape=new, operands=lambda count=num_tokens: with_cache(attended(count), 1), wide=True
        )
        yield one(function=attend)
        yield one(function=f"{attend}_with_masses", options=_BLOCK)
    blocks = f"{shape}, 12 blocks"
    options: Any = {"operands": lambda: with_cache(listed(), 1), "options": _BLOCK, "wide": True}
    yield case(attend, "block_attention_int8", blocks, **options)


def _gated(operands: tuple[Any, ...], *, transform: bool, dtype: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The gated unit in float32, rounded once, and what follows: XLA may round after every operation of a silu."""
    [gate_up] = operands
    options: dict[str, Any] = {"implementation": "reference"}
    out = pallas_kernels.swiglu(gate_up.astype(jnp.float32), **options).astype(gate_up.dtype)
    if transform:
        out = pallas_kernels.hadamard(out.astype(jnp.float32), **options).astype(jnp.dtype(dtype))
    return out if settings is None else pallas_kernels.quantize_activations(out, **settings, **options)


def _rows(*shape: int, dtype: str, seed: int = 1) -> jax.Array:
    """Normal values with a mean, so that zero points matter."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) + np.float32(0.25)
    return jnp.asarray(values, jnp.dtype(dtype))


def _weight(n: int, k: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """A weight whose codes use all 16 values and whose entries are about 1 / sqrt(K)."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scale = rng.uniform(0.5, 1.5, (k // group_size, n)) / np.sqrt(k) / 4
    offset = None if symmetric else jnp.asarray(scale * rng.uniform(5, 10, scale.shape), jnp.float16)
    return QuantizedWeight(pack_codes(jnp.asarray(codes)), jnp.asarray(scale, jnp.float16), offset)


def _codes(k: int, dtype: str, settings: Mapping[str, Any]) -> Any:
    return pallas_kernels.quantize_activations(_rows(_ROWS, k, dtype=dtype), **settings, implementation="reference")
