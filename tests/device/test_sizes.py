"""Sizes are told in the unit that fits."""

from __future__ import annotations

import pytest

from qspec_jax.device.sizes import size_text


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_004, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (25_210_000, "25.2 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (1_500_000_000, "1.50 GB"),
        (139_800_000_000, "140 GB"),
        (2_500_000_000_000_000, "2,500 TB"),
    ],
)
def test_a_size_has_three_digits_and_the_unit_that_fits(num_bytes, told):
    assert size_text(num_bytes) == told
