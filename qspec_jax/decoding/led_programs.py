"""The programs of a model whose devices are those of several processes (``device/processes.py``).

One process leads: its :class:`LeadingPrograms` tell the others each call before they make it, and the others make the
same calls (:func:`follow`). Devices are thus asked for the same programs in the same order, whatever threads and clocks
decide in the process that leads. What the others compute stays on their devices, under a number by which calls name it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import AutoPlan, DecodingPlan, Plan
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.state import DecodeState, PromptChunk, Report
from qspec_jax.device import processes
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.model.decoder import Decoder

_SMALL_BYTES = 1 << 20
_SAME = "same"  # no call: what process 0 has loaded
_USED_UP = ("prefill", "loop", "with_rows_of")  # calls of which the first state is donated


class Call(NamedTuple):
    """A call that all processes make.

    Attributes:
        name: of the method.
        arguments, options: with states by their numbers, and other arrays in host memory.
        made: the number of the state that it makes; None for none.
        dropped: numbers of states that nobody needs any more.
    """

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    made: int | None
    dropped: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _State:
    """Stands for a state in a call."""

    number: int


class LeadingPrograms(Programs):
    """Those of the process that leads. See the module."""

    def __init__(self, decoder: Decoder, mesh: Mesh, tell: Callable[[Call], None]):
        super().__init__(decoder, mesh)
        self._tell = tell
        self._order = threading.RLock()  # held while a call is told and made
        self._numbers = itertools.count()
        self._states: dict[int, int] = {}  # by identity, while the state is alive
        self._dropped: list[int] = []

    def compile(
        self,
        plan: Plan,
        shape: Shape,
        widths: Iterable[int],
        *,
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        """See the base. The others compile as well; nobody waits for them but a call that needs the program."""
        for one in plan.choices if isinstance(plan, AutoPlan) else (plan,):
            self.lay_out_weights(one)
        widths = tuple(widths)
        with self._order:
            self._tell_call("compile", plan, shape, widths)
        super().compile(plan, shape, widths, on_event=on_event)

    def lay_out_weights(self, plan: DecodingPlan) -> None:
        """See the base."""
        with self._order:
            self._tell_call("lay_out_weights", plan)
            super().lay_out_weights(plan)

    def prefill(
        self,
        plan: DecodingPlan,
        shape: Shape,
        state: DecodeState,
        chunks: PromptChunk,
        rows: np.ndarray,
        sources: np.ndarray,
        count: int,
    ) -> tuple[DecodeState, Report]:
        """See the base."""
        with self._order:
            number = self._tell_call("prefill", plan, shape, state, chunks, rows, sources, count, makes=True)
            state, report = super().prefill(plan, shape, state, chunks, rows, sources, count)
            return self._noted(state, number), report

    def loop(
        self,
        plan: DecodingPlan,
        shape: Shape,
        state: DecodeState,
        retired: np.ndarray,
        *,
        max_cycles: int,
        until_finished: int,
    ) -> tuple[DecodeState, Report]:
        """See the base."""
        options: dict[str, Any] = {"max_cycles": max_cycles, "until_finished": until_finished}
        with self._order:
            number = self._tell_call("loop", plan, shape, state, retired, makes=True, **options)
            state, report = super().loop(plan, shape, state, retired, **options)
            return self._noted(state, number), report

    def idle_state(self, shape: Shape) -> DecodeState:
        """See the base."""
        with self._order:
            number = self._tell_call("idle_state", shape, makes=True)
            return self._noted(super().idle_state(shape), number)

    def with_rows_of(self, state: DecodeState, smaller: DecodeState) -> DecodeState:
        """See the base."""
        with self._order:
            number = self._tell_call("with_rows_of", state, smaller, makes=True)
            return self._noted(super().with_rows_of(state, smaller), number)

    def with_features(self, state: DecodeState, shape: Shape) -> DecodeState:
        """See the base."""
        with self._order:
            number = self._tell_call("with_features", state, shape, makes=True)
            return self._noted(super().with_features(state, shape), number)

    def function(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Refused: what is no program of a batch runs in one process."""
        raise UsageError("scores are computed by one process, and this is one of several; run the command in one alone")

    def lower_repetition(self, plan: DecodingPlan, state: DecodeState, **options: Any) -> jax.stages.Lowered:
        """Refused, as :meth:`function`."""
        raise UsageError("passes are timed by one process, and this is one of several; run the command in one alone")

    def _tell_call(self, name: str, *arguments: Any, makes: bool = False, **options: Any) -> int | None:
        """Tells a call; the number of the state that it makes."""
        number = next(self._numbers) if makes else None
        dropped = tuple(self._dropped.pop() for _ in range(len(self._dropped)))
        self._tell(Call(name, tuple(map(self._told, arguments)), options, number, dropped))
        return number

    def _told(self, argument: Any) -> Any:
        if isinstance(argument, DecodeState):
            return _State(self._states[id(argument)])
        return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, argument)

    def _noted(self, state: DecodeState, number: int | None) -> DecodeState:
        """A state, whose number is free again once nobody has it."""
        assert number is not None
        self._states[id(state)] = number
        weakref.finalize(state, self._forget, id(state), number)
        return state

    def _forget(self, identity: int, number: int) -> None:
        if self._states.get(identity) == number:
            del self._states[identity]
        self._dropped.append(number)


def programs_of(decoder: Decoder, mesh: Mesh | None) -> Programs:
    """The programs of a decoder, which tell other processes where this one leads some."""
    group = processes.current
    if mesh is None or group is None or not group.leads:
        return Programs(decoder, mesh)
    group.tell(Call(_SAME, (digest(decoder),), {}, None, ()))
    return LeadingPrograms(decoder, mesh, group.tell)


def digest(decoder: Decoder) -> str:
    """Tells models apart: by the shapes of all arrays, and the values of small ones that every device has: norms."""
    found = hashlib.sha256(repr(decoder.config).encode())
    for path, leaf in jax.tree.leaves_with_path(nnx.state(decoder)):
        found.update(repr((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))).encode())
        if leaf.is_fully_replicated and leaf.nbytes <= _SMALL_BYTES:
            found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def follow(programs: Programs, calls: Iterable[Call]) -> None:
    """Makes the calls of the process that leads, until there are no more.

    Raises:
        UsageError: another model was loaded there.
        QSpecError: as the calls do.
    """
    states: dict[int, DecodeState] = {}
    for call in calls:
        if call.name == _SAME:
            if call.arguments != (digest(programs.decoder),):
                raise UsageError("the model here is not that of process 0; give all processes the same files")
            continue
        for number in call.dropped:
            states.pop(number, None)
        given = [states[one.number] if isinstance(one, _State) else one for one in call.arguments]
        for one in call.arguments:
            if isinstance(one, _State) and call.name in _USED_UP:
                del states[one.number]
                break
        # A program that nobody needs may fail to compile; one that is needed fails again as it is called.
        with contextlib.suppress(*([QSpecError] if call.name == "compile" else [])):
            made = getattr(programs, call.name)(*given, **call.options)
            if call.made is not None:
                states[call.made] = made[0] if isinstance(made, tuple) else made
        del given
