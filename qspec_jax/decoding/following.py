"""What a process does that follows process 0: it loads what that loads, and makes the calls that it makes.

See ``decoding/led_programs.py``. Its own models answer nobody else: their devices would be asked for programs that
those of the other processes know nothing of, and wait for their messages for ever.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Generator, Mapping
from typing import Any

from jax.sharding import Mesh

from qspec_jax.decoding.led_programs import Call, LeadingPrograms, Load, Loaded, Value, digest
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.state import DecodeState
from qspec_jax.device import processes
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.model.decoder import Decoder

_USED_UP = ("prefill", "read_pieces", "loop", "with_rows_of", "call")  # calls of which the first state is donated
_AHEAD = ("compile", "repetition")  # that may fail, for a program that nobody needs
_NAMES = "model", "draft_model"  # of files, which may lie elsewhere on each host
_OF_ALL = "call qspec_jax.load in all processes, in the same order, outside of what only process 0 does"
Renamed = Mapping[Any, Any]


class FollowingPrograms(Programs):
    """Those of a process that follows; nobody but :class:`Follower` may call them."""

    is_led = False

    def compile(self, *arguments: Any, **options: Any) -> None:
        """See the base."""
        self._check()
        super().compile(*arguments, **options)

    def lay_out_weights(self, plan: DecodingPlan) -> None:
        """See the base."""
        self._check()
        super().lay_out_weights(plan)

    def made(self, make: Callable[..., DecodeState]) -> DecodeState:
        """See the base."""
        self._check()
        return super().made(make)

    def function(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """See the base."""
        self._check()
        return super().function(compute)

    def _check(self) -> None:
        if not self.is_led:
            raise UsageError(
                "this process follows process 0, which alone generates and scores: have only that one do it "
                "(if processes.leads: ...), and end the block of qspec_jax.join in all of them"
            )


def programs_of(decoder: Decoder, mesh: Mesh | None) -> Programs:
    """The programs of a decoder, which tell other processes where this one leads some, and do as told elsewhere."""
    group = processes.current
    if mesh is None or group is None:
        return Programs(decoder, mesh)
    if group.leads:
        return LeadingPrograms(decoder, mesh, group)
    programs = FollowingPrograms(decoder, mesh)
    if group.follower is not None:
        group.follower.arrived.append(programs)
        group.meet(next(group.models))
    return programs


class Follower:
    """Does what process 0 says.

    Attributes:
        arrived: programs of models that this process has loaded, and process 0 has not said so yet.
    """

    def __init__(self, group: processes.Group, *, renamed: Renamed | None = None):
        """Begins with no model.

        Args:
            group: in which this process does not lead.
            renamed: this process loads when it is told to, and finds what process 0 calls so under these names; None
                for a script, which loads by itself.
        """
        self._group, self._renamed = group, renamed
        self.arrived: list[FollowingPrograms] = []
        self._models: dict[int, FollowingPrograms] = {}
        self._values: dict[tuple[int, int], Any] = {}
        self._is_loading = False

    def follow(self) -> int:
        """Does what process 0 says until that ends; its exit code.

        Raises:
            UsageError: another model was loaded there.
            QSpecError: a model cannot be loaded, or a call fails.
        """
        while True:
            said = self._until_load()
            if isinstance(said, processes.End):
                if self.arrived and self._renamed is None:
                    raise UsageError(f"process 0 has loaded fewer models than this process; {_OF_ALL}")
                return said.code
            if self._renamed is None:
                raise UsageError(f"process 0 loads a model, and this process does not; {_OF_ALL}")
            self._load(said, self._renamed)

    def await_load(self, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Does what process 0 says until that loads as well; arguments as of ``tell_load``.

        Raises:
            UsageError: it loads something else, or nothing more.
        """
        if self._is_loading:
            return
        said = self._until_load()
        if isinstance(said, processes.End):
            raise UsageError(f"this process loads a model, and process 0 does not; {_OF_ALL}")
        theirs = {"what": make.__name__, **options}
        for name, value in {"what": said.make.__name__, **said.options}.items():
            if name not in _NAMES and theirs.get(name) != value:
                mine = theirs.get(name)
                raise UsageError(f"{name} is {mine} here and {value} in process 0; give all processes the same")
        self._forget(said)

    def _load(self, load: Load, renamed: Renamed) -> None:
        self._forget(load)
        names = {name: renamed.get(value, value) for name, value in load.options.items() if name in _NAMES}
        self._is_loading = True
        try:
            load.make(**{**load.options, **names})
        finally:
            self._is_loading = False

    def _forget(self, load: Load) -> None:
        """Lets go what process 0 has no more, and what it could not load."""
        self.arrived.clear()
        for number in load.dropped:
            self._models.pop(number, None)
        self._values = {key: value for key, value in self._values.items() if key[0] in self._models}
        gc.collect()

    def _until_load(self) -> Load | processes.End:
        for said in self._group.hear():
            if isinstance(said, Loaded):
                self._take(said)
            elif isinstance(said, Call):
                self._make(said)
            else:
                return said
        raise AssertionError("hear() never ends")

    def _take(self, loaded: Loaded) -> None:
        if not self.arrived or digest(self.arrived[0].decoder) != loaded.digest:
            raise UsageError("the model here is not that of process 0; give all processes the same files")
        self._models[loaded.model] = self.arrived.pop(0)

    def _make(self, call: Call) -> None:
        """Makes a call. A program that nobody needs may fail to compile; one that is needed fails as it is called."""
        programs, values, model = self._models[call.model], self._values, call.model
        for number in call.dropped:
            values.pop((model, number), None)
        numbers = [one.number for one in call.arguments if isinstance(one, Value)]
        given = [values[model, one.number] if isinstance(one, Value) else one for one in call.arguments]
        if call.name in _USED_UP:
            is_function = call.name == "call"
            for number in numbers[is_function : is_function + 1]:
                del values[model, number]
        method = (lambda function, *rest: function(*rest)) if call.name == "call" else getattr(programs, call.name)
        failures = (QSpecError, NotImplementedError, ValueError, RuntimeError) if call.name in _AHEAD else ()
        with _led(programs), contextlib.suppress(*failures):
            made = method(*given, **call.options)
            if call.made is not None:
                is_state_of = isinstance(made, tuple) and call.name in ("prefill", "read_pieces", "loop")
                values[model, call.made] = made[0] if is_state_of else made


@contextlib.contextmanager
def _led(programs: FollowingPrograms) -> Generator[None]:
    programs.is_led = True
    try:
        yield
    finally:
        programs.is_led = False
