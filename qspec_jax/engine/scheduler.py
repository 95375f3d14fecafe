"""Continuous batching: which sequence is in which row, and what the device does next.

The device is asked for two things, by turns. A *prefill* reads chunks of prompts into idle rows; a *burst* runs
cycles in the generation loop until enough rows are idle, or for about ``burst_s`` seconds, or, of a batch that serves,
until somebody comes who can have a row (:mod:`qspec_jax.engine.burst`). Between them the host takes out what has
finished and lets in what waits, in order. A prompt longer than a chunk enters chunk by chunk. In a batch that serves,
short bursts lie between, so that the others go on meanwhile; else all prompts are read first, so that no cycle runs
with fewer rows than there could be. Chunks that a row holds already are not read again
(:mod:`qspec_jax.engine.prefixes`), nor what a row holds of a request's own session
(:mod:`qspec_jax.engine.held_texts`).

While a burst runs, whoever called :meth:`Scheduler.advance` turns the tokens of the one before into text: a thread of
its own dispatches bursts, since a loop on a GPU keeps busy who dispatches it. What a sequence yields does not depend on
any of this: rows are independent, and so are cycles.

An error or an interruption may leave a step half done, and the state used up. The next step then computes again what
was under way, which yields the same tokens. Any thread may add requests; steps of several threads wait for each other.

With an ``AutoPlan``, each burst may run another plan (:mod:`qspec_jax.engine.chooser`). All have the same target and
read and write the same state, so that tokens do not depend on the choice. Another thread compiles what may be chosen.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.plan import AutoPlan, Plan
from qspec_jax.decoding.programs import Programs, Report
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.decoding.state import DecodeState, PromptPieces
from qspec_jax.device.memory import explain_out_of_memory
from qspec_jax.device.settings import usual_settings
from qspec_jax.engine.burst import SLICE_S, run_in_slices
from qspec_jax.engine.choosing import Choosing
from qspec_jax.engine.clock import Clock
from qspec_jax.engine.compile_beside import NextPrograms
from qspec_jax.engine.interruption import is_interruption
from qspec_jax.engine.pace import Pace
from qspec_jax.engine.prefixes import NextChunk
from qspec_jax.engine.reading import read_next
from qspec_jax.engine.request_queue import RequestQueue
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import RunTotals
from qspec_jax.engine.rows import Rows
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.engine.served import Served

_BURST_S = 0.5
# For which who has dispatched a burst leaves Python to the thread that does it: it would else wait for 5 ms.
_HAND_OVER_S = 0.0002
_LOOK_S = 0.05  # from one look to the next at who has come, while nobody can be served


class Scheduler:
    """Runs requests through the rows of one batch.

    Attributes:
        shape: of the programs. Its ``features`` grow with what requests need.
        totals: figures so far.
    """

    @usual_settings()
    def __init__(
        self,
        programs: Programs,
        plan: Plan,
        *,
        rows: int,
        capacity: int,
        burst_s: float = _BURST_S,
        on_event: Callable[[str], None] | None = None,
        state_of: Plan | None = None,
        keep_drafts: bool = False,
        serves: bool = False,
    ):
        """Makes a batch; compiling and allocating wait for the first request.

        Args:
            programs: of the model.
            plan: what a cycle does, or what to choose from.
            rows: sequences that run together; on a mesh they become a multiple of its axis ``data``.
            capacity: cache positions of each.
            burst_s: about how long a burst lasts, and thus how long a result or an interruption may have to wait.
            on_event: called with a few words when a long step begins.
            state_of: keep what this plan needs instead: programs of one of its choices are then those it would run.
            keep_drafts: keep what each cycle drafts: the programs are then others.
            serves: requests come while others run, and nobody is to wait long: neither who comes for the end of a
                burst, nor who decodes for many who read.
        """
        rows = -(-rows // programs.num_row_shards) * programs.num_row_shards
        self.shape = Shape.of(state_of or plan, rows=rows, capacity=capacity, keep_drafts=keep_drafts)
        self.totals = RunTotals(rows=rows)
        self._programs, self._serves = programs, serves
        # That of the next burst, and that of the first one, which reads prompts as well: all have one target.
        self._plan = self._first_plan = plan.choices[0] if isinstance(plan, AutoPlan) else plan
        self._on_event = on_event or (lambda _: None)
        self._choosing: Choosing | None = None
        if isinstance(plan, AutoPlan):
            options: dict[str, Any] = {"burst_s": burst_s, "serves": serves, "on_event": self._on_event}
            self._choosing = Choosing(programs, plan, self.shape, **options)
        self._running = threading.RLock()  # held for a step, which may last as long as a burst
        self._queue = RequestQueue()
        self._next_programs = NextPrograms(programs, self._first_plan, self._on_event)
        self._served = Served(self._next_programs, programs, self._queue, self._on_event)
        self._is_torn = False  # a step has begun, and not ended
        self._rows = Rows(self.shape.rows, self._programs.num_row_shards)
        self._state: DecodeState | None = None
        self._inherited: DecodeState | None = None  # rows of a smaller batch, until there is a state
        self._dispatcher = ThreadPoolExecutor(1, "qspec_jax dispatch")
        self._flight: Future[tuple[DecodeState, Report]] | None = None  # the burst under way, which has the state
        self._pace = Pace(rows, burst_s=burst_s, serves=serves)
        self._why = ""  # the plan of the next burst was chosen
        self._clock = Clock()

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._queue or self._rows.num_in_use)

    @property
    def num_rows_in_use(self) -> int:
        """Rows that a sequence has."""
        return self._rows.num_in_use

    @property
    def num_waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._queue)

    def add(self, request: Request) -> RunningSequence:
        """Queues a request."""
        return self._queue.add(request)

    def expect(self, widths: Iterable[int], features: SamplingFeatures) -> None:
        """Has :meth:`compile` compile what requests to come may need: widths of chunks, and kinds of sampling."""
        with self._running:
            self._served.expect(widths, features)

    def cancel(self, sequence: RunningSequence) -> None:
        """Lets no more tokens come of a sequence."""
        with self._running:
            self.totals.requests += sequence.entered_s is not None and not sequence.finished
            sequence.cancelled = sequence.cancelled or not sequence.finished
            sequence.finished = True
            sequence.chunks = []
            self._queue.drop(sequence)

    def suspects(self) -> list[RunningSequence]:
        """Of a batch whose steps fail: those that need more than was expected, or has run.

        Whoever asks cancels them. The next step is then one without what they need.
        """
        with self._running:
            self._needed()  # of whoever has just come
            return self._served.suspects()

    def leave_out_width(self, error: BaseException) -> bool:
        """Of a batch whose steps fail: whether the next one reads prompts without what failed as it first ran."""
        with self._running:
            return self._served.leave_out_width(error)

    def inherit(self, other: Scheduler) -> None:
        """Goes on with what the rows of another one hold, of as many rows and less capacity. It is of no use after."""
        while other.busy:
            other.advance()
        self.totals = other.totals
        if not other._is_torn:
            self._rows, self._inherited = other._rows, other._state

    @usual_settings()
    def advance(self, max_cycles: int | None = None) -> list[RunningSequence]:
        """Waits for the burst under way, and dispatches what comes next.

        Args:
            max_cycles: of the next burst; None for about ``burst_s`` seconds of them.

        Returns:
            the sequences that have new tokens, are finished, or cannot be served.

        Raises:
            OutOfMemoryError, UsageError: as :meth:`Programs.compile`.
        """
        with self._running:
            if self._flight is not None:
                futures.wait([self._flight])  # an interruption here leaves all as it is
            if self._is_torn:
                self._start_again()
            self._is_torn, handled = True, sys.exception()
            try:
                changed = self._step(max_cycles)
            except Exception as error:
                if is_interruption(error, handled):
                    raise KeyboardInterrupt from error
                raise
            self._is_torn = False
            changed += self._served.refused
            self._served.refused = []
            return changed

    def _start_again(self) -> None:
        """Has all that is not finished wait again: a step ended half way, and the state may be used up."""
        self._dispatcher.submit(bool).result()  # until no burst is under way, whoever was told of it
        self._flight, self._state, self._inherited, self._clock = None, None, None, Clock()
        self.totals.requests += self._queue.start_again()
        for sequence in self._queue.unfinished():
            self.totals.tokens -= len(sequence.token_ids)
            sequence.start_again()
        self._rows = Rows(self.shape.rows, self._programs.num_row_shards)

    def _step(self, max_cycles: int | None) -> list[RunningSequence]:
        if self._flight is None:
            return self._go_on(max_cycles)
        flight, self._flight, plan = self._flight, None, self._plan
        self._state, report = flight.result()
        self._served.ran(self.shape.features)
        running = self._rows.decoding()
        finished, cycles, lengths = jax.device_get((report.finished, report.cycles, report.accepted_lengths))
        made_s = time.perf_counter()
        num_finished = int(finished[[row for row, one in running.items() if not one.finished]].sum())
        self._count(int(cycles), self._clock.landed(), running, lengths, num_finished=num_finished)
        # Only a text tells whether a stop string ends it; other tokens can wait until the device has something to do.
        watched = {row: one for row, one in running.items() if one.watch is not None}
        others = {row: one for row, one in running.items() if one.watch is None}
        changed = self._receive(jax.device_get(report), watched, made_s) if watched else []
        self._free(running, finished, report)
        try:
            more = self._go_on(max_cycles)
        finally:
            changed += self._receive(jax.device_get(report), others, made_s)
            if self._choosing is not None:
                self._choosing.received(plan, changed)
        if self._choosing is not None and self._flight is not None:
            self._choosing.look_ahead(list(self._rows.decoding().values()), self._queue)
        return changed + more

    def _go_on(self, max_cycles: int | None) -> list[RunningSequence]:
        """Dispatches what comes next; the sequences whose prompts have been read by it."""
        if not self.busy:
            if self._choosing is not None:
                self._choosing.end()
            self._programs.save_costs()
            self._clock = Clock()
            return []
        changed = []
        self._let_in()
        read_before, computed_before = self.totals.prefill_s, self.totals.computed_prompt_tokens
        prefills, num_chunks, rounds = self._prefill()
        computed = self.totals.computed_prompt_tokens - computed_before
        if self._rows.decoding() and (self._serves or not self._rows.reading()):
            self._dispatch(max_cycles)
        for count, (report, read) in enumerate(prefills, 1):
            if read:  # the others have no news, but for the last one, which says when all were done
                report = jax.device_get(report)  # an index into it would wait for the burst that has been dispatched
                changed += self._receive(report, read, time.perf_counter())
                self._free(read, report.finished, report)
            elif count == len(prefills):
                jax.block_until_ready(report)
            self.totals.prefill_s += self._clock.landed(more=self._flight is not None or count < len(prefills))
        if num_chunks:
            seconds = self.totals.prefill_s - read_before
            of_them = {"rounds": rounds, "passes": len(prefills), "tokens": computed}
            self._pace.note_reading(chunks=num_chunks, **of_them, seconds=seconds)
        return changed

    def _count(
        self, cycles: int, seconds: float, running: Mapping[int, RunningSequence], lengths: Any, *, num_finished: int
    ) -> None:
        """Notes how long the cycles of a burst took, and how many drafts of each of its sequences were accepted."""
        gap_s = self.totals.gap_s
        self._pace.note_burst(cycles=cycles, seconds=seconds, finished=num_finished, gap_s=gap_s)
        self.totals.decode_s += seconds
        self.totals.cycles += cycles
        new = np.zeros(self._plan.draft_length + 1, np.int64)
        for row, sequence in running.items():
            before = sequence.accepted_lengths or [0] * len(lengths[row])
            gained = lengths[row][: len(new)] - np.asarray(before[: len(new)])
            new += gained
            sequence.count_cycles(self._plan, gained.tolist())
        self.totals.count_burst(self._plan, cycles, seconds, new.tolist(), why=self._why)
        if self._choosing is not None:
            self._choosing.ran(self._plan, running.values(), cycles=cycles, seconds=seconds, histogram=new.tolist())

    def _receive(
        self, report: Report, sequences: Mapping[int, RunningSequence], made_s: float
    ) -> list[RunningSequence]:
        """Gives the new tokens of some rows to their sequences, which have changed.

        Args:
            report: in host memory.
            sequences: by row.
            made_s: when the device was done with them, which may be a while ago.
        """
        changed = []
        for row, sequence in sequences.items():
            if not sequence.finished:
                new = slice(len(sequence.token_ids), report.num_tokens[row])
                sequence.receive(report.tokens[row, new].tolist(), finished=bool(report.finished[row]), made_s=made_s)
                sequence.receive_scores(report.scores, row, new)
                sequence.receive_cycles(report.record, row, new.start)
                lengths = report.accepted_lengths[row].tolist()
                self.totals.tokens += len(sequence.token_ids) - new.start
                self.totals.count_cycles(sequence.accepted_lengths, lengths)
                sequence.accepted_lengths = lengths
                changed.append(sequence)
                if sequence.finished:  # and not before: until then it may have to start again
                    self._queue.drop(sequence)
                    if self._choosing is not None:
                        self._choosing.finished(sequence)
                    self.totals.requests += 1
        return changed

    def _free(self, sequences: Mapping[int, RunningSequence], finished: Any, report: Report) -> None:
        """Frees the rows of sequences that are finished, as the device or the host says."""
        for row, sequence in sequences.items():
            if finished[row] or sequence.finished:
                self._rows.free(row, device_knows=bool(finished[row]))
                if (session := sequence.request.session) is not None:
                    tokens, num_tokens = jax.device_get((report.tokens, report.num_tokens))
                    # The newest token is not in the cache yet.
                    generated = tokens[row, : max(0, num_tokens[row] - 1)].tolist()
                    prompt = sequence.request.token_ids[: sequence.read_up_to]
                    self._rows.texts.note(row, session, [*prompt, *generated])

    @usual_settings()
    def compile(self) -> Shape:
        """Compiles what the requests so far need; the shape of the programs.

        Raises:
            OutOfMemoryError, UsageError: as :meth:`Programs.compile`.
        """
        with self._running:
            return self._compile(self._needed())

    @usual_settings()
    def allocate(self) -> None:
        """Compiles what the requests so far need, and makes the cache: who comes first then waits for neither.

        Raises:
            OutOfMemoryError, UsageError: as :meth:`Programs.compile`.
        """
        with self._running:
            if self._flight is None and not self._is_torn:  # otherwise there is one, or there will be
                self._take_shape(self._compile(self._needed()))
                jax.block_until_ready(self._state)

    def _needed(self) -> SamplingFeatures:
        """What the requests so far need."""
        self._queue.take_in(self._rows.texts.has)
        return self._queue.features

    def _compile(self, features: SamplingFeatures, entered: Sequence[RunningSequence] = ()) -> Shape:
        wanted, compiled_s = self.shape._replace(features=features), self._programs.compile_s
        compile_widths = functools.partial(self._programs.compile, self._first_plan, wanted, on_event=self._on_event)
        self._served.compile(compile_widths, entered if self._serves else None)
        if seconds := self._programs.compile_s - compiled_s:
            self.totals.compile_s += seconds
            self._clock = Clock()
        return wanted

    def _let_in(self) -> None:
        """Gives idle rows to those that wait, and compiles what they need.

        In a batch that serves, those wait that need programs which are not there: others go on meanwhile.
        """
        served, idle, entered = self._needed(), set(self._rows.idle), []
        if self._serves and self._state is not None:
            served = self._served.features(self.shape)
        while idle and (entering := self._queue.next(served)) is not None:
            idle.remove(self._rows.enter(entering, idle, restart_multiple=self._served.restart_multiple))
            self.totals.reused_prompt_tokens += entering.num_kept
            self._queue.expect_of(entering)
            entered.append(entering)
            if self._choosing is not None:
                self._choosing.entered()
        self._take_shape(self._compile(served, entered))
        for sequence in entered:
            sequence.entered_s = time.perf_counter()
        if not self._rows.num_in_use:
            self._next_programs.wait(_LOOK_S)
            self._clock = Clock()

    def _take_shape(self, wanted: Shape) -> None:
        """Makes the state for a shape, or gives the one that is there what that needs besides."""
        if self._state is None:
            with explain_out_of_memory("while making the cache"):
                self._state = self._programs.idle_state(wanted)
            if self._inherited is not None:
                self._state, self._inherited = self._programs.with_rows_of(self._state, self._inherited), None
        elif wanted != self.shape:
            self._state = self._programs.with_features(self._state, wanted)
        self.shape = wanted
        if self._choosing is not None:
            self._choosing.note_shape(wanted)

    def _prefill(self) -> tuple[list[tuple[Report, dict[int, RunningSequence]]], int, int]:
        """Dispatches chunks of the prompts that rows still read, until others have waited long enough.

        Returns:
            reports, each with who has read its prompt; the number of chunks; and how often all had their next one.
        """
        reports, num_chunks, rounds = [], 0, 0
        most_s = None if self._serves else self._pace.burst_s  # nobody waits but an interruption
        while True:
            reading = self._rows.reading()
            anyone_waits = self._serves and self._rows.decoding()
            reading = self._pace.reading.first(reading) if anyone_waits else reading
            if not reading or (reports and self._pace.reading.is_enough(num_chunks, len(reading), most_s=most_s)):
                return reports, num_chunks, rounds
            more = self._pace.reading.num_more(num_chunks + len(reading)) if anyone_waits else sys.maxsize
            some, count = self._read(reading, more)
            reports, num_chunks, rounds = reports + some, num_chunks + count, rounds + 1

    def _read(
        self, rows: Mapping[int, RunningSequence], more: int
    ) -> tuple[list[tuple[Report, dict[int, RunningSequence]]], int]:
        """Dispatches the next chunk of some rows, and up to so many more that their passes have room for.

        Returns:
            reports, as :meth:`_prefill`; and the number of chunks, without those that were copied.
        """
        of_rows = {row: one.chunks for row, one in rows.items()}
        own = [NextChunk(row, row, one.num_read) for row, one in rows.items() if one.num_kept]
        sizes: dict[str, Any] = {"rows": self.shape.rows, "capacity": self.shape.capacity}
        sizes |= {"longest_packed": self._programs.longest_packed, "num_devices": self._programs.num_row_shards}
        widths, reports, num_chunks = self._queue.widths, [], 0
        more = more if widths.are_all else 0  # passes for several chunks of a prompt come with the widest width
        for one in read_next(self._rows.held, of_rows, own, most=more, **sizes, widths=widths.usable):
            reports.append(self._dispatch_chunks(*one))
            num_chunks += sum(some.count for some in one.chunks)
        return reports, num_chunks

    def _dispatch_chunks(
        self, width: int, next_chunks: Sequence[NextChunk], pieces: PromptPieces | None = None
    ) -> tuple[Report, dict[int, RunningSequence]]:
        """Dispatches chunks of a width, or those of which ``pieces`` have the tokens.

        Returns:
            the report, and who has read the prompt with them, by row.
        """
        chunks, num_reused, num_computed = self._rows.read(self.shape, width, next_chunks)
        self.totals.reused_prompt_tokens += num_reused
        self.totals.computed_prompt_tokens += num_computed
        nobody = 0 if pieces is None else self.shape.rows  # of places without a chunk
        rows, sources = np.full((2, self.shape.rows), nobody, np.int32)
        for place, one in enumerate(next_chunks):
            rows[place], sources[place] = one.row, one.source
        assert self._state is not None
        self.totals.gap_s += self._clock.dispatching()
        arguments = self._first_plan, self.shape, self._state
        if pieces is None:
            with self._queue.widths.first_read(width) as is_first:
                self._state, report = self._programs.prefill(*arguments, chunks, rows, sources, count=len(next_chunks))
                if self._serves and is_first:
                    jax.block_until_ready(report)
        else:
            copied = sum(one.source != one.row for one in next_chunks)
            self._state, report = self._programs.read_pieces(*arguments, pieces, chunks, rows, sources, copied)
        decoding = self._rows.decoding()
        return report, {one.row: decoding[one.row] for one in next_chunks if one.row in decoding}

    def _dispatch(self, max_cycles: int | None) -> None:
        """Dispatches a burst."""
        assert self._state is not None
        decoding, anyone_reads = self._rows.decoding(), bool(self._rows.reading())
        # Who has come since rows were given out can have one of those after a slice, and waits for nobody to finish.
        has_room = self._serves and bool(self._rows.idle)
        others_wait = anyone_reads or (self._queue.anyone_may_enter and not has_room)
        fitting = functools.partial(self._pace.cycles, decoding=len(decoding), anyone_reads=anyone_reads)
        cycles, cycle_s = fitting(seconds=None), None
        if self._choosing is not None:
            most_cycles = cycles if self._serves else None
            burst = self._choosing.next(list(decoding.values()), self._queue, most_cycles=most_cycles)
            self._plan, self._why = burst.plan, burst.why
            cycle_s = burst.cycle_s
            cycles = burst.cycles or fitting(seconds=burst.seconds, cycle_s=cycle_s)
            max_cycles = min(cycles, max_cycles or cycles)
        cycles = max_cycles or cycles
        self.totals.gap_s += self._clock.dispatching()
        until = self._pace.until_finished(decoding=len(decoding), others_wait=others_wait)
        self._flight = self._dispatcher.submit(
            run_in_slices,
            functools.partial(self._programs.loop, self._plan, self.shape, until_finished=until),
            self._state,
            self._rows.take_retired(),
            max_cycles=cycles,
            slice_cycles=fitting(seconds=SLICE_S, cycle_s=cycle_s) if self._serves and not others_wait else cycles,
            ends_early=lambda report: self._queue.anyone_may_enter and bool(jax.device_get(report.finished).any()),
        )
        time.sleep(_HAND_OVER_S)
