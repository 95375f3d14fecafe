"""What GPU tests have in common."""

from __future__ import annotations

import pytest

from pallas_kernels.backends.triton import registers


@pytest.fixture(autouse=True)
def no_notice_of_the_triton_backend():
    """Operations silence it where they are traced, and pytest forgets that after a test; JAX remembers the trace."""
    registers.ignore_triton_deprecation()
