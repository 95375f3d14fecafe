"""The compiled programs of a decoder: prefill and loop, one pair per plan and shape.

The decoder is split into its graph and its arrays once; the arrays are the programs' first argument, so
that every program reads the same ones. Programs are compiled ahead of their first call: compile time is
known and never hides in another figure.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from pallas_kernels import with_group_sums
from qspec_jax import speculative
from qspec_jax.errors import UsageError
from qspec_jax.linear import Linear, activation_quantization
from qspec_jax.memory import check_memory, explain_out_of_memory
from qspec_jax.modeling import Decoder
from qspec_jax.sampling import Sampler, SamplingParams
from qspec_jax.speculative import DecodeState, DecodingPlan
from qspec_jax.types import Precision

# Prompts are padded to powers of two from here on and caches to multiples of 64: nearby lengths share a program.
_MIN_PROMPT_WIDTH = 32
_SLOT_MULTIPLE = 64
ALL_CYCLES = int(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that run together, as padded arrays.

    Attributes:
        tokens: ``[B, T]`` int32, padded on the right.
        lengths: ``[B]`` int32, valid tokens of each prompt.
        max_new_tokens: ``[B]`` int32.
        slots: cache positions per sequence.
        capacity: width of the output.
        sampler: how tokens are drawn, of NumPy arrays; None for the most likely ones.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    max_new_tokens: np.ndarray
    slots: int
    capacity: int
    sampler: Sampler | None = None

    @classmethod
    def create(
        cls,
        token_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        slots: int,
        rows: int,
        sampling: Sequence[SamplingParams] = (),
    ) -> Batch:
        """Pads prompts to a power of two in length and, with sequences that stop at once, to ``rows``.

        ``sampling`` has the parameters of each prompt; without any, tokens are chosen greedily.
        """
        longest = max(map(len, token_ids))
        width = min(max(_MIN_PROMPT_WIDTH, 1 << (longest - 1).bit_length()), slots)
        tokens = np.zeros((rows, width), np.int32)
        lengths, limits = np.ones((rows,), np.int32), np.ones((rows,), np.int32)
        for row, ids in enumerate(token_ids):
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
            limits[row] = max_new_tokens
        padding = [SamplingParams()] * (rows - len(sampling))
        return cls(
            tokens,
            lengths,
            limits,
            slots,
            capacity=_round_up(max_new_tokens, _SLOT_MULTIPLE),
            sampler=Sampler.create([*sampling, *padding]),
        )

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, Sampler | None]:
        """What the prefill program takes."""
        return self.tokens, self.lengths, self.max_new_tokens, self.sampler


def fitting_slots(num_tokens: int) -> int:
    """Cache positions for ``num_tokens``, rounded up so that nearby numbers share a program."""
    return _round_up(num_tokens, _SLOT_MULTIPLE)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The two programs of one plan and shape, and the seconds it took to compile them now."""

    prefill_program: Any
    loop_program: Any
    leaves: list[jax.Array]
    batch: Batch
    compile_s: float

    def prefill(self) -> tuple[DecodeState, float]:
        """Runs the prompts; the state after the first token of each, and the seconds it took."""
        return _timed(lambda: self.prefill_program(self.leaves, *self.batch.arrays))

    def run(self, state: DecodeState, max_cycles: int = ALL_CYCLES) -> tuple[DecodeState, float]:
        """Runs up to ``max_cycles`` cycles in one dispatch, in the buffers of ``state``, which is used up."""
        return _timed(lambda: self.loop_program(self.leaves, state, np.int32(max_cycles)))


