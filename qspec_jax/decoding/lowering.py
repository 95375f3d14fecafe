"""What the programs of a decoder compute, lowered for one device or a mesh: the generation loop, and prefills.

The decoder is split into its graph and its arrays once; the arrays are the programs' first argument, so
that every program reads the same ones. The second is the state of a batch, which is made here as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pallas_kernels.backends import early_launch
from qspec_jax.decoding import mailboxes, packing, prefill, speculative
from qspec_jax.decoding.chunks import Shape, empty_chunks
from qspec_jax.decoding.device_graphs import Graphs, compiler_options
from qspec_jax.decoding.draft_record import DraftRecord
from qspec_jax.decoding.laid_out import LaidOut
from qspec_jax.decoding.loop_settings import cycles_per_check, launches_early
from qspec_jax.decoding.on_mesh import OnMesh
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.sampling import Sampler
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.decoding.state import DecodeState, PromptChunk, Report, TokenScores, with_rows_of
from qspec_jax.model.cache import KVCache
from qspec_jax.model.collectives import own_rows, sending_to
from qspec_jax.model.decoder import Decoder


class Lowering:
    """Lowers what a decoder needs, and makes the states that it takes.

    Attributes:
        decoder: whose programs they are.
        mesh: that the decoder is on; None for one device.
    """

    _on_mesh: OnMesh | None = None

    def __init__(self, decoder: Decoder, mesh: Mesh | None = None):
        self.decoder = decoder
        self._on_mesh = None if mesh is None else OnMesh(mesh)
        self._laid_out = LaidOut(decoder)

    @property
    def mesh(self) -> Mesh | None:
        """See the class."""
        return None if self._on_mesh is None else self._on_mesh.mesh

    @property
    def num_row_shards(self) -> int:
        """Into how many parts the rows of a batch are split: their number must be a multiple of it."""
        return 1 if self._on_mesh is None else self._on_mesh.num_row_shards

    def lower_prefill(self, plan: DecodingPlan, shape: Shape, width: int) -> jax.stages.Lowered:
        """Lowers the program that reads chunks of a width into rows; its state is donated."""
        laid_out, rows_over = self._laid_out, self._rows_over

        def read(leaves, state, chunks, rows, sources, count):
            options: dict[str, Any] = {"plan": plan, "rows_over": rows_over}
            state = prefill.prefill_rows(laid_out.merge(leaves), state, chunks, rows, sources, count, **options)
            return state, Report.of(state, count * 0, rows_over=rows_over)

        state = jax.eval_shape(lambda: self._idle(shape))
        rows = np.zeros((shape.rows,), np.int32)
        sampler = Sampler.create([SamplingParams()] * shape.rows, shape.features)
        chunks = PromptChunk(**empty_chunks(shape, width), sampler=sampler)
        with early_launch.early_launch(False):
            return self._lower(read, laid_out, state, chunks, rows, rows, np.int32(0), graphs=Graphs.NONE)

    def lower_pieces(self, plan: DecodingPlan, shape: Shape, size: int) -> jax.stages.Lowered:
        """Lowers the program of passes in which each device reads so many pieces of prompts; its state is donated."""
        laid_out, rows_over = self._laid_out, self._rows_over

        def read(leaves, state, pieces, chunks, rows, sources, num_copied):
            places, options = (rows, sources, num_copied), {"plan": plan, "rows_over": rows_over}
            state = prefill.read_pieces(laid_out.merge(leaves), state, pieces, chunks, *places, **options)
            return state, Report.of(state, num_copied * 0, rows_over=rows_over)

        state = jax.eval_shape(lambda: self._idle(shape))
        rows = np.zeros((shape.rows,), np.int32)
        sampler = Sampler.create([SamplingParams()] * shape.rows, shape.features)
        chunks = PromptChunk(**empty_chunks(shape, 0), sampler=sampler)
        pieces = packing.empty_pieces(size * self.num_row_shards, shape.rows)
        with early_launch.early_launch(False):
            return self._lower(read, laid_out, state, pieces, chunks, rows, rows, np.int32(0), graphs=Graphs.NONE)

    def lower_loop(self, plan: DecodingPlan, shape: Shape) -> jax.stages.Lowered:
        """Lowers the generation loop; its state is donated."""
        laid_out, rows_over = self._laid_out, self._rows_over
        options: dict[str, Any] = {"cycles_per_check": cycles_per_check(plan), "rows_over": rows_over}

        def loop(leaves, state, retired, max_cycles, until_finished):
            retired = own_rows(retired, len(state.finished), rows_over)
            state = dataclasses.replace(state, finished=state.finished | retired)
            limits = max_cycles, until_finished
            decoder = laid_out.merge(leaves)
            with self._mailboxes(decoder, plan, len(state.finished)):
                state, cycles = speculative.generate(decoder, state, *limits, plan=plan, **options)
            return state, Report.of(state, cycles, rows_over=rows_over)

        state = jax.eval_shape(lambda: self._idle(shape))
        retired = np.zeros((shape.rows,), bool)
        # A run whose graphs gathered all logits ended with an illegal address, not explained yet (lab notebook, 052).
        tells_choices = state.sampler is None and state.scores is None
        with early_launch.early_launch(self._launches_early(plan, state.cache)):
            graphs = self._graphs if tells_choices else Graphs.USUAL
            return self._lower(loop, laid_out, state, retired, np.int32(0), np.int32(0), graphs=graphs)

    def lower_repetition(
        self, plan: DecodingPlan, state: DecodeState, *, advance: Callable[..., DecodeState] = speculative.cycle
    ) -> jax.stages.Lowered:
        """Lowers the loop ``(leaves, state, max_cycles) -> state`` for a state like the one given, which is donated.

        ``advance`` is what the loop repeats, see :func:`speculative.generate`.
        """
        options: dict[str, Any] = {"plan": plan, "cycles_per_check": cycles_per_check(plan), "advance": advance}
        options["rows_over"] = self._rows_over
        laid_out = self._laid_out

        def loop(leaves, state, max_cycles):
            decoder = laid_out.merge(leaves)
            with self._mailboxes(decoder, plan, len(state.finished)):
                return speculative.generate(decoder, state, max_cycles, **options)[0]

        with early_launch.early_launch(self._launches_early(plan, state.cache)):
            return self._lower(loop, laid_out, state, np.int32(0), reports=False, graphs=self._graphs)

    def _mailboxes(self, decoder: Decoder, plan: DecodingPlan, num_rows: int) -> AbstractContextManager[None]:
        """Where cycles of a device's decoder, of so many rows, send their sums; to be entered in its program."""
        kernels = decoder.layers[0].attention.kernels
        if self.mesh is None or mailboxes.obstacle(self.mesh, plan, kernels=kernels) is not None:
            return sending_to(None)
        passes = [(plan.verify, plan.draft_length + 1)]
        passes += [] if plan.draft_view is None else [(plan.draft_view, 1)]
        tokens = max(decoder.sequences_run(num_rows, count, view=view) * count for view, count in passes)
        return sending_to(mailboxes.empty_mailbox(tokens * decoder.config.hidden_size, decoder.dtype))

    @property
    def _graphs(self) -> Graphs:
        """What is recorded of loops."""
        return Graphs.USUAL if self._on_mesh is None else Graphs.WITH_MESSAGES

    @property
    def _rows_over(self) -> str | None:
        """The axis of the mesh over which rows are split, None for none."""
        return None if self._on_mesh is None else self._on_mesh.rows_over

    def _launches_early(self, plan: DecodingPlan, cache: KVCache) -> bool:
        # Nobody has tried it beside the kernels that carry messages.
        return self._on_mesh is None and launches_early(self.decoder, plan, cache)

    def _lower(
        self,
        program: Callable[..., Any],
        laid_out: LaidOut,
        state: DecodeState,
        *others: Any,
        reports: bool = True,
        graphs: Graphs = Graphs.USUAL,
    ) -> jax.stages.Lowered:
        """Lowers ``program(leaves, state, *others)``, whose state is donated, for one device or the mesh."""
        if self._on_mesh is not None:
            return self._on_mesh.lower(program, laid_out.leaves, state, *others, reports=reports, graphs=graphs)
        options = compiler_options(graphs, on_mesh=False) or None
        return jax.jit(program, donate_argnums=1, compiler_options=options).lower(laid_out.leaves, state, *others)

    def idle_state(self, shape: Shape) -> DecodeState:
        """Rows without a sequence."""
        return self._idle(shape) if self._on_mesh is None else self._on_mesh.made(shape, self._idle)

    def made(self, make: Callable[..., DecodeState]) -> DecodeState:
        """The state that a function makes for the decoder, where programs take it.

        On a mesh the function is given the ``shardings`` of the state as well, and makes its large arrays with them;
        those that it leaves in host memory are placed.
        """
        if self._on_mesh is None:
            return make(self.decoder)
        shardings = self._on_mesh.shardings(jax.eval_shape(lambda: make(self.decoder)))
        return self._on_mesh.placed(self._on_mesh.run(functools.partial(make, shardings=shardings), self.decoder))

    def _idle(self, shape: Shape) -> DecodeState:
        sizes = {"batch": shape.rows, "capacity": shape.capacity, "num_blocks": shape.num_blocks}
        cache = self.decoder.create_cache(**sizes)
        return self._with_features(DecodeState.idle(cache, lookup=shape.lookup), shape)

    def with_rows_of(self, state: DecodeState, smaller: DecodeState) -> DecodeState:
        """Idle rows that hold what those of another state do; see the function. The first state is used up."""
        return with_rows_of(state, smaller) if self._on_mesh is None else self._on_mesh.with_rows_of(state, smaller)

    def with_features(self, state: DecodeState, shape: Shape) -> DecodeState:
        """A state with what the features of a shape need besides; the sequences in it go on as before."""
        made = self._with_features(state, shape)
        return made if self._on_mesh is None else self._on_mesh.placed(made)

    def _with_features(self, state: DecodeState, shape: Shape) -> DecodeState:
        sampler = Sampler.idle(shape.rows, self.decoder.config.vocab_size, shape.features, state.sampler)
        scores = state.scores
        if shape.features.scores and scores is None:
            scores = TokenScores.zeros(shape.rows, shape.capacity)
        record = state.record
        if shape.kept_drafts and record is None:
            record = DraftRecord.idle(shape.rows, shape.capacity, shape.kept_drafts)
        return dataclasses.replace(state, sampler=sampler, scores=scores, record=record)

    def _run(self, program: Any, *arguments: Any) -> Any:
        return program(*arguments) if self._on_mesh is None else self._on_mesh.run(program, *arguments)
