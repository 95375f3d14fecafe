"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from qspec_jax.engine.answer import Answer
from qspec_jax.engine.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counts requests as they are answered, and tokens as they are made. Any thread may use it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("qspec_requests", "Requests, by path and status", ["path", "status"], **options)
        self._prompt = Counter("qspec_prompt_tokens", "Tokens of prompts", **options)
        self._made = Counter("qspec_generated_tokens", "Tokens made for answers", **options)
        self._ends = Counter("qspec_answers", "Answers, by why they ended", ["finish_reason"], **options)
        first = "Seconds from a request to its first token"
        self._first_s = Histogram("qspec_time_to_first_token_seconds", first, buckets=_FIRST_TOKEN_S, **options)
        following = "Seconds from a token of an answer to the next, of several that come at once their mean"
        self._next_s = Histogram("qspec_inter_token_latency_seconds", following, buckets=_NEXT_TOKEN_S, **options)

    def watch(self, service: Service) -> None:
        """Reads the figures of a service whenever somebody asks."""
        self._registry.register(_Figures(service))

    def count_request(self, path: str, status: int) -> None:
        """Counts a request that was answered; 499 is the status of one whose client left."""
        self._requests.labels(path, str(status)).inc()

    def count_answer(self, answer: Answer) -> None:
        """Counts an answer that is done."""
        sequence = answer.sequence
        self._ends.labels("cancelled" if sequence.cancelled and answer.error is None else answer.finish_reason).inc()
        if sequence.entered_s is not None:
            self._prompt.inc(len(sequence.request.token_ids))
        self._made.inc(len(sequence.token_ids))
        before_s = None
        for made_s, count in sequence.arrivals:
            if before_s is None:
                self._first_s.observe(max(0.0, made_s - answer.submitted_s))
            else:
                for _ in range(count):
                    self._next_s.observe(max(0.0, made_s - before_s) / count)
            before_s = made_s

    def text(self) -> bytes:
        """All of it, as Prometheus' text."""
        return generate_latest(self._registry)


class _Figures(Collector):
    """What the engine counts itself."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        service, totals = self._service, self._service.totals
        yield GaugeMetricFamily("qspec_rows", "Rows of the batch", value=totals.rows)
        yield GaugeMetricFamily("qspec_rows_in_use", "Rows that a request has", value=service.num_rows_in_use)
        yield GaugeMetricFamily("qspec_requests_waiting", "Requests without a row", value=service.num_waiting)
        choices = dict(totals.choices)
        accepted = sum(one.accepted for one in choices.values())
        yield CounterMetricFamily("qspec_drafted_tokens", "Drafts that were verified", value=totals.drafted)
        yield CounterMetricFamily("qspec_accepted_tokens", "Drafts that were accepted", value=accepted)
        reused = totals.reused_prompt_tokens
        yield CounterMetricFamily("qspec_reused_prompt_tokens", "Tokens of prompts not read again", value=reused)
        by_plan = {
            "bursts": ("Bursts of the device", lambda one: one.bursts),
            "cycles": ("Cycles of the device", lambda one: one.cycles),
            "seconds": ("Seconds of the device", lambda one: one.seconds),
        }
        for name, (text, figure) in by_plan.items():
            family = CounterMetricFamily(f"qspec_plan_{name}", f"{text}, by the plan that was chosen", labels=["plan"])
            for plan, one in choices.items():
                family.add_metric([plan], figure(one))
            yield family