class Programs:
    """Compiles what a decoder needs, and keeps it.

    Attributes:
        leaves: the decoder's arrays, as every program takes them.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._split()

    def __len__(self) -> int:
        """Programs compiled so far."""
        return len(self.compiled)

    def _split(self) -> None:
        self._graph, state = nnx.split(self.decoder)
        self.leaves, self._structure = jax.tree.flatten(state)
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def _merge(self, leaves: list[jax.Array]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))

    def generation(
        self, plan: DecodingPlan, batch: Batch, *, on_event: Callable[[str], None] = lambda _: None
    ) -> Generation:
        """The programs for a plan and a batch, compiled now if they are not there yet.

        Raises:
            OutOfMemoryError: the cache does not fit the device.
            UsageError: the kernels asked for by name do not serve this model.
        """
        self.prepare(plan)
        rows, width = batch.tokens.shape
        shape = rows, batch.slots, batch.capacity, jax.tree.structure(batch.sampler)
        prefill_key = ("prefill", plan.verify, plan.stop_tokens, width, *shape)
        loop_key = ("loop", plan, *shape)
        began = time.perf_counter()
        missing = {prefill_key: self.lower_prefill, loop_key: self.lower_loop}
        missing = {key: lower for key, lower in missing.items() if key not in self.compiled}
        if missing:
            on_event("compiling")
            self.check_cache(rows=rows, slots=batch.slots)
        for key, lower in missing.items():
            with explain_out_of_memory("while compiling"):
                try:
                    self.compiled[key] = lower(plan, batch).compile()
                except NotImplementedError as error:  # a kernel asked for by name
                    raise UsageError(f"this model cannot run as asked: {error}") from error
        compile_s = time.perf_counter() - began if missing else 0.0
        return Generation(self.compiled[prefill_key], self.compiled[loop_key], self.leaves, batch, compile_s)

    def prepare(self, plan: DecodingPlan) -> None:
        """Gives the weights the layout and the group sums that the precisions of a plan need, the first time."""
        precisions = [one for one in (plan.verify, plan.draft) if one is not None]
        if lay_out(self.decoder, precisions):
            self._split()
        quantization = next(m.quantization for _, m in nnx.iter_modules(self.decoder) if isinstance(m, Linear))
        for precision in (plan.draft, plan.verify):
            if quantization is None or precision not in (Precision.W4A4, Precision.W4A8):
                continue
            if not activation_quantization(quantization, precision).symmetric and add_group_sums(self.decoder):
                self._split()

    def lower_prefill(self, plan: DecodingPlan, batch: Batch) -> jax.stages.Lowered:
        """Lowers the prefill program of a plan and shape."""
        return jax.jit(self._prefill_function(plan, batch)).lower(self.leaves, *batch.arrays)

    def lower_loop(self, plan: DecodingPlan, batch: Batch) -> jax.stages.Lowered:
        """Lowers the generation loop of a plan and shape; its state is donated."""
        state = jax.eval_shape(self._prefill_function(plan, batch), self.leaves, *batch.arrays)
        return self.lower_repetition(plan, state)

    def lower_repetition(
        self, plan: DecodingPlan, state: DecodeState, *, advance: Callable[..., DecodeState] = speculative.cycle
    ) -> jax.stages.Lowered:
        """Lowers the loop ``(leaves, state, max_cycles) -> state`` for a state like the one given, which is donated.

        ``advance`` is what the loop repeats, see :func:`speculative.generate`.
        """

        def loop(leaves, state, max_cycles):
            return speculative.generate(self._merge(leaves), state, max_cycles, plan=plan, advance=advance)

        return jax.jit(loop, donate_argnums=1, compiler_options=_loop_options(plan)).lower(
            self.leaves, state, np.int32(0)
        )

    def _prefill_function(self, plan: DecodingPlan, batch: Batch) -> Callable[..., DecodeState]:
        def prefill(leaves, tokens, lengths, max_new_tokens, sampler):
            model, shape = self._merge(leaves), {"slots": batch.slots, "capacity": batch.capacity}
            return speculative.prefill(model, tokens, lengths, max_new_tokens, sampler, plan=plan, **shape)

        return prefill

    def check_cache(self, *, rows: int, slots: int) -> None:
        """Raises OutOfMemoryError if a cache for ``rows`` sequences does not fit the device."""
        cache = jax.eval_shape(lambda: self.decoder.create_cache(batch=rows, slots=slots))
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        check_memory(needed, what=f"the caches of {rows} sequences of {slots} tokens")


_COMMAND_BUFFERS = "xla_gpu_enable_command_buffer"


def _loop_options(plan: DecodingPlan) -> dict[str, str] | None:
    """XLA flags of a loop, unless the user has set them.

    An H100 starts the kernels of a plain step faster one by one than as a command buffer, which waits until the loop
    has read whether to go on; a cycle has too many for the host (docs/performance.md).
    """
    if plan.draft is not None or jax.default_backend() != "gpu" or _COMMAND_BUFFERS in os.environ.get("XLA_FLAGS", ""):
        return None
    return {_COMMAND_BUFFERS: ""}


def lay_out(decoder: Decoder, precisions: Sequence[Precision]) -> bool:
    """Lays every 4-bit linear out for kernels that serve the precisions; True if any was not."""
    linears = [module for _, module in nnx.iter_modules(decoder) if isinstance(module, Linear)]
    return sum(linear.lay_out_for(precisions) for linear in linears) > 0


def add_group_sums(decoder: Decoder) -> bool:
    """Gives every 4-bit linear the group sums that its asymmetric draft activations need; True if any was missing."""
    changed = False
    for _, module in nnx.iter_modules(decoder):
        if not isinstance(module, Linear) or module.quantization is None:
            continue
        weight: Any = module.weight.get_value()
        recipes = (module.quantization.w4a4, module.quantization.w4a8)
        sizes = [recipe.group_size or weight.num_inputs for recipe in recipes if not recipe.symmetric]
        if sizes and weight.group_sum is None:
            module.weight.set_value(_with_group_sums(weight, min(sizes)))
            changed = True
    return changed


_with_group_sums = jax.jit(with_group_sums, static_argnums=1)


def _timed(dispatch: Callable[[], DecodeState]) -> tuple[DecodeState, float]:
    began = time.perf_counter()
    with explain_out_of_memory("while generating"):
        state = jax.block_until_ready(dispatch())
    return state, time.perf_counter() - began


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
