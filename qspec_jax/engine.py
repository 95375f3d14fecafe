"""A loaded model that generates text: batching of prompts, compiled programs, results and statistics.

The decoder is split into its graph and its arrays once. A generation is two dispatches, prefill and
loop; streaming runs the same loop program a few cycles at a time. Programs are compiled ahead of the
first call, once per shape, so that compile time is known and never hides in another figure.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from pallas_kernels import with_group_sums
from qspec_jax import speculative
from qspec_jax.config import ModelConfig, QuantConfig
from qspec_jax.errors import UsageError
from qspec_jax.linear import Linear, activation_quantization
from qspec_jax.loading.memory import check_memory, explain_out_of_memory
from qspec_jax.modeling import Decoder
from qspec_jax.results import GenerationResult, GenerationStats
from qspec_jax.speculative import DecodeState, DecodingPlan
from qspec_jax.types import Precision

if TYPE_CHECKING:
    from qspec_jax.tokenizer import Tokenizer

MODES = ("qspec", "w4a16", "w4a8", "w4a4", "float")
DRAFTS = ("auto", "w4a4", "w4a8")

# Prompts and caches are padded to multiples of these, so that nearby lengths share one compilation.
_PROMPT_MULTIPLE = 32
_SLOT_MULTIPLE = 64
_ALL_CYCLES = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Prompts of one call as padded arrays."""

    tokens: np.ndarray  # [B, T] int32, padded on the right
    lengths: np.ndarray  # [B] int32
    max_new_tokens: np.ndarray  # [B] int32
    slots: int
    capacity: int


