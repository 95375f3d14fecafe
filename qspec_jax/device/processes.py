"""Several processes that run one program together: how they talk, and how they end.

Every process has some of the devices of a mesh, and must ask its devices for the same programs in the same order.
Process 0 *leads*: it alone reads requests, looks at clocks and writes results, and tells the others what it asks of its
devices (:meth:`Group.tell`). They *follow* (:meth:`Group.hear`).

Whoever dies is missed. Each process leaves a sign of life with JAX's coordinator, in process 0, every two seconds. One
that leaves none for half a minute, or reports its error, ends the others with a line that names it: devices that wait
for a message of one that is gone wait for ever. Process 0 is missed at once, by :mod:`qspec_jax.device.relay`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from qspec_jax.errors import DeviceError

if TYPE_CHECKING:
    from qspec_jax.device.relay import Relay

SILENT_S = 30.0  # without a sign of life, after which a process is taken for dead
_BEAT_S = 2.0
_MEET_S = 0.05
_LEAVE_S = 5.0  # that the leader waits for the others to have heard that it ends
_OVER_S = 10.0  # after which a leader ends that can have nothing done any more, if it has not ended by itself
_LAST_S = 0.5  # that the leader outlives the others: it has JAX's coordinator
_KEPT = 4096  # messages with the coordinator, of which the oldest are deleted
_CARRIERS = re.compile("gloo|nccl|mpi_|connection (?:reset|closed)|coordination service", re.IGNORECASE)
_PREFIX = "qspec_jax"
_ENDED = "these processes have ended what they ran together, and with it their models"
LOST = "process 0 has ended, or cannot be reached any more"


class Group:
    """The processes that were found. Made by :func:`qspec_jax.device.meeting.join`.

    Attributes:
        process: which of them this one is.
        count: of all of them.
        models: the numbers that models of this process get.
        gone: of the leader: those of models that it has no more.
        follower: of the others: what does as the leader says.
        code: with which all end, where nothing fails.
    """

    def __init__(self, client: Any, process: int, count: int, relay: Relay | None = None):
        self._client, self.process, self.count, self._relay = client, process, count, relay
        self.models: Iterator[int] = itertools.count()
        self.gone: list[int] = []
        self.follower: Any = None
        self.code = 0
        self._told = 0
        self._order = threading.RLock()  # held while something is told, and done here
        self._over: str | None = None
        self._over_since = math.inf  # an error
        self._stopped = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def leads(self) -> bool:
        """Whether this process decides what all do."""
        return self.process == 0

    @property
    def over(self) -> str | None:
        """Why nothing can be run together any more; None where it can."""
        return self._over

    def watch(self, on_loss: Callable[[str, int], Any]) -> None:
        """Begins to leave signs of life and to look for those of the others.

        Args:
            on_loss: called in a thread of its own with what was lost and an exit code, once. It must end the process.
        """
        if self._relay is not None:
            self._relay.on_loss = lambda: None if self._stopped.is_set() or self._over else on_loss(LOST, 1)
        self._watch = threading.Thread(target=self._beat, args=(on_loss,), name="qspec_jax watch", daemon=True)
        self._watch.start()

    def _beat(self, on_loss: Callable[[str, int], Any]) -> None:
        signs = _Signs([0] if not self.leads else range(1, self.count))
        count = 0
        while not self._stopped.wait(_BEAT_S if count else 0):
            count += 1
            try:
                self._set(f"alive/{self.process}", str(count).encode())
                failed = self._read("failed")
                failed.pop(self.process, None)  # which it is about to say itself
                said = next((failed[one] for one in sorted(failed)), "1 ").partition(" ")
                code, lost = int(said[0]), said[2] or signs.lost(self._read("alive"))
                if lost is None and time.monotonic() - self._over_since > _OVER_S:
                    lost = self._over
                    self.fail(str(lost))
            except RuntimeError as error:
                code, lost = 1, f"{LOST} ({_first_line(error)})"
            if lost is not None and not self._stopped.is_set():
                with contextlib.suppress(RuntimeError):
                    self._set(f"left/{self.process}", b"")
                on_loss(lost, code)
                return

    def fail(self, error: str, code: int = 1) -> None:
        """Tells all that this process ends with an error, and its code; nothing where nobody can be told any more."""
        try:
            self._set(f"failed/{self.process}", f"{code} process {self.process}: {error}".encode())
        except RuntimeError:
            return

    def tell(self, message: Any) -> None:
        """Has all that follow hear a message, in order; of the leader.

        Raises:
            DeviceError: nothing can be done together any more.
        """
        with self._order:
            if self._over is not None:
                raise DeviceError(self._over)
            self._client.key_value_set_bytes(f"{_PREFIX}/told/{self._told}", pickle.dumps(message))
            if self._told >= _KEPT:
                self._client.key_value_delete(f"{_PREFIX}/told/{self._told - _KEPT}")
            self._told += 1
            if isinstance(message, End):
                self._over = _ENDED

    def in_order(self) -> contextlib.AbstractContextManager[Any]:
        """Around what decides what is told next."""
        return self._order

    @contextlib.contextmanager
    def telling(self, message: Any) -> Generator[None]:
        """Tells a message, around what this process does itself. Where that fails halfway the others do not know it.

        Raises:
            DeviceError: something has failed so before.
        """
        with self._order:
            try:
                self.tell(message)
                yield
            except BaseException as error:
                if self._over is None:
                    what = _first_line(error)
                    self._over_since = time.monotonic()
                    self._over = f"the processes cannot go on together after an error of this one ({what}); start anew"
                raise

    def hear(self) -> Iterator[Any]:
        """The messages of the leader, as they come; of those that follow.

        Raises:
            DeviceError: the leader cannot be reached any more.
        """
        while True:
            key = f"{_PREFIX}/told/{self._told}"
            try:
                message = self._client.blocking_key_value_get_bytes(key, 10_000)
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):  # it has nothing to do, which :meth:`watch` knows from being gone
                    continue
                raise DeviceError(f"{LOST} ({_first_line(error)})") from None
            self._told += 1
            heard = pickle.loads(message)
            if isinstance(heard, End):
                self._over = _ENDED
            yield heard

    def meet(self, number: int) -> None:
        """Marks a point that this process has come to; the leader waits there for all others, which do not wait."""
        if not self.leads:
            self._set(f"met/{number}/{self.process}", b"")
            return
        while len(self._read(f"met/{number}")) < self.count - 1:
            time.sleep(_MEET_S)

    def leave(self) -> str | None:
        """Ends what the processes have in common; the leader waits until the others have left, or for a few seconds.

        The process should then end at once (:func:`end_at_once` of commands): JAX would wait for all of them once more,
        and end the process with a signal where one has gone.

        Returns:
            for the leader, how another one has failed.
        """
        self._stopped.set()
        try:
            self._set(f"left/{self.process}", b"")
            began = time.monotonic()
            while self.leads and time.monotonic() - began < _LEAVE_S:
                if len(self._read("left")) == self.count:
                    time.sleep(_LAST_S)
                    return next((said.partition(" ")[2] for _, said in sorted(self._read("failed").items())), None)
                time.sleep(0.05)
        except RuntimeError:
            return None
        return None

    def _set(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(f"{_PREFIX}/{key}", value, allow_overwrite=True)

    def _read(self, folder: str) -> dict[int, str]:
        found = self._client.key_value_dir_get_bytes(f"{_PREFIX}/{folder}/")
        return {int(key.rpartition("/")[2]): value.decode() for key, value in found}


class _Signs:
    """Signs of life of some processes, by when they changed last."""

    def __init__(self, processes: Any):
        now = time.monotonic()
        self._seen: dict[int, tuple[str, float]] = dict.fromkeys(processes, ("", now))

    def lost(self, signs: dict[int, str]) -> str | None:
        """What to say of a process that has been silent for too long, None if there is none."""
        now = time.monotonic()
        for process, (sign, since) in self._seen.items():
            if (new := signs.get(process, "")) != sign:
                self._seen[process] = new, now
            elif now - since > SILENT_S:
                return f"process {process} has given no sign of life for {SILENT_S:.0f} s: it was killed, or its host"
        return None


class End(NamedTuple):
    """The last message of the leader, once all is done, with the exit code of all."""

    code: int = 0


current: Group | None = None  # that this process is in, if a command has joined one
has_met = False  # whether this process has begun to look for others, which then hear of its errors


before_the_end: list[Callable[[], None]] = []  # what an end at once must not leave: a terminal that shows nothing


def end_with(line: str, code: int = 1) -> NoReturn:
    """Ends the process at once, with an error that is a line: devices that wait for a message cannot be stopped."""
    for undo in before_the_end:
        with contextlib.suppress(Exception):
            undo()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody can be told
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
    os._exit(code)


def is_lost_message(error: BaseException) -> bool:
    """Whether devices could not tell each other something: what the libraries that carry messages report."""
    return bool(_CARRIERS.search(str(error)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
