"""Arguments that are no arrays, or have other axes or another type, are named by every operation."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int32

import pallas_kernels
from pallas_kernels.arrays.arguments import checked
from tests.pallas_kernels.kernel_cases import random_weight

FUNCTIONS = {name: getattr(pallas_kernels, name) for name in pallas_kernels.__all__}
FUNCTIONS = {name: function for name, function in FUNCTIONS.items() if inspect.isfunction(function)}
# What asks about a call, and takes shapes for arrays, or numbers alone.
ASKING = (
    "best_layout",
    "best_layout_for_codes",
    "float_prefill_is_alike",
    "prefill_is_alike",
    "prefill_int8_is_alike",
    "rows_alike",
    "rows_read",
)
ASKING += ("available_implementations", "check_group_size", "least_blocks", "value_of")
ASKING += ("w4a16_swiglu_is_fused", "w4a4_swiglu_quantize_is_fused")
OPERATIONS = [name for name in FUNCTIONS if name not in ASKING]
ROWS = np.ones((2, 128), np.float32)
QUERY, KEYS, LENGTHS = np.ones((2, 1, 4, 16), np.float32), np.ones((2, 8, 2, 16), np.float32), np.array([3, 5])


def weight():
    return random_weight(64, 128, 32, symmetric=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_names_what_is_no_array(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    required = [one for one in parameters if one.default is inspect.Parameter.empty]
    places = [one.name for one in required if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    with pytest.raises(ValueError, match=f"^{name}: {places[0]} is of type list; use "):
        FUNCTIONS[name](**{one.name: [1.0] for one in required})


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"),
    [
        ("w4a16_matmul", (np.float32(1), weight), {}, r"x is float32\[\]; use an array \[\.\.\., K\]"),
        ("w4a16_matmul", (ROWS, ROWS), {}, "weight is of type ndarray; use QuantizedWeight"),
        ("decode_attention", (QUERY[0], KEYS, KEYS, LENGTHS), {}, r"query is float32\[1, 4, 16\]; use .*B_all, T, H"),
        ("decode_attention", (QUERY, KEYS[0, 0], KEYS, LENGTHS), {}, r"keys is float32\[2, 16\]; use .*B, S, \.\.\."),
        ("decode_attention", (QUERY, KEYS, KEYS, LENGTHS * 1.0), {}, r"lengths is float64\[2\]; use .* of int32"),
        ("decode_attention", (QUERY, KEYS, KEYS, LENGTHS[None]), {}, r"lengths is int64\[1, 2\]; use an array \[B\]"),
        ("decode_attention", (QUERY, KEYS, KEYS, LENGTHS), {"window": 2.5}, "window is 2.5; use a whole number"),
        ("with_layout", (weight, "wgmma"), {}, "layout is of type str; use Layout.PLANES or Layout.WGMMA"),
        ("pack_codes", (np.ones((2, 4), np.int8),), {}, r"codes is int8\[2, 4\]; use .* of uint8"),
        ("pack_codes", (np.ones((2, 3), np.uint8),), {}, "K=3 is odd"),
        ("dequantize", (weight, jnp.int32), {}, "dtype=int32 holds no fractions; use float32"),
    ],
)
def test_what_fits_no_annotation_is_refused_and_not_taken_for_something_else(name, arguments, options, message):
    arguments = [
        given() if callable(given) and not isinstance(given, type(jnp.int32)) else given for given in arguments
    ]
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        FUNCTIONS[name](*arguments, **options)


def taking(x: Float[Array, "*batch K"], lengths: Int32[Array, " B"], *, window: int | None = None, fast: bool = False):
    return x.shape, lengths.dtype, window, fast


def test_what_is_missing_or_unknown_is_told_as_of_any_function():
    function = checked(taking)
    with pytest.raises(TypeError, match=r"taking\(\) missing 1 required positional argument: 'lengths'"):
        function(ROWS)
    with pytest.raises(TypeError, match=r"taking\(\) got an unexpected keyword argument 'block'"):
        function(ROWS, LENGTHS, block=32)


def test_arrays_of_any_kind_and_whole_numbers_of_numpy_are_taken():
    function = checked(taking)
    for make in (np.asarray, jnp.asarray, lambda given: jax.ShapeDtypeStruct(given.shape, given.dtype)):
        given = make(ROWS), make(LENGTHS)
        assert function(*given, window=np.int32(4)) == ((2, 128), given[1].dtype, 4, False)
    assert jax.vmap(lambda row: function(row, LENGTHS)[0][0] + row.sum())(ROWS).shape == (2,)