class LanguageModel:
    """A decoder, its tokenizer and the programs compiled for them. Made by :func:`qspec_jax.load`.

    Attributes:
        decoder: the Flax module; call it for logits.
        tokenizer: text to token ids and back.
        quantization: None if the weights are floating point.
        kernels: the implementation its matmuls run on.
        name: where it was loaded from.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        *,
        quantization: QuantConfig | None,
        kernels: str,
        name: str = "model",
        stop_tokens: Sequence[int] = (),
    ):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.quantization = quantization
        self.kernels = kernels
        self.name = name
        known = tokenizer.eos_token_ids if tokenizer is not None else ()
        self.stop_tokens = tuple(sorted({*decoder.config.eos_token_ids, *known, *stop_tokens}))
        self._split_decoder()

    def _split_decoder(self) -> None:
        graph, state = nnx.split(self.decoder)
        self._leaves, structure = jax.tree.flatten(state)
        self._merge = functools.partial(_merge, graph, structure)
        self._programs: dict[Any, Any] = {}

    @property
    def config(self) -> ModelConfig:
        """Shape and options of the decoder."""
        return self.decoder.config

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in self._leaves)

    def plan(self, mode: str = "qspec", *, draft: str = "auto", draft_length: int = 3) -> DecodingPlan:
        """The precisions of a mode.

        Raises:
            UsageError: an unknown mode or draft, a draft length below 1, or a 4-bit mode of a float model.
        """
        if mode not in MODES:
            raise UsageError(f"mode={mode!r} is unknown; use one of {', '.join(MODES)}")
        if draft not in DRAFTS:
            raise UsageError(f"draft={draft!r} is unknown; use one of {', '.join(DRAFTS)}")
        if mode != "float" and self.quantization is None:
            raise UsageError(
                f"mode={mode!r} needs 4-bit weights; load the model with a QuantConfig, or use mode='float'"
            )
        if mode != "qspec":
            return DecodingPlan(verify=Precision(mode), stop_tokens=self.stop_tokens)
        if not 1 <= draft_length <= 16:
            raise UsageError(f"draft_length={draft_length} must be between 1 and 16")
        draft_precision = default_draft_precision() if draft == "auto" else Precision(draft)
        return DecodingPlan(Precision.W4A16, draft_precision, draft_length, self.stop_tokens)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        mode: str = "qspec",
        draft: str = "auto",
        draft_length: int = 3,
        max_new_tokens: int = 128,
        chat: bool | None = None,
        max_seq_len: int | None = None,
        batch_size: int = 8,
        on_event: Callable[[str], None] | None = None,
    ) -> list[GenerationResult]:
        """Generates greedily for every prompt, ``batch_size`` prompts at a time.

        Args:
            prompts: texts, or lists of token ids.
            mode: ``qspec``, or plain decoding at a precision.
            draft: precision of the drafts: ``w4a4``, ``w4a8``, or ``auto`` for the faster one here.
            draft_length: drafts per cycle.
            max_new_tokens: limit per prompt; generation also ends at a stop token, which is included.
            chat: put each text into the model's chat template; None does so if there is one.
            max_seq_len: cache positions per sequence; None makes it fit.
            batch_size: prompts that run together.
            on_event: called with a few words when a long step (compiling) begins.

        Returns:
            one result per prompt, in order.

        Raises:
            UsageError: an argument makes no sense, or a prompt does not fit.
            OutOfMemoryError: the cache does not fit the device.
        """
        plan = self.plan(mode, draft=draft, draft_length=draft_length)
        texts, token_ids = self.encode_prompts(prompts, chat=chat)
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size} must be at least 1")
        batches = [
            _Request(texts[i : i + batch_size], token_ids[i : i + batch_size]) for i in range(0, len(texts), batch_size)
        ]
        for request in batches:
            self._make_batch(request.token_ids, max_new_tokens, max_seq_len)
        results = []
        for request in batches:
            results += self._run(request, plan, max_new_tokens, max_seq_len, on_event or _ignore)
        return results

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        mode: str = "qspec",
        draft: str = "auto",
        draft_length: int = 3,
        max_new_tokens: int = 128,
        chat: bool | None = None,
        max_seq_len: int | None = None,
        cycles_per_step: int = 1,
        on_event: Callable[[str], None] | None = None,
    ) -> Iterator[str | GenerationResult]:
        """Generates for one prompt and yields pieces of text as they come, then the result.

        Arguments and errors are those of :meth:`generate`; ``cycles_per_step`` cycles run between two
        pieces. A piece never ends inside a character.
        """
        plan = self.plan(mode, draft=draft, draft_length=draft_length)
        texts, token_ids = self.encode_prompts([prompt], chat=chat)
        if cycles_per_step < 1:
            raise UsageError(f"cycles_per_step={cycles_per_step} must be at least 1")
        batch = self._make_batch(token_ids, max_new_tokens, max_seq_len)
        return self._stream(_Request(texts, token_ids), batch, plan, cycles_per_step, on_event or _ignore)

    def _stream(
        self,
        request: _Request,
        batch: _Batch,
        plan: DecodingPlan,
        cycles_per_step: int,
        on_event: Callable[[str], None],
    ) -> Iterator[str | GenerationResult]:
        prefill, loop, compile_s = self._compile(plan, batch, on_event)
        decoder = self._require_tokenizer().stream_decoder()
        state, prefill_s = self._timed_prefill(prefill, batch)
        decode_s, shown, finished = 0.0, 0, False
        while not finished:
            tokens, count = np.asarray(state.tokens[0]), int(state.num_tokens[0])
            if piece := decoder.push(tokens[shown:count].tolist()):
                yield piece
            shown, finished = count, bool(state.finished[0])
            if not finished:
                began = time.perf_counter()
                state = jax.block_until_ready(loop(self._leaves, state, np.int32(cycles_per_step)))
                decode_s += time.perf_counter() - began
        if piece := decoder.finish():
            yield piece
        timing = _Timing(compile_s, prefill_s, decode_s)
        yield self._collect(request, state, plan, timing)[0]

    def encode_prompts(
        self, prompts: str | Sequence[str | Sequence[int]], *, chat: bool | None = None
    ) -> tuple[list[str | None], list[list[int]]]:
        """Texts (None for a prompt given as ids) and token ids of prompts.

        Raises:
            UsageError: there is no prompt, one is empty, or it needs a tokenizer or template that is missing.
        """
        given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if not given:
            raise UsageError("there is no prompt; give at least one")
        texts: list[str | None] = []
        token_ids: list[list[int]] = []
        for index, prompt in enumerate(given):
            text = prompt if isinstance(prompt, str) else None
            ids = self._encode(text, chat) if text is not None else [int(token) for token in prompt]
            if not ids or (text is not None and not text.strip()):
                raise UsageError(f"prompt {index + 1} is empty; give it some text")
            if min(ids) < 0 or max(ids) >= self.config.vocab_size:
                raise UsageError(f"prompt {index + 1} has a token id outside 0..{self.config.vocab_size - 1}")
            texts.append(text)
            token_ids.append(ids)
        return texts, token_ids

    def _encode(self, text: str, chat: bool | None) -> list[int]:
        tokenizer = self._require_tokenizer()
        if chat and not tokenizer.has_chat_template:
            raise UsageError(f"{self.name} has no chat template; use chat=False (--no-chat)")
        if chat or (chat is None and tokenizer.has_chat_template):
            return tokenizer.apply_chat([{"role": "user", "content": text}])
        return tokenizer.encode(text)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(f"{self.name} was made without a tokenizer; give prompts as token ids")
        return self.tokenizer

    def _make_batch(self, token_ids: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int | None) -> _Batch:
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens} must be at least 1")
        longest = max(len(ids) for ids in token_ids)
        limit = self.config.max_position_embeddings
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise UsageError(f"max_seq_len={max_seq_len} must be between 1 and the model's context of {limit}")
        if longest + max_new_tokens > (max_seq_len or limit):
            what = f"max_seq_len={max_seq_len}" if max_seq_len else f"the model's context of {limit}"
            raise UsageError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit {what}; "
                f"shorten the prompt, lower max_new_tokens" + (" or raise max_seq_len" if max_seq_len else "")
            )
        width = _round_up(longest, _PROMPT_MULTIPLE)
        slots = max_seq_len or _round_up(longest + max_new_tokens, _SLOT_MULTIPLE)
        tokens = np.zeros((len(token_ids), width), np.int32)
        for row, ids in zip(tokens, token_ids, strict=True):
            row[: len(ids)] = ids
        lengths = np.array([len(ids) for ids in token_ids], np.int32)
        capacity = _round_up(max_new_tokens, _SLOT_MULTIPLE)
        return _Batch(tokens, lengths, np.full_like(lengths, max_new_tokens), slots, capacity)

    def _run(
        self,
        request: _Request,
        plan: DecodingPlan,
        max_new_tokens: int,
        max_seq_len: int | None,
        on_event: Callable[[str], None],
    ) -> list[GenerationResult]:
        batch = self._make_batch(request.token_ids, max_new_tokens, max_seq_len)
        prefill, loop, compile_s = self._compile(plan, batch, on_event)
        state, prefill_s = self._timed_prefill(prefill, batch)
        began = time.perf_counter()
        state = jax.block_until_ready(loop(self._leaves, state, np.int32(_ALL_CYCLES)))
        timing = _Timing(compile_s, prefill_s, time.perf_counter() - began)
        return self._collect(request, state, plan, timing)

    def _timed_prefill(self, prefill: Any, batch: _Batch) -> tuple[DecodeState, float]:
        began = time.perf_counter()
        state = prefill(self._leaves, batch.tokens, batch.lengths, batch.max_new_tokens)
        return jax.block_until_ready(state), time.perf_counter() - began

    def _compile(self, plan: DecodingPlan, batch: _Batch, on_event: Callable[[str], None]) -> tuple[Any, Any, float]:
        """The prefill and loop programs of a plan and shape, and the seconds spent compiling now."""
        self._prepare_weights(plan)
        rows, width = batch.tokens.shape
        prefill_key = ("prefill", plan.verify, plan.stop_tokens, rows, width, batch.slots, batch.capacity)
        loop_key = ("loop", plan, rows, batch.slots, batch.capacity)
        began = time.perf_counter()
        if loop_key in self._programs and prefill_key in self._programs:
            return self._programs[prefill_key], self._programs[loop_key], 0.0
        on_event("compiling")
        cache = jax.eval_shape(lambda: self.decoder.create_cache(batch=rows, slots=batch.slots))
        cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        check_memory(cache_bytes, what=f"the cache of {rows} sequences of {batch.slots} tokens")
        with explain_out_of_memory("while compiling"):
            if prefill_key not in self._programs:
                self._programs[prefill_key] = self.lower_prefill(plan, batch).compile()
            if loop_key not in self._programs:
                self._programs[loop_key] = self.lower_loop(plan, batch).compile()
        return self._programs[prefill_key], self._programs[loop_key], time.perf_counter() - began

    def _prefill_function(self, plan: DecodingPlan, batch: _Batch) -> Callable[..., DecodeState]:
        def prefill(leaves, tokens, lengths, max_new_tokens):
            return speculative.prefill(
                self._merge(leaves),
                tokens,
                lengths,
                max_new_tokens,
                plan=plan,
                slots=batch.slots,
                capacity=batch.capacity,
            )

        return prefill

    def lower_prefill(self, plan: DecodingPlan, batch: _Batch) -> jax.stages.Lowered:
        """Lowers the prefill program of a plan and shape."""
        arguments = (self._leaves, batch.tokens, batch.lengths, batch.max_new_tokens)
        return jax.jit(self._prefill_function(plan, batch)).lower(*arguments)

    def lower_loop(self, plan: DecodingPlan, batch: _Batch) -> jax.stages.Lowered:
        """Lowers the generation loop of a plan and shape; its state is donated."""

        def loop(leaves, state, max_cycles):
            return speculative.generate(self._merge(leaves), state, max_cycles, plan=plan)

        state = jax.eval_shape(
            self._prefill_function(plan, batch), self._leaves, batch.tokens, batch.lengths, batch.max_new_tokens
        )
        return jax.jit(loop, donate_argnums=1).lower(self._leaves, state, np.int32(0))

    def _prepare_weights(self, plan: DecodingPlan) -> None:
        """Adds the group sums that asymmetric draft activations need, the first time they are used."""
        assert self.quantization is not None or plan.verify is Precision.FLOAT
        for precision in (plan.draft, plan.verify):
            if precision not in (Precision.W4A4, Precision.W4A8):
                continue
            assert self.quantization is not None
            if not activation_quantization(self.quantization, precision).symmetric and add_group_sums(self.decoder):
                self._split_decoder()

    def _collect(
        self, request: _Request, state: DecodeState, plan: DecodingPlan, timing: _Timing
    ) -> list[GenerationResult]:
        tokens = np.asarray(state.tokens)
        counts, cycles, drafted, accepted = (
            np.asarray(a).tolist() for a in (state.num_tokens, state.cycles, state.drafted, state.accepted)
        )
        device = jax.devices()[0]
        results = []
        for row, (text, prompt_ids) in enumerate(zip(request.texts, request.token_ids, strict=True)):
            token_ids = tokens[row, : counts[row]].tolist()
            stats = GenerationStats(
                mode="qspec" if plan.draft else plan.verify.value,
                draft=plan.draft.value if plan.draft else None,
                draft_length=plan.draft_length,
                cycles=cycles[row],
                drafted=drafted[row],
                accepted=accepted[row],
                num_tokens=counts[row],
                prefill_s=timing.prefill_s,
                decode_s=timing.decode_s,
                compile_s=timing.compile_s,
                device=device.device_kind,
                kernels=self.kernels,
            )
            results.append(
                GenerationResult(
                    prompt=text,
                    prompt_token_ids=list(prompt_ids),
                    text=self.tokenizer.decode(token_ids) if self.tokenizer else "",
                    token_ids=token_ids,
                    finish_reason="stop" if token_ids[-1] in plan.stop_tokens else "length",
                    stats=stats,
                )
            )
        return results


@dataclasses.dataclass(frozen=True)
class _Request:
    texts: list[str | None]
    token_ids: list[list[int]]


@dataclasses.dataclass(frozen=True)
class _Timing:
    compile_s: float
    prefill_s: float
    decode_s: float


def default_draft_precision() -> Precision:
    """W4A8 where int4 has no faster arithmetic than int8, W4A4 where it has: NVIDIA Turing to Ada."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if capability is not None and "." in str(capability):
        major, minor = (int(part) for part in str(capability).split("."))
        if (7, 5) <= (major, minor) < (9, 0):
            return Precision.W4A4
    return Precision.W4A8


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


def _merge(graph: Any, structure: Any, leaves: list[jax.Array]) -> Decoder:
    return nnx.merge(graph, jax.tree.unflatten(structure, leaves))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _ignore(_: str) -> None:
    pass
