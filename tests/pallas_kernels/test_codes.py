"""What GPU kernels make of the bits of a weight's codes, as numbers: the PTX itself runs on a GPU alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import codes as ptx

FORMATS = {jnp.bfloat16: np.dtype(jnp.bfloat16), jnp.float16: np.dtype(np.float16)}


@pytest.mark.parametrize("dtype", FORMATS, ids=["bf16", "f16"])
@pytest.mark.parametrize(
    ("bits", "truncated", "zero_point"), [(4, False, 8), (4, True, 8), (8, False, 8), (8, False, 8.5)]
)
def test_lanes_hold_exactly_what_each_code_stands_for(dtype, bits, truncated, zero_point):
    lanes = ptx.lanes_of(dtype, bits=bits, truncated=truncated, centred=zero_point == 8.5)
    code = np.arange(2**bits, dtype=np.uint16)
    lane = code << truncated | np.uint16(0xFF00)  # bits beside the code are masked
    centre = np.where(lane & lanes.choice, 0, lanes.unchosen) + lanes.centre
    if lanes.choice:  # as the PTX makes it
        unset = ~lane & lanes.choice
        ways = {lanes.choice: unset | lanes.centre, 0x7C: (unset >> 5) * (lanes.unchosen // 4) + lanes.centre}
        np.testing.assert_array_equal(ways[lanes.unchosen], centre)
    floats = ((lane & lanes.mask) | lanes.magic).astype(np.uint16).view(FORMATS[dtype]).astype(np.float64)
    floats += centre.astype(np.uint16).view(FORMATS[dtype]).astype(np.float64)
    np.testing.assert_array_equal(floats, code / 2 ** (bits - 4) + truncated / 2 - zero_point)
    np.testing.assert_array_equal(floats.astype(FORMATS[dtype]).astype(np.float64), floats)


KINDS = [(4, 0, False), (4, 1, False), (4, 0, True), (4, 1, True), (8, 0, False), (8, 1, False)]
BFLOAT16 = FORMATS[jnp.bfloat16]


def small_lanes(bits: int, plane: int, truncated: bool) -> tuple[ptx.SmallLanes, np.ndarray, np.ndarray]:
    """They, what they hold of each code beside other bits, and what each code stands for."""
    lanes = ptx.small_lanes(plane, bits=bits, truncated=truncated)
    code = np.arange(2**bits, dtype=np.uint16)
    # As shifts by 4 * plane leave it: joined bytes are lanes as they are.
    lane = code if bits == 8 else code << lanes.first
    held = ((lane | (0xFFFF & ~lanes.mask)) & lanes.mask) | lanes.half
    return lanes, held.astype(np.uint16).view(BFLOAT16).astype(np.float64), code / 2.0 ** (bits - 4) + truncated / 2


def power_of_2(exponent: int) -> float:
    return float(np.ldexp(1.0, exponent))


@pytest.mark.parametrize(("bits", "plane", "truncated"), KINDS)
def test_small_lanes_are_multiples_of_the_smallest_number(bits, plane, truncated):
    lanes, held, code = small_lanes(bits, plane, truncated)
    np.testing.assert_array_equal(held * power_of_2(lanes.larger), code * power_of_2(-ptx.SMALLER))


# All of few bits, and the least and the greatest that a float16 can be.
SCALES = [
    *np.float16(np.linspace(0.9, 1.1, 300)),
    *np.float16([0, 2**-24, 3 * 2**-24, 1e-3, 0.37, -0.02, 65504, -65504]),
]


@pytest.mark.parametrize(
    ("bits", "plane", "truncated", "zero_point"), [(*kind, 8.0) for kind in KINDS] + [(8, 0, False, 8.5)]
)
def test_a_scale_of_any_size_makes_small_lanes_the_weight_rounded_once(bits, plane, truncated, zero_point):
    """In float64 all terms are exact, so that one rounding is left, as in an instruction's."""
    lanes, held, code = small_lanes(bits, plane, truncated)
    register = lanes.centre(zero_point)
    [centre] = np.array([int(register[-4:], 16)], np.uint16).view(BFLOAT16).astype(np.float64)
    assert register[2:6] == register[-4:]
    for scale in SCALES:
        rounded = np.float32(scale).astype(BFLOAT16).astype(np.float64)
        enlarged = (np.float32(scale) * np.float32(power_of_2(lanes.larger))).astype(BFLOAT16)
        assert np.isfinite(enlarged)
        large = enlarged.astype(np.float64)
        shift = (large * centre).astype(BFLOAT16).astype(np.float64)
        together = (held * large + shift).astype(BFLOAT16)
        apart = ((held + centre).astype(BFLOAT16).astype(np.float64) * large).astype(BFLOAT16)
        weight = (rounded * (code - zero_point)).astype(BFLOAT16).astype(np.float64)
        found = apart if zero_point == 8.5 else together  # 17 / 2 times a scale is more bits than it has
        np.testing.assert_array_equal(found.astype(np.float64) * power_of_2(ptx.SMALLER), weight, err_msg=f"{scale}")
        np.testing.assert_array_equal(apart.astype(np.float64) * power_of_2(ptx.SMALLER), weight, err_msg=f"{scale}")
