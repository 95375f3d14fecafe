"""How the tests themselves are run."""

from __future__ import annotations

import jax
import pytest

from tests.conftest import THOROUGH


@pytest.mark.contract
def test_a_contract_is_compiled_as_users_compile():
    assert jax.config.read("jax_disable_most_optimizations") is False


def test_all_else_is_compiled_quickly_on_a_cpu():
    quickly = jax.default_backend() == "cpu" and not THOROUGH
    assert jax.config.read("jax_disable_most_optimizations") is quickly
