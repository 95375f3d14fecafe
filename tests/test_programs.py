"""Contracts of how the programs are compiled."""

from __future__ import annotations

import jax

from qspec_jax import programs
from qspec_jax.speculative import DecodingPlan
from qspec_jax.types import Precision

PLAIN = DecodingPlan(Precision.W4A16)
CYCLES = DecodingPlan(Precision.W4A16, Precision.W4A8, 3)


def test_only_a_plain_loop_on_a_gpu_goes_without_command_buffers(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert programs._loop_options(PLAIN) == {"xla_gpu_enable_command_buffer": ""}
    assert programs._loop_options(CYCLES) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert programs._loop_options(PLAIN) is None


def test_the_users_flags_for_command_buffers_count(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=FUSION")
    assert programs._loop_options(PLAIN) is None
