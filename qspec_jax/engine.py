"""A loaded model that generates text: prompts in, results out, all at once or piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qspec_jax.config import ModelConfig, QuantConfig
from qspec_jax.errors import UsageError
from qspec_jax.modeling import Decoder
from qspec_jax.programs import Batch, Programs, fitting_slots
from qspec_jax.results import GenerationResult, GenerationStats
from qspec_jax.sampling import SamplingParams
from qspec_jax.speculative import MAX_DRAFT_LENGTH, DecodeState, DecodingPlan
from qspec_jax.types import Precision

if TYPE_CHECKING:
    from qspec_jax.tokenizer import Tokenizer

MODES = ("qspec", "w4a16", "w4a8", "w4a4", "float")
DRAFTS = ("auto", "w4a4", "w4a8")


class LanguageModel:
    """A decoder, its tokenizer and its compiled programs. Made by :func:`qspec_jax.load`.

    A generation is two dispatches, prefill and loop; streaming runs the same loop a few cycles at a time.

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
        self.programs = Programs(decoder)

    @property
    def config(self) -> ModelConfig:
        """Shape and options of the decoder."""
        return self.decoder.config

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in self.programs.leaves)

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
        if not 1 <= draft_length <= MAX_DRAFT_LENGTH:
            raise UsageError(f"draft_length={draft_length} must be between 1 and {MAX_DRAFT_LENGTH}")
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
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> list[GenerationResult]:
        """Generates for every prompt, ``batch_size`` prompts at a time.

        Args:
            prompts: texts, or lists of token ids.
            mode: ``qspec``, or plain decoding at a precision.
            draft: precision of the drafts: ``w4a4``, ``w4a8``, or ``auto`` for the faster one here.
            draft_length: drafts per cycle.
            max_new_tokens: limit per prompt; generation also ends at a stop token, which is included.
            chat: put each text into the model's chat template; None does so if there is one.
            max_seq_len: cache positions per sequence; None makes it fit.
            batch_size: prompts that run together.
            sampling: how tokens are drawn, of all prompts, whose seeds then count up from the one given, or of each;
                None chooses the most likely ones. What a prompt yields depends on its own parameters alone.
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
        params = _sampling_of_each(sampling, len(token_ids))
        slots = self._cache_slots(max(map(len, token_ids)), max_new_tokens, max_seq_len)
        results = []
        for start in range(0, len(token_ids), batch_size):
            request = _Request(texts[start : start + batch_size], token_ids[start : start + batch_size])
            rows = min(batch_size, len(token_ids))
            of_batch = params[start : start + batch_size]
            batch = Batch.create(request.token_ids, max_new_tokens, slots=slots, rows=rows, sampling=of_batch)
            generation = self.programs.generation(plan, batch, on_event=on_event or _ignore)
            state, prefill_s = generation.prefill()
            state, decode_s = generation.run(state)
            results += self._collect(request, state, plan, _Timing(generation.compile_s, prefill_s, decode_s))
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
        sampling: SamplingParams | None = None,
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
        slots = self._cache_slots(len(token_ids[0]), max_new_tokens, max_seq_len)
        params = _sampling_of_each(sampling, 1)
        batch = Batch.create(token_ids, max_new_tokens, slots=slots, rows=1, sampling=params)
        return self._stream(_Request(texts, token_ids), batch, plan, cycles_per_step, on_event or _ignore)

    def _stream(
        self,
        request: _Request,
        batch: Batch,
        plan: DecodingPlan,
        cycles_per_step: int,
        on_event: Callable[[str], None],
    ) -> Iterator[str | GenerationResult]:
        generation = self.programs.generation(plan, batch, on_event=on_event)
        decoder = self._require_tokenizer().stream_decoder()
        state, prefill_s = generation.prefill()
        decode_s, shown, finished = 0.0, 0, False
        while not finished:
            tokens, count = np.asarray(state.tokens[0]), int(state.num_tokens[0])
            if piece := decoder.push(tokens[shown:count].tolist()):
                yield piece
            shown, finished = count, bool(state.finished[0])
            if not finished:
                state, seconds = generation.run(state, cycles_per_step)
                decode_s += seconds
        if piece := decoder.finish():
            yield piece
        timing = _Timing(generation.compile_s, prefill_s, decode_s)
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

    def _cache_slots(self, longest_prompt: int, max_new_tokens: int, max_seq_len: int | None) -> int:
        """Cache positions per sequence, the same for all batches of a call so that they share one loop program."""
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens} must be at least 1")
        limit = self.config.max_position_embeddings
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise UsageError(f"max_seq_len={max_seq_len} must be between 1 and the model's context of {limit}")
        if longest_prompt + max_new_tokens > (max_seq_len or limit):
            what = f"max_seq_len={max_seq_len}" if max_seq_len else f"the model's context of {limit}"
            raise UsageError(
                f"a prompt of {longest_prompt} tokens and max_new_tokens={max_new_tokens} do not fit {what}; "
                f"shorten the prompt, lower max_new_tokens" + (" or raise max_seq_len" if max_seq_len else "")
            )
        return max_seq_len or fitting_slots(longest_prompt + max_new_tokens)

    def _collect(
        self, request: _Request, state: DecodeState, plan: DecodingPlan, timing: _Timing
    ) -> list[GenerationResult]:
        tokens = np.asarray(state.tokens)
        counts, accepted_lengths = np.asarray(state.num_tokens).tolist(), np.asarray(state.accepted_lengths).tolist()
        device = jax.devices()[0]
        results = []
        for row, (text, prompt_ids) in enumerate(zip(request.texts, request.token_ids, strict=True)):
            token_ids = tokens[row, : counts[row]].tolist()
            stats = GenerationStats(
                mode="qspec" if plan.draft else plan.verify.value,
                draft=plan.draft.value if plan.draft else None,
                draft_length=plan.draft_length,
                accepted_lengths=tuple(accepted_lengths[row][: plan.draft_length + 1]),
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


def _sampling_of_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """The parameters of each prompt; those given for all have their seed counted up."""
    given = SamplingParams() if sampling is None else sampling
    if isinstance(given, SamplingParams):
        return [dataclasses.replace(given, seed=(given.seed + row) % 2**32) for row in range(num_prompts)]
    if len(given) != num_prompts:
        raise UsageError(f"there are {len(given)} sampling parameters for {num_prompts} prompts; give one for each")
    return list(given)


def _ignore(_: str) -> None:
    pass
