"""A loaded model that generates text: prompts in, results out, all at once or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from qspec_jax.decoding.chunks import fitting_capacity
from qspec_jax.decoding.costs import PassBytes
from qspec_jax.decoding.following import programs_of
from qspec_jax.decoding.plan import AUTO, AutoPlan, DecodingPlan, Plan, check_verify, missing_drafts, plan_of, static
from qspec_jax.decoding.sampling_params import SamplingParams, sampling_of_each
from qspec_jax.decoding.values import MAX_COUNT, at_least_1, between, shown, truth
from qspec_jax.device.mesh import shape_of
from qspec_jax.device.sizes import size_text
from qspec_jax.engine.answer import Answer
from qspec_jax.engine.intake import Intake, check_length, require_some
from qspec_jax.engine.outcome import result_of, statistics
from qspec_jax.engine.pipeline import Pipeline
from qspec_jax.engine.prompts import Prompt, prompts_of
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import GenerationResult
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.engine.service import Service
from qspec_jax.engine.session import Session, pieces, watched
from qspec_jax.engine.uncopied import Uncopied
from qspec_jax.errors import UsageError
from qspec_jax.model.cache import restart_multiple
from qspec_jax.model.config import ModelConfig, QuantConfig, held_weights
from qspec_jax.model.decoder import Decoder, num_bytes
from qspec_jax.model.grid import formats_in, with_grid_of

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer

_PIPELINE_CAPACITY = 4096  # cache positions of a pipeline that is not told how many


class LanguageModel(Uncopied):
    """A decoder, its tokenizer and its compiled programs. Made by :func:`qspec_jax.load`.

    Everything that generates runs the same loop over the same kind of batch (``engine.scheduler``): a list of
    prompts, a pipeline, and a stream, which is a batch of one a few cycles at a time.

    Several threads may generate with one model, each with any plan. Weights that a plan needs in another order are
    rewritten at its first use, and programs of other plans compiled again: run each plan once before threads start.

    Attributes:
        decoder: the Flax module; call it for logits.
        tokenizer: text to token ids and back.
        quantization: None if the weights are floating point; else its grid is theirs, whatever was given.
        kernels: the implementation its matmuls run on.
        verify: what it was loaded for, of :data:`~qspec_jax.decoding.plan.VERIFY`: the target of all that drafts and is
            not told another. ``auto`` is the best that its weights serve.
        name: where it was loaded from.
        recipe: what the checkpoint that it was loaded from records of how its weights were made; None of all else.
        mesh: the devices that share it; None for one.
    """

    _instead = "qspec_jax.save(model, path) keeps it, and qspec_jax.load(path) makes it where it is needed"

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        *,
        quantization: QuantConfig | None,
        kernels: str,
        verify: str = AUTO,
        name: str = "model",
        stop_tokens: Sequence[int] = (),
        recipe: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
    ):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.quantization = quantization and with_grid_of(quantization, formats_in(decoder), decoder.config)
        self.kernels = kernels
        self.verify = check_verify(verify, "qspec")
        self.name = name
        self.recipe = recipe
        known = tokenizer.eos_token_ids if tokenizer is not None else ()
        self.stop_tokens = tuple(sorted({*decoder.config.eos_token_ids, *known, *stop_tokens}))
        self.programs = programs_of(decoder, mesh)

    def __repr__(self) -> str:
        held, names = held_weights(self.quantization), {4: "4-bit", 8: "nested 8-bit", None: "floating-point"}
        kinds = " and ".join(names[bits] for bits in held if not (bits == 4 and 8 in held))
        weights = f"{size_text(num_bytes(self.decoder))} of {kinds}"
        where = "" if self.mesh is None else f" on {shape_of(self.mesh)}"
        return f"LanguageModel({self.name}: {self.decoder!r}, {weights} weights, {self.kernels} kernels{where})"

    @property
    def config(self) -> ModelConfig:
        """Shape and options of the decoder."""
        return self.decoder.config

    @property
    def draft_head(self) -> int | None:
        """Bits of an LM head for drafts alone; None where they read the one that verifies."""
        return None if self.quantization is None else self.quantization.draft_head

    @property
    def mesh(self) -> Mesh | None:
        """See the class."""
        return self.programs.mesh

    @property
    def intake(self) -> Intake:
        """What checks and tokenises requests."""
        return Intake(self.config, self.tokenizer, self.stop_tokens, self.name, restart_multiple(self.decoder.kv))

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return self.programs.num_compilations

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in self.programs.leaves)

    def plan(
        self,
        mode: str | Any = "qspec",
        *,
        draft: str | Any = "auto",
        draft_length: int | str | Any = 3,
        draft_context: str | int | Any = "auto",
        verify: str | Any = "auto",
    ) -> Plan:
        """What a mode does in each cycle; see :func:`qspec_jax.decoding.plan.plan_of`.

        With ``verify="auto"``, modes that draft are verified with what the model was loaded for (:attr:`verify`).

        Raises:
            UsageError: an unknown mode, draft or target, a draft length below 1, a draft context that is too small, or
                weights that the model does not hold.
        """
        options: dict[str, Any] = {"draft": draft, "draft_length": draft_length, "draft_context": draft_context}
        weights: dict[str, Any] = {"held": held_weights(self.quantization), "draft_head": self.draft_head}
        weights |= {"rounds_in_vain": self.programs.rounds_in_vain}
        return plan_of(mode, **options, verify=verify, usual=self.verify, **weights)

    def decoder_for(self, plan: Plan | Any) -> Decoder:
        """The decoder with its weights as a plan's kernels read them, for a program of your own.

        Weights that another plan needs in another order are rewritten: take the decoder after the last of its plans.

        Raises:
            UsageError: the plan is none of this model.
        """
        plan = self._check_plan(plan)
        for one in plan.choices if isinstance(plan, AutoPlan) else (plan,):
            self.programs.lay_out_weights(one)
        return self.decoder

    def cycle_bytes(self, plan: DecodingPlan | Any, *, rows: int | Any = 1, context: int | Any) -> int:
        """Bytes that a cycle of a plan reads: weights, keys and values, in its drafts and its verification.

        On a mesh they are those that a device reads.

        Args:
            plan: with no choice in it.
            rows: sequences that run together.
            context: tokens of each.

        Raises:
            UsageError: an argument makes no sense.
        """
        plan = static(self._check_plan(plan))
        sizes = {"rows": at_least_1("rows", rows), "context": at_least_1("context", context)}
        return PassBytes.of(self.decoder).of_cycle(plan, **sizes)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        mode: str | Any = "qspec",
        draft: str | Any = "auto",
        draft_length: int | str | Any = 3,
        draft_context: str | int | Any = "auto",
        verify: str | Any = "auto",
        max_new_tokens: int | Any = 128,
        chat: bool | Any = None,
        max_seq_len: int | Any = None,
        batch_size: int | Any = 8,
        sampling: SamplingParams | Mapping[str, Any] | Sequence[Any] | Any = None,
        num_samples: int | Any = 1,
        keep_drafts: bool | Any = False,
        on_event: Callable[[str], None] | None = None,
        progress: bool = False,
    ) -> list[GenerationResult]:
        """Generates for every prompt: ``batch_size`` run together, and as one is finished the next one enters.

        Args:
            prompts: texts, token ids (lists or arrays of NumPy or JAX), or conversations (lists of
                ``{"role": ..., "content": ...}``). One of these alone is one prompt, a list of them are several.
            mode: ``qspec``, plain decoding at a precision, ``lookup`` (drafts are what followed the newest tokens
                earlier in the text), ``lookup-qspec`` (QSpec's drafts where there is no such thing), or ``auto``: the
                fastest of plain decoding, lookup and QSpec, as measured on the way.
            draft: precision of the drafts: ``w4a4``, ``w4a8``, ``w4a16`` (which gains by what it does not read: of the
                cache, or of the weights that verify), or ``auto`` for the one that is fastest here.
            draft_length: drafts per cycle; with QSpec also ``auto``, for the fastest, none included.
            draft_context: tokens of the cache that each draft reads: ``full`` for all, ``auto`` for the 512 that
                matter of texts from 1,024 on (on a GPU, and of ``w4a16`` drafts), or a number of them. Tokens do not
                depend on it.
            verify: what drafts are verified with, and so what tokens are those of: ``w4a16``, ``w8a16`` for 8-bit
                weights, ``float`` for the floats of a model that :func:`qspec_jax.load` loaded with
                ``verify="float"``, or ``auto`` for what :func:`qspec_jax.load` was asked for.
            max_new_tokens: limit per prompt; generation also ends at a stop token, which is included.
            chat: put each text into the model's chat template; None does so if there is one.
            max_seq_len: cache positions per sequence; None makes it fit.
            batch_size: prompts that run together.
            sampling: how tokens are drawn, of all prompts, whose seeds then count up from the one given, or of each:
                parameters, or mappings of some. None chooses the most likely tokens. What a prompt yields depends on
                its own parameters alone.
            num_samples: results for every prompt, one after the other, each with the next seed.
            keep_drafts: keep what was drafted, for :meth:`GenerationResult.show`. Tokens do not depend on it.
            on_event: called with a few words when a long step (compiling) begins.
            progress: show finished prompts, tokens/s and tokens per cycle on the standard error stream.

        Returns:
            one result per prompt (and sample), in order. Where a prompt cannot be served its result has the ``error``,
            and the others are served all the same.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C. A :meth:`pipeline` keeps what there is of the texts
                (:meth:`Pipeline.interrupt`).
            UsageError: an argument makes no sense, or none of the prompts can be served.
            OutOfMemoryError: the cache does not fit the device.
        """
        drafting: dict[str, Any] = {"draft": draft, "draft_length": draft_length, "draft_context": draft_context}
        plan = self.plan(mode, **drafting, verify=verify)
        given = prompts_of(prompts)
        num_samples = _count("num_samples", num_samples)
        params = sampling_of_each(sampling, len(given), num_samples)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "chat": chat, "max_seq_len": max_seq_len}
        requests = [
            self.attempt(given[index], plan, what=f"prompt {index + 1}", sampling=one, seeds_later=later, **options)
            for place, (one, later) in enumerate(params)
            for index in [place // num_samples]
        ]
        require_some(requests)
        of_run: dict[str, Any] = {"batch_size": batch_size, "max_seq_len": max_seq_len, "keep_drafts": keep_drafts}
        pipeline = self.run(requests, plan, on_event=on_event, **of_run)
        return pipeline.collect(progress=progress)

    def run(
        self,
        requests: Sequence[Request | GenerationResult | Any],
        plan: Plan | Any,
        *,
        first: int = 0,
        batch_size: int | Any = 8,
        max_seq_len: int | Any = None,
        keep_drafts: bool | Any = False,
        on_event: Callable[[str], None] | None = None,
    ) -> Pipeline:
        """A pipeline with the requests of :meth:`attempt` from ``first`` on in it, and room for the longest of all.

        Raises:
            UsageError: the plan is none of this model, or something else is no request.
        """
        self._check_plan(plan)
        if odd := [one for one in requests if not isinstance(one, Request | GenerationResult)]:
            raise UsageError(f"requests has {shown(odd[0])}; use what LanguageModel.attempt returns")
        served = [request for request in requests if isinstance(request, Request)]
        longest = max((len(one.token_ids) + one.max_new_tokens for one in served), default=1)
        batch_size = _count("batch_size", batch_size)
        rows, capacity = min(batch_size, max(1, len(served))), _capacity(max_seq_len, fitting_capacity(longest))
        kept = _keep_drafts(keep_drafts)
        pipeline = self._pipeline(plan, batch_size=rows, capacity=capacity, keep_drafts=kept, on_event=on_event)
        for request in requests[first:]:
            pipeline.add(request)
        return pipeline

    def pipeline(
        self,
        plan: Plan | Any = None,
        *,
        batch_size: int | Any = 8,
        max_seq_len: int | Any = None,
        keep_drafts: bool | Any = False,
        on_event: Callable[[str], None] | None = None,
    ) -> Pipeline:
        """A batch that requests enter one by one, and leave when they are finished.

        Args:
            plan: of :meth:`plan`; None for its defaults, verified with what the model was loaded for.
            batch_size: requests that run together.
            max_seq_len: cache positions of each, prompt and new tokens together; None for the model's context, up
                to 4096.
            keep_drafts: as in :meth:`generate`.
            on_event: called with a few words when a long step (compiling) begins.

        Raises:
            UsageError: an argument makes no sense.
        """
        plan, capacity = self._checked(plan, max_seq_len)
        kept = _keep_drafts(keep_drafts)
        return self._pipeline(plan, batch_size=batch_size, capacity=capacity, keep_drafts=kept, on_event=on_event)

    def session(
        self,
        plan: Plan | Any = None,
        *,
        max_seq_len: int | Any = None,
        on_event: Callable[[str], None] | None = None,
    ) -> Session:
        """A conversation, turn by turn, of which nothing is read twice; arguments and errors as of :meth:`pipeline`."""
        plan, capacity = self._checked(plan, max_seq_len)
        _in_cache(plan, capacity, on_event)  # the largest that there will be
        options: dict[str, Any] = {"kernels": self.kernels, "capacity": capacity, "on_event": on_event}
        return Session(self.intake, self.programs, plan, **options)

    def service(
        self,
        plan: Plan | Any = None,
        *,
        batch_size: int | Any = 8,
        max_seq_len: int | Any = None,
        on_event: Callable[[str], None] | None = None,
        on_end: Callable[[Answer], None] | None = None,
    ) -> Service:
        """A batch with a thread that runs it: each request is answered piece by piece, and may be cancelled.

        Arguments and errors are those of :meth:`pipeline`. ``on_end`` is called by the thread with each answer that is
        done.
        """
        plan, capacity = self._checked(plan, max_seq_len)
        return Service(
            self.intake,
            self.programs,
            _in_cache(plan, capacity, on_event),
            kernels=self.kernels,
            batch_size=_count("batch_size", batch_size),
            capacity=capacity,
            on_event=on_event,
            on_end=on_end,
        )

    def _checked(self, plan: Any, max_seq_len: Any) -> tuple[Plan, int]:
        """The plan and the capacity of a batch whose requests are not known yet."""
        context = self.config.max_position_embeddings
        check_length(1, 0, max_seq_len=max_seq_len, context=context)
        capacity = _capacity(max_seq_len, min(context, _PIPELINE_CAPACITY))
        return self._check_plan(self.plan() if plan is None else plan), capacity

    def _pipeline(
        self,
        plan: Plan,
        *,
        batch_size: int,
        capacity: int,
        keep_drafts: bool,
        on_event: Callable[[str], None] | None,
    ) -> Pipeline:
        return Pipeline(
            self.intake,
            self.programs,
            _in_cache(plan, capacity, on_event),
            kernels=self.kernels,
            batch_size=_count("batch_size", batch_size),
            capacity=capacity,
            on_event=on_event,
            keep_drafts=keep_drafts,
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        mode: str | Any = "qspec",
        draft: str | Any = "auto",
        draft_length: int | str | Any = 3,
        draft_context: str | int | Any = "auto",
        verify: str | Any = "auto",
        max_new_tokens: int | Any = 128,
        chat: bool | Any = None,
        max_seq_len: int | Any = None,
        sampling: SamplingParams | Mapping[str, Any] | Any = None,
        cycles_per_step: int | Any = 1,
        keep_drafts: bool | Any = False,
        on_event: Callable[[str], None] | None = None,
    ) -> Iterator[str | GenerationResult]:
        """Generates for one prompt and yields pieces of text as they come, then the result.

        Arguments and errors are those of :meth:`generate`; ``cycles_per_step`` cycles run between two pieces, or
        :func:`qspec_jax.decoding.loop_settings.cycles_per_check` if that is more. No piece ends inside a character.
        """
        drafting: dict[str, Any] = {"draft": draft, "draft_length": draft_length, "draft_context": draft_context}
        plan = self.plan(mode, **drafting, verify=verify)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "chat": chat, "max_seq_len": max_seq_len}
        request = self.intake.request(prompt, what="prompt 1", sampling=sampling, **options)
        cycles_per_step = at_least_1("cycles_per_step", cycles_per_step)
        fitting = fitting_capacity(len(request.token_ids) + request.max_new_tokens)
        capacity = _capacity(max_seq_len, fitting)
        plan = _in_cache(plan, capacity, on_event)
        batch: dict[str, Any] = {"rows": 1, "capacity": capacity, "keep_drafts": _keep_drafts(keep_drafts)}
        scheduler = Scheduler(self.programs, plan, on_event=on_event, **batch)
        return self._stream(request, plan, scheduler, cycles_per_step)

    def _stream(
        self, request: Request, plan: Plan, scheduler: Scheduler, cycles_per_step: int
    ) -> Iterator[str | GenerationResult]:
        sequence = scheduler.add(watched(request, self.intake))
        yield from filter(None, pieces(scheduler, sequence, cycles_per_step))
        yield result_of(sequence, plan, scheduler.totals, tokenizer=self.tokenizer, kernels=self.kernels)

    def _check_plan(self, plan: Any) -> Plan:
        """A plan that this model can run.

        Raises:
            UsageError: it is none.
        """
        checked = _plan(plan)
        choices = checked.choices if isinstance(checked, AutoPlan) else (checked,)
        views = [view for one in choices for view in one.views]
        packed = [view.name for view in views if view.weight_bits is not None]
        if packed and self.quantization is None:
            raise UsageError(f"{packed[0]} needs 4-bit weights; load the model with a QuantConfig, or use mode='float'")
        for view in views:
            self.decoder.check_view(view)
        return checked

    def attempt(self, prompt: Prompt, plan: Plan | Any, **options: Any) -> Request | GenerationResult:
        """As :meth:`Intake.request`, but an error becomes the result of the request.

        Raises:
            UsageError: the plan is none.
        """
        return self.intake.attempt(prompt, statistics(_plan(plan), kernels=self.kernels), **options)


def _in_cache(plan: Plan, capacity: int, on_event: Callable[[str], None] | None) -> Plan:
    """The plan in caches of some positions; tells where its drafts are missing there."""
    if on_event is not None and (reason := missing_drafts(plan, capacity)):
        on_event(reason)
    return plan.in_cache(capacity)


def _plan(given: Any) -> Plan:
    if not isinstance(given, Plan):
        raise UsageError(f"plan={shown(given)}: use what LanguageModel.plan returns, or a DecodingPlan")
    return given


def _count(name: str, given: Any) -> int:
    """A number of rows or samples, each of which the host holds."""
    return between(name, at_least_1(name, given), 1, MAX_COUNT, f"at most {MAX_COUNT}")


def _keep_drafts(given: Any) -> bool:
    return truth("keep_drafts", given, "True or False")


def _capacity(max_seq_len: Any, otherwise: int) -> int:
    """Cache positions of a sequence."""
    return otherwise if max_seq_len is None else at_least_1("max_seq_len", max_seq_len)
