"""The programs of a model whose devices are those of several processes (``device/processes.py``).

One process leads: its :class:`LeadingPrograms` tell the others each call before they make it, and the others make the
same calls (``decoding/following.py``). Devices are thus asked for the same programs in the same order, whatever threads
and clocks decide in the process that leads. What the others compute stays on their devices, under a number by which
calls name it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import pickle
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import AutoPlan, DecodingPlan, Plan
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.state import DecodeState, PromptChunk, PromptPieces, Report
from qspec_jax.device import processes
from qspec_jax.errors import UsageError
from qspec_jax.model.decoder import Decoder

_SMALL_BYTES = 1 << 20


class Load(NamedTuple):
    """A model that all processes load.

    Attributes:
        make: what loads it, by name.
        options: its arguments, by name.
        dropped: numbers of models that process 0 has no more.
    """

    make: Callable[..., Any]
    options: Mapping[str, Any]
    dropped: tuple[int, ...]


class Loaded(NamedTuple):
    """What process 0 has loaded.

    Attributes:
        model: its number, by which calls name it.
        digest: of it.
    """

    model: int
    digest: str


class Call(NamedTuple):
    """A call that all processes make.

    Attributes:
        model: whose programs are called.
        name: of the method.
        arguments, options: with states and functions by their numbers, and other arrays in host memory.
        made: the number of the state or function that it makes; None for none.
        dropped: numbers of states and functions that nobody needs any more.
    """

    model: int
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    made: int | None
    dropped: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """Stands for a state or a function in a call."""

    number: int


def tell_load(make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Has the others load what this process is about to, where it leads some; where it follows, waits to be told.

    Raises:
        UsageError: process 0 loads something else, or nothing more.
    """
    group = processes.current
    if group is None:
        return
    if group.leads:
        gc.collect()  # models refer to themselves
        group.tell(Load(make, options, tuple(group.gone.pop() for _ in range(len(group.gone)))))
    elif group.follower is not None:
        group.follower.await_load(make, options)


class LeadingPrograms(Programs):
    """Those of the process that leads. See the module."""

    def __init__(self, decoder: Decoder, mesh: Mesh, group: Any):
        super().__init__(decoder, mesh)
        self._group, self._number = group, next(group.models)
        self._numbers = itertools.count()
        self._values: dict[int, int] = {}  # by identity, while the state is alive
        self._dropped: list[int] = []
        weakref.finalize(self, group.gone.append, self._number)
        group.tell(Loaded(self._number, digest(decoder)))
        group.meet(self._number)  # or it would compute what needs no message, and then hear that others cannot go on

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
        self._group.tell(self._call("compile", plan, shape, widths))
        super().compile(plan, shape, widths, on_event=on_event)

    def lay_out_weights(self, plan: DecodingPlan) -> None:
        """See the base."""
        with self._together("lay_out_weights", plan):
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
        with self._together("prefill", plan, shape, state, chunks, rows, sources, count, makes=True) as number:
            state, report = super().prefill(plan, shape, state, chunks, rows, sources, count)
            return self._noted(state, number), report

    def read_pieces(
        self,
        plan: DecodingPlan,
        shape: Shape,
        state: DecodeState,
        pieces: PromptPieces,
        chunks: PromptChunk,
        rows: np.ndarray,
        sources: np.ndarray,
        num_copied: int,
    ) -> tuple[DecodeState, Report]:
        """See the base."""
        arguments = plan, shape, state, pieces, chunks, rows, sources, num_copied
        with self._together("read_pieces", *arguments, makes=True) as number:
            state, report = super().read_pieces(*arguments)
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
        with self._together("loop", plan, shape, state, retired, makes=True, **options) as number:
            state, report = super().loop(plan, shape, state, retired, **options)
            return self._noted(state, number), report

    def idle_state(self, shape: Shape) -> DecodeState:
        """See the base."""
        with self._together("idle_state", shape, makes=True) as number:
            return self._noted(super().idle_state(shape), number)

    def made(self, make: Callable[..., DecodeState]) -> DecodeState:
        """See the base."""
        with self._together("made", _by_name(make), makes=True) as number:
            return self._noted(super().made(make), number)

    def with_rows_of(self, state: DecodeState, smaller: DecodeState) -> DecodeState:
        """See the base."""
        with self._together("with_rows_of", state, smaller, makes=True) as number:
            return self._noted(super().with_rows_of(state, smaller), number)

    def with_features(self, state: DecodeState, shape: Shape) -> DecodeState:
        """See the base."""
        with self._together("with_features", state, shape, makes=True) as number:
            return self._noted(super().with_features(state, shape), number)

    def function(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """See the base. What the function returns is on a device of this process.

        Raises:
            UsageError: the others could not find it.
        """
        with self._together("function", _by_name(compute), makes=True) as number:
            program = super().function(compute)

        def called(*arrays: Any) -> Any:
            given = tuple(map(np.asarray, arrays))
            with self._together("call", Value(number), *given):
                return jax.tree.map(lambda array: array.addressable_data(0), program(*given))

        return self._noted(called, number)

    def repetition(
        self, plan: DecodingPlan, make: Callable[[Decoder], DecodeState], *, advance: Callable[..., DecodeState]
    ) -> Callable[[DecodeState, int], DecodeState]:
        """See the base. The others compile as well; one that they cannot compile fails as it is called."""
        call = self._call("repetition", plan, _by_name(make), makes=True, advance=_by_name(advance))
        assert call.made is not None
        loop = Value(call.made)
        self._group.tell(call)
        program = super().repetition(plan, make, advance=advance)

        def repeated(state: DecodeState, repetitions: int) -> DecodeState:
            with self._together("call", loop, state, repetitions, makes=True) as number:
                return self._noted(program(state, repetitions), number)

        return self._noted(repeated, call.made)

    @contextlib.contextmanager
    def _together(self, name: str, *arguments: Any, makes: bool = False, **options: Any) -> Generator[Any]:
        """Around a call: has the others make it as well; the number of what it makes."""
        with self._group.in_order():
            call = self._call(name, *arguments, makes=makes, **options)
            with self._group.telling(call):
                yield call.made

    def _call(self, name: str, *arguments: Any, makes: bool = False, **options: Any) -> Call:
        number = next(self._numbers) if makes else None
        dropped = tuple(self._dropped.pop() for _ in range(len(self._dropped)))
        return Call(self._number, name, tuple(map(self._told, arguments)), options, number, dropped)

    def _told(self, argument: Any) -> Any:
        if isinstance(argument, DecodeState):
            return Value(self._values[id(argument)])
        return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, argument)

    def _noted(self, value: Any, number: Any) -> Any:
        """A state or function, whose number is free again once nobody has it."""
        self._values[id(value)] = number
        weakref.finalize(value, self._forget, id(value), number)
        return value

    def _forget(self, identity: int, number: int) -> None:
        if self._values.get(identity) == number:
            del self._values[identity]
        self._dropped.append(number)


def _by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that others find by its name.

    Raises:
        UsageError: it has none that they know.
    """
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"several processes run only functions of a module, which each of them can import, and not {function!r}"
        ) from error
    return function


def digest(decoder: Decoder) -> str:
    """Tells models apart: by the shapes of all arrays, and the values of small ones that every device has: norms."""
    found = hashlib.sha256(repr(decoder.config).encode())
    for path, leaf in jax.tree.leaves_with_path(nnx.state(decoder)):
        found.update(repr((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))).encode())
        if leaf.is_fully_replicated and leaf.nbytes <= _SMALL_BYTES:
            found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
