"""A model of this library as lm-eval, EleutherAI's evaluation harness, knows models."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

import qspec_jax
from qspec_jax.decoding.plan import AUTO, plan_of
from qspec_jax.decoding.request_options import request_options
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.decoding.values import INT32_MAX, at_least_1, between, refuse
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.evaluation.scores import scores_function

_LENGTH_STEP = 64  # sequences are padded to multiples of it, so that few programs are compiled
_DEFAULT_NEW_TOKENS = 256
_ARGUMENTS = (
    *("model", "mode", "draft", "draft_length", "dtype", "kernels", "kv", "mesh"),
    *("verify", "draft_model", "batch_size", "max_length"),
)
_WITHOUT_MEANING = ("device", "max_batch_size", "trust_remote_code")  # given to every class of lm-eval


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
        kv: str = "model",
        mesh: str | None = None,
        verify: str = AUTO,
        draft_model: str | None = None,
        batch_size: int | str | None = 8,
        max_length: int | str = 2048,
        pretrained: str | None = None,
        **others: Any,
    ) -> None:
        """Loads a model.

        Args:
            model: what ``qspec_jax.load`` takes (``default`` for the demo model), or a loaded model.
            mode, draft, draft_length: as in ``LanguageModel.generate``.
            dtype, kernels, kv, verify, draft_model: as in ``qspec_jax.load``; a loaded model has its own last one.
            mesh: as well, with a semicolon between its axes: ``mesh=data=2;model=4``.
            batch_size: sequences that run together; ``auto`` is 8.
            max_length: tokens of a sequence, at most the model's context.
            pretrained: ``model``, as other classes of lm-eval call it.
            others: what lm-eval gives every class, which has no meaning here.

        Raises:
            QSpecError: the model cannot be loaded, an argument makes no sense for it, or is unknown.
        """
        super().__init__()
        if unknown := [name for name in others if name not in _WITHOUT_MEANING]:
            raise UsageError(f"--model_args has {', '.join(unknown)}; use some of {', '.join(_ARGUMENTS)}")
        if model is not None and pretrained is not None:
            raise UsageError("--model_args has model and pretrained, which are one; give one of them")
        model = pretrained if model is None else model
        drafting = {"draft": draft, "draft_length": _number("draft_length", draft_length), "verify": verify}
        plan_of(mode, **drafting, held=(4, 8, None))  # refuses what makes no sense before a model is loaded
        is_auto = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = 8 if is_auto else at_least_1("batch_size", _number("batch_size", batch_size))
        longest = between("max_length", _number("max_length", max_length), 2, INT32_MAX, "at least 2")
        if not isinstance(model, LanguageModel):
            quantization: Any = None if mode == "float" and verify == AUTO else "auto"
            kept = mode if mode == "w8a16" else verify
            weights: dict[str, Any] = {"quantization": quantization, "verify": kept, "draft_model": draft_model}
            name = None if model == "default" else model
            model = qspec_jax.load(name, **weights, dtype=dtype, kernels=kernels, kv=kv, mesh=mesh)
        if model.tokenizer is None:
            raise UsageError(f"{model.name} has no tokenizer, which the harness needs")
        self.model, self.tokens, self.mode = model, model.tokenizer, mode
        self.drafting = drafting
        plan = model.plan(mode, **drafting)
        self.max_length = min(longest, model.config.max_position_embeddings)
        self._scores = scores_function(model, plan.verify)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> HarnessModel:
        """See :meth:`create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """The model of ``--model_args``. What these say counts, for lm-eval always gives a ``--batch_size`` as well.

        Args:
            arg_dict: ``--model_args``.
            additional_config: what lm-eval's own options say; None is what is not given.

        Raises:
            QSpecError: as the class.
        """
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**others, **arg_dict})

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
            UsageError: a request cannot run, or asks for what is not done; no answer stands for it, which would count
                as a wrong one.
            KeyboardInterrupt: the user pressed Ctrl-C.
        """
        answers = [""] * len(requests)
        alike = defaultdict(list)
        for index, request in enumerate(requests):
            try:
                new_tokens, sampling = _asked(request.args[1])
            except UsageError as error:
                raise UsageError(f"request {index + 1} cannot run: {error}") from error
            alike[min(new_tokens, self.max_length - 1), repr(sampling)].append((index, sampling))
        for (new_tokens, _), some in alike.items():
            indices, sampling = [index for index, _ in some], some[0][1]
            contexts = [
                self.tok_encode(requests[i].args[0])[new_tokens - self.max_length :] or [self.prefix_token_id]
                for i in indices
            ]
            results = self.model.generate(
                contexts,
                mode=self.mode,
                max_new_tokens=new_tokens,
                batch_size=self.batch_size,
                sampling=sampling,
                **self.drafting,
            )
            for index, result in zip(indices, results, strict=True):
                if result.error is not None:
                    raise UsageError(f"request {index + 1} cannot run: {result.error}")
                answers[index] = _until(result.text, requests[index].args[1].get("until", ()))
        return answers


def _asked(settings: Mapping[str, Any]) -> tuple[int, SamplingParams]:
    """New tokens of a request of lm-eval, and how they are drawn: as transformers takes such settings.

    Raises:
        UsageError: one makes no sense, or asks for what is not done.
    """
    given = {name: value for name, value in settings.items() if name not in ("until", "do_sample")}
    sampled = settings.get("do_sample")
    if sampled is False:
        given.pop("temperature", None)
    elif sampled and given.get("temperature") is None:
        given["temperature"] = 1.0
    options = request_options(given)
    options.pop("chat", None)
    return options.pop("max_new_tokens", _DEFAULT_NEW_TOKENS), SamplingParams.of(options)


def _number(name: str, value: Any) -> Any:
    """A whole number that may stand in a text, as lm-eval reads some arguments; ``auto`` stays.

    Raises:
        UsageError: it is a text of something else.
    """
    if not isinstance(value, str) or value == AUTO:
        return value
    if not re.fullmatch("-?[0-9]{1,18}", value.strip()):
        raise refuse(name, value, "a whole number")
    return int(value)


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _until(text: str, stops: str | Sequence[str]) -> str:
    """``text`` up to the first of ``stops``."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
