"""A model of this library as lm-eval, EleutherAI's evaluation harness, knows models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import qspec_jax
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View

_LENGTH_STEP = 64  # sequences are padded to multiples of it, so that few programs are compiled
_DEFAULT_NEW_TOKENS = 256
Scores = Callable[[Int32[Array, "B T"]], tuple[Float32[Array, "B T"], Float32[Array, "B T"]]]


@register_model("qspec")
class HarnessModel(TemplateLM):
    """A model of this library as lm-eval knows models."""

    def __init__(
        self,
        model: str | LanguageModel | None = None,
        *,
        mode: str = "w4a16",
        draft: str = "auto",
        draft_length: int | str = 3,
        dtype: str | None = None,
        kernels: str = "auto",
        batch_size: int | str | None = 8,
        max_length: int | str = 2048,
        **_: Any,
    ) -> None:
        """Loads a model.

        Args:
            model: what ``qspec_jax.load`` takes (``default`` for the demo model), or a loaded model.
            mode, draft, draft_length: as in ``LanguageModel.generate``.
            dtype, kernels: as in ``qspec_jax.load``.
            batch_size: sequences that run together; ``auto`` is 8.
            max_length: tokens of a sequence, at most the model's context.

        Raises:
            QSpecError: the model cannot be loaded, or an argument makes no sense for it.
        """
        super().__init__()
        if not isinstance(model, LanguageModel):
            quantization: Any = None if mode == "float" else "auto"
            name = None if model == "default" else model
            model = qspec_jax.load(name, quantization=quantization, dtype=dtype, kernels=kernels)
        if model.tokenizer is None:
            raise UsageError(f"{model.name} has no tokenizer, which the harness needs")
        self.model, self.tokens, self.mode = model, model.tokenizer, mode
        self.drafting = {"draft": draft, "draft_length": int(draft_length)}
        plan = model.plan(mode, draft=draft, draft_length=int(draft_length))
        self.batch_size = 8 if batch_size in (None, "auto") else int(batch_size)
        self.max_length = min(int(max_length), model.config.max_position_embeddings)
        self._scores = _scores_function(model, plan.verify)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self.model.stop_tokens:
            raise UsageError(f"{self.model.name} names no end-of-text token, which starts a text without context")
        return self.model.stop_tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context."""
        bos = self.model.config.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's records."""
        return self.model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with one BOS token even if the text has been through a chat template that wrote one."""
        tokens = self.tokens.encode(string, add_special_tokens=add_special_tokens is not False)
        return tokens[1:] if len(tokens) > 1 and tokens[0] == tokens[1] == self.model.config.bos_token_id else tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return self.tokens.chat_text(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would choose it.

        Raises:
            UsageError: a context or a continuation is empty.
            QSpecError: a likelihood is no number.
        """
        for _, context, continuation in requests:
            if not context or not continuation:
                raise UsageError("a request has an empty context or continuation")
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        by_length = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for batch in _batches(by_length, self.batch_size):
            # Of too long a sequence the end is kept, and one token more than is read, which is only predicted.
            sequences = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in batch]
            likelihoods, greedy = self._score(sequences)
            if not np.isfinite([likelihoods[row, : len(each) - 1].sum() for row, each in enumerate(sequences)]).all():
                raise QSpecError(f"{self.model.name} gives logits that are no numbers, of which nothing can be scored")
            for row, i in enumerate(batch):
                end = len(sequences[row]) - 1
                span = slice(max(0, end - len(requests[i][2])), end)
                results[i] = float(likelihoods[row, span].sum()), bool(greedy[row, span].all())
        return results

    def _score(self, sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """``[B, T - 1]`` log-likelihoods of tokens 1, 2, ... and whether each is the most likely one."""
        longest = -(-max(map(len, sequences)) // _LENGTH_STEP) * _LENGTH_STEP
        rows = self.batch_size if len(sequences) > 1 else 1
        tokens = np.zeros((rows, longest), np.int32)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
        likelihoods, greedy = self._scores(jnp.asarray(tokens))
        return np.asarray(likelihoods), np.asarray(greedy)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` that do not overlap."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What the model generates after each context, up to the first of the strings under ``until``.

        Raises:
            UsageError: a request cannot run; no answer stands for it, which would count as a wrong one.
            KeyboardInterrupt: the user pressed Ctrl-C.
        """
        answers = [""] * len(requests)
        alike = defaultdict(list)
        for index, request in enumerate(requests):
            settings = dict(request.args[1])
            new_tokens = int(settings.get("max_gen_toks", _DEFAULT_NEW_TOKENS))
            temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
            alike[min(new_tokens, self.max_length - 1), temperature].append(index)
        for (new_tokens, temperature), indices in alike.items():
            contexts = [
                self.tok_encode(requests[i].args[0])[new_tokens - self.max_length :] or [self.prefix_token_id]
                for i in indices
            ]
            results = self.model.generate(
                contexts,
                mode=self.mode,
                max_new_tokens=new_tokens,
                batch_size=self.batch_size,
                sampling=qspec_jax.SamplingParams(temperature=temperature) if temperature else None,
                **self.drafting,
            )
            for index, result in zip(indices, results, strict=True):
                if result.error is not None:
                    raise UsageError(f"request {index + 1} cannot run: {result.error}")
                answers[index] = _until(result.text, requests[index].args[1].get("until", ()))
        return answers


def _scores_function(model: LanguageModel, precision: Precision | View) -> Scores:
    """A compiled ``tokens [B, T] -> (log-likelihoods, is greedy) [B, T - 1]``."""
    model.programs.lay_out_weights(DecodingPlan(precision))
    graph, state = nnx.split(model.decoder)

    @jax.jit
    def scores(state: nnx.State, tokens: Array) -> tuple[Array, Array]:
        decoder = nnx.merge(graph, state)
        cache = decoder.create_cache(batch=tokens.shape[0], capacity=tokens.shape[1])
        logits = decoder(tokens, cache, precision=precision)[0][:, :-1]
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=2), jnp.argmax(logits, axis=2) == tokens[:, 1:]

    return lambda tokens: scores(state, tokens)


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _until(text: str, stops: str | Sequence[str]) -> str:
    """``text`` up to the first of ``stops``."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
