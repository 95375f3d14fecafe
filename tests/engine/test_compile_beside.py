"""Compiling beside what runs: who dispatches is not kept waiting for Python."""

from __future__ import annotations

import sys
import threading

import pytest

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import DecodingPlan, Lookup
from qspec_jax.decoding.programs import Programs
from qspec_jax.engine.compile_beside import _SWITCH_S, CompileBeside
from qspec_jax.model.view import View

PLAN = DecodingPlan(View(), Lookup(), 3)
SHAPE = Shape.of(PLAN, rows=1, capacity=64)


class Compiling(Programs):
    """Programs that compile until they are told that they are done."""

    def __init__(self):
        self.has_begun, self.is_done = threading.Event(), threading.Event()

    def compile(self, plan, shape, widths, **_):
        self.has_begun.set()
        assert self.is_done.wait(60)
        if plan.draft_length == 3:
            raise RuntimeError("no such kernel")


@pytest.mark.parametrize("before_s", [0.005, 0.0001])
def test_python_changes_threads_often_until_the_last_one_has_compiled(before_s):
    """Whatever it was set to, and though one does not compile."""
    default_s = sys.getswitchinterval()
    sys.setswitchinterval(before_s)
    before_s = sys.getswitchinterval()
    try:
        programs, events = [Compiling(), Compiling()], []
        beside = [CompileBeside(one, events.append) for one in programs]
        for one, compiling, length in zip(beside, programs, (3, 7), strict=True):
            one.prepare(DecodingPlan(View(), Lookup(), length), SHAPE)
            assert compiling.has_begun.wait(60)
            assert sys.getswitchinterval() == pytest.approx(min(before_s, _SWITCH_S), abs=2e-6)
        for one, compiling in zip(beside, programs, strict=True):
            assert sys.getswitchinterval() == pytest.approx(min(before_s, _SWITCH_S), abs=2e-6)
            compiling.is_done.set()
            one._thread.shutdown()
        assert sys.getswitchinterval() == before_s
        assert events == ["lookup x3 is left out, as it cannot be compiled: no such kernel"]
    finally:
        sys.setswitchinterval(default_s)
