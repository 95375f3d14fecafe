"""The compiled programs of a decoder: one that reads prompts into rows (prefill), and the generation loop.

Programs (``decoding/lowering.py``) are compiled ahead of their first call: compile time is known and never hides in
another figure. A batch needs one loop, and one prefill program for each width of a chunk of a prompt, of which there
are ``len(CHUNK_WIDTHS)``: whatever prompts come, no more are compiled.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qspec_jax.decoding import packing
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.costs import CostTable, PassBytes, table_path
from qspec_jax.decoding.laid_out import LaidOut, compile_all
from qspec_jax.decoding.lowering import Lowering
from qspec_jax.decoding.plan import AutoPlan, DecodingPlan, Plan
from qspec_jax.decoding.program_store import ProgramStore, passed_over, program_keys
from qspec_jax.decoding.state import DecodeState, PromptChunk, PromptPieces, Report
from qspec_jax.device.bandwidth import copy_bandwidth
from qspec_jax.device.memory import check_memory, explain_out_of_memory, sharing_memory
from qspec_jax.device.settings import usual_settings
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.layouts import add_group_sums, lay_out, linears, rounds_in_vain
from qspec_jax.model.linear import activation_quantization
from qspec_jax.model.view import View


class Programs(Lowering):
    """Compiles what a decoder needs, and keeps it. Any thread may use it.

    Attributes:
        leaves: the decoder's arrays, as every program takes them.
        compiled: the programs by what they are for.
        num_compilations: programs compiled so far; constant once all that a batch needs are there.
        compile_s: seconds that took, and those of reading programs from the store.
        store: where programs of other processes are found, None for nowhere.
        costs: what cycles of this model take; kept beside the store, if there is one.
        packing: whether chunks of several prompts are read in one pass; None for where that changes no bit. To be set
            before anything is compiled.
        mesh: see the base. What runs on a mesh is kept nowhere but in this process.
    """

    packing: bool | None = None

    def __init__(self, decoder: Decoder, mesh: Mesh | None = None):
        super().__init__(decoder, mesh)
        self.num_compilations = 0
        self.compile_s = 0.0
        self.store: ProgramStore | None = None
        self._costs: CostTable | None = None
        self._fitting: set[tuple[int, int]] = set()  # rows and capacity of caches that were found to fit
        self._laid_out_for: set[tuple[View, ...]] = set()  # views of plans: to look at all linears takes 15 ms
        # Held to lay weights out, to trace, and to note what was compiled; not to compile, nor to run a program.
        self._lock = threading.RLock()

    @property
    def longest_packed(self) -> int:
        """Tokens of the longest chunk that is read in one pass with others (``decoding/packing.py``); 0 for none."""
        if self.packing:
            return packing.LONGEST_CHUNK * packing.PIECE
        if self.packing is False:
            return 0
        laid_out = self._laid_out
        if laid_out.longest_packed is None:
            laid_out.longest_packed = 0 if self._has_not_read_packed else packing.longest_packed(self.decoder)
        return laid_out.longest_packed

    @property
    def _has_not_read_packed(self) -> bool:
        """Of several GPUs, only those of one process with whole weights have (page 059 of the lab notebook).

        None of them has with floats that verify, nor into a cache of int8; one GPU alone has (page 062).
        """
        devices = [] if self.mesh is None else self.mesh.devices.flat
        processes = [one.process_index for one in devices if one.platform == "gpu"]
        if len(processes) < 2:
            return False
        if self.decoder.kv == KV_INT8 or any(linear.floats is not None for linear in linears(self.decoder)):
            return True
        return len(set(processes)) > 1 or self.decoder.split > 1

    @property
    def rounds_in_vain(self) -> bool:
        """See :func:`qspec_jax.model.layouts.rounds_in_vain`."""
        laid_out = self._laid_out
        if laid_out.rounds_in_vain is None:
            laid_out.rounds_in_vain = rounds_in_vain(self.decoder)
        return laid_out.rounds_in_vain

    @property
    def leaves(self) -> list[jax.Array]:
        """See the class."""
        return self._laid_out.leaves

    @property
    def compiled(self) -> dict[tuple[Any, ...], Any]:
        """See the class."""
        return self._laid_out.compiled

    @property
    def costs(self) -> CostTable:
        """See the class; read when it is first asked for."""
        with self._lock:
            if self._costs is None:
                store = self._kept_in
                path = None if store is None else table_path(store.folder.parent / "costs", self.decoder)
                self._costs = CostTable(PassBytes.of(self.decoder), path, bandwidth=copy_bandwidth())
            return self._costs

    @property
    def _kept_in(self) -> ProgramStore | None:
        """Where other processes find what this one compiled and measured; nowhere on a mesh."""
        return None if self._on_mesh is not None else self.store

    def save_costs(self) -> None:
        """Writes what was measured, if anybody asked for costs."""
        if self._costs is not None:
            self._costs.save()

    def has_loop(self, plan: DecodingPlan, shape: Shape) -> bool:
        """Whether the loop of a plan is there."""
        return _loop_key(plan, shape) in self.compiled

    def __len__(self) -> int:
        """Programs that are there."""
        return len(self.compiled)

    def adopt(self, others: Programs) -> None:
        """Takes the programs that were compiled for the shapes of this decoder before its arrays were there."""
        with self._lock:
            if self._laid_out.is_like(others._laid_out):
                self.compiled.update(others.compiled)
                self.num_compilations += others.num_compilations
                self.compile_s += others.compile_s

    @usual_settings()
    def compile(
        self,
        plan: Plan,
        shape: Shape,
        widths: Iterable[int],
        *,
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Compiles the loop, and the prefill programs of some widths, that are neither there yet nor in the store.

        Of a plan that chooses, the loops of all choices.

        Raises:
            OutOfMemoryError: the cache does not fit the device.
            UsageError: the kernels asked for by name do not serve this model.
        """
        plans, widths = plan.choices if isinstance(plan, AutoPlan) else (plan,), tuple(widths)
        size = shape.rows, shape.capacity
        if self.compiled.keys() >= self._wanted(plans, shape, widths).keys() and size in self._fitting:
            return
        for one in plans:
            self.lay_out_weights(one)
        wanted = self._wanted(plans, shape, widths)  # the order of weights decides how prompts are read
        if size not in self._fitting:  # later on, the memory that is free lacks the cache of the batch that runs
            self.check_cache(rows=shape.rows, capacity=shape.capacity)
            self._fitting.add(size)
        while not (laid_out := self._laid_out).compiled.keys() >= wanted.keys():
            self._add_missing(laid_out, wanted, on_event)

    def _wanted(
        self, plans: Sequence[DecodingPlan], shape: Shape, widths: Sequence[int]
    ) -> dict[tuple[Any, ...], Callable[[], jax.stages.Lowered]]:
        """How to lower the loops of some plans, and the programs that read chunks: packed, or for each width."""
        alone = [width for width in widths if width > self.longest_packed]
        of_device = shape.rows // self.num_row_shards
        sizes = packing.sizes_for(widths, of_device, shape.capacity) if len(alone) < len(widths) else ()
        wanted = {_loop_key(one, shape): functools.partial(self.lower_loop, one, shape) for one in plans}
        for key, lower, those in ((_prefill_key, self.lower_prefill, alone), (_pieces_key, self.lower_pieces, sizes)):
            wanted |= {key(plans[0], shape, one): functools.partial(lower, plans[0], shape, one) for one in those}
        return wanted

    def _add_missing(
        self,
        laid_out: LaidOut,
        wanted: Mapping[tuple[Any, ...], Callable[[], jax.stages.Lowered]],
        on_event: Callable[[str], None],
    ) -> None:
        """Reads or compiles what is not there, and waits for what other threads are compiling."""
        with self._lock:
            missing = {name: lower for name, lower in wanted.items() if name not in laid_out.compiled}
            theirs = [laid_out.under_way[name] for name in missing if name in laid_out.under_way]
            ours = {name: lower for name, lower in missing.items() if name not in laid_out.under_way}
            laid_out.under_way.update(dict.fromkeys(ours, done := threading.Event()))
        try:
            if ours:
                self._add(laid_out, ours, on_event)
        finally:
            with self._lock:
                for name in ours:
                    del laid_out.under_way[name]
            done.set()
        for event in theirs:
            event.wait()

    def _add(
        self,
        laid_out: LaidOut,
        missing: Mapping[tuple[Any, ...], Callable[[], jax.stages.Lowered]],
        on_event: Callable[[str], None],
    ) -> None:
        began = time.perf_counter()
        with self._lock:
            keys = program_keys(missing, self.decoder) if self._kept_in is not None else {}
        found = self._stored(keys)
        missing = {name: lower for name, lower in missing.items() if name not in found}
        if missing:
            on_event("compiling")
            found |= self._compile_missing(missing, keys)
        with self._lock:
            if laid_out is self._laid_out:  # otherwise another thread has laid the weights out meanwhile
                laid_out.compiled.update(found)
            self.num_compilations += len(missing)
            self.compile_s += time.perf_counter() - began

    def _stored(self, keys: Mapping[tuple[Any, ...], str]) -> dict[tuple[Any, ...], Any]:
        """Those programs with a key that the store has, read side by side."""
        if self.store is None or not keys:
            return {}
        device = jax.local_devices()[0]  # the default device: decoders that are elsewhere have no keys
        with ThreadPoolExecutor() as pool:
            programs = pool.map(functools.partial(self.store.load, device=device), keys.values())
            return {name: program for name, program in zip(keys, programs, strict=True) if program is not None}

    def _compile_missing(
        self,
        lowerings: Mapping[tuple[Any, ...], Callable[[], jax.stages.Lowered]],
        keys: Mapping[tuple[Any, ...], str],
    ) -> dict[tuple[Any, ...], Any]:
        """Compiles programs, and writes those with a key into the store."""
        with passed_over() if keys else contextlib.nullcontext():
            compiled = dict(zip(lowerings, compile_all(lowerings.values(), self._lock), strict=True))
        for name, program in compiled.items():
            if self.store is not None and name in keys:
                self.store.save(keys[name], program)
        return compiled

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
        """Reads the first ``count`` chunks into their rows (``prefill.prefill_rows``). The state is used up."""
        width = chunks.tokens.shape[1]
        program, leaves = self._program(_prefill_key(plan, shape, width), plan, shape, (width,))
        with explain_out_of_memory("while generating"):
            return self._run(program, leaves, state, chunks, rows, sources, np.int32(count))

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
        """Reads chunks into their rows in one pass (``prefill.read_pieces``). The state is used up."""
        key = _pieces_key(plan, shape, len(pieces.rows) // self.num_row_shards)
        program, leaves = self._program(key, plan, shape, (self.longest_packed,))
        with explain_out_of_memory("while generating"):
            return self._run(program, leaves, state, pieces, chunks, rows, sources, np.int32(num_copied))

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
        """Finishes the sequences that are ``retired`` and runs cycles; see :func:`speculative.generate`.

        The state is used up.
        """
        program, leaves = self._program(_loop_key(plan, shape), plan, shape, ())
        with explain_out_of_memory("while generating"):
            return self._run(program, leaves, state, retired, np.int32(max_cycles), np.int32(until_finished))

    def _program(
        self, key: tuple[Any, ...], plan: DecodingPlan, shape: Shape, widths: Iterable[int]
    ) -> tuple[Any, list[jax.Array]]:
        """A program, and the arrays that it takes. Compiled anew if another thread has laid weights out since.

        Raises:
            ValueError: no batch of this shape needs it, such as one for a number of pieces that ``packing`` has not.
        """
        while key not in (laid_out := self._laid_out).compiled:
            self.compile(plan, shape, widths)
            if laid_out is self._laid_out and key not in laid_out.compiled:
                kind, *_, size = key
                raise ValueError(f"no program {kind!r} of size {size} is compiled for {shape}, chunks {tuple(widths)}")
        return laid_out.compiled[key], laid_out.leaves

    @usual_settings()
    def lay_out_weights(self, plan: DecodingPlan) -> None:
        """Rewrites weights so that the kernels of a plan can read them; drops compiled programs if any weight changed.

        Weights get the order of codes that all views of the plan read, and the sums of their groups where a view
        quantises activations with a zero point. Neither is ever undone: plans that alternate keep their programs.
        """
        with self._lock:
            if plan.views in self._laid_out_for:
                return
            changed = lay_out(self.decoder, plan.views, self.mesh)
            quantization = linears(self.decoder)[0].quantization
            recipes = [] if quantization is None else [activation_quantization(quantization, one) for one in plan.views]
            if any(recipe is not None and not recipe.symmetric for recipe in recipes):
                changed |= add_group_sums(self.decoder, self.mesh)
            if changed:
                self._laid_out = LaidOut(self.decoder)
            self._laid_out_for.add(plan.views)

    def repetition(
        self, plan: DecodingPlan, make: Callable[[Decoder], DecodeState], *, advance: Callable[..., DecodeState]
    ) -> Callable[[DecodeState, int], DecodeState]:
        """The compiled loop of :meth:`lower_repetition` as a function of a state, which is used up, and repetitions.

        Args:
            plan: of the loop.
            make: a state like those that it takes, of which the shapes count.
            advance: what it repeats.
        """
        state = jax.eval_shape(lambda: make(self.decoder))
        program, laid_out = self.lower_repetition(plan, state, advance=advance).compile(), self._laid_out
        return lambda state, repetitions: self._run(program, laid_out.leaves, state, np.int32(repetitions))

    def function(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled ``compute(decoder, *arrays)`` as a function of the arrays, with the weights as they lie now.

        On a mesh it is the program of each device, with a decoder of its own, and returns the same on all.
        """
        laid_out = self._laid_out

        def run(leaves, arrays):
            return compute(laid_out.merge(leaves), *arrays)

        program = jax.jit(run if self._on_mesh is None else self._on_mesh.map_same(run, laid_out.leaves))
        return usual_settings()(lambda *arrays: self._run(program, laid_out.leaves, arrays))

    def check_cache(self, *, rows: int, capacity: int) -> None:
        """Raises OutOfMemoryError if a cache for ``rows`` sequences does not fit the device."""
        cache = jax.eval_shape(lambda: self.decoder.create_cache(batch=rows, capacity=capacity))
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        what = f"the caches of {rows} sequences of {capacity} tokens"
        if (mesh := self.mesh) is not None:  # rows and heads of which are split evenly
            together = sharing_memory(mesh)
            needed, what = needed * together // mesh.size, f"on {together} of {mesh.size} devices, {what}"
        check_memory(needed, what=what)


def _prefill_key(plan: DecodingPlan, shape: Shape, width: int) -> tuple[Any, ...]:
    return "prefill", plan.verify, shape, width


def _pieces_key(plan: DecodingPlan, shape: Shape, size: int) -> tuple[Any, ...]:
    return "pieces", plan.verify, shape, size


def _loop_key(plan: DecodingPlan, shape: Shape) -> tuple[Any, ...]:
    return "loop", plan, shape
