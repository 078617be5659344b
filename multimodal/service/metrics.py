"""Figures of a running service, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from multimodal.engine import Generation

if TYPE_CHECKING:
    from multimodal.service.answering import Answering

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Counts and times of one application, in a registry of its own.

    Args:
        answering: Whose queue and caches are told, too.
    """

    def __init__(self, answering: Answering) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "multimodal_requests", "Requests, by address and status.", ["endpoint", "status"], registry=registry
        )
        self._first = Histogram(
            "multimodal_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._speed = Histogram(
            "multimodal_tokens_per_second", "Of an answer, after its first token.", buckets=SPEEDS, registry=registry
        )
        self._tokens = Counter(
            "multimodal_tokens",
            "Tokens of prompts, of these what was known already, and of answers.",
            ["kind"],
            registry=registry,
        )
        self._registry.register(_Live(answering))

    def requested(self, endpoint: str, status: int) -> None:
        """A request has ended."""
        self._requests.labels(endpoint, str(status)).inc()

    def answered(self, generations: Sequence[Generation], arrived: float) -> None:
        """Answers were written, or begun.

        Args:
            generations: The answers.
            arrived: When the request did, in seconds of ``time.perf_counter``.
        """
        begun = [generation for generation in generations if generation.tokens]
        if not begun:
            return
        self._first.observe(max(min(its.tokens[0].time for its in begun) - arrived, 0))
        for its in begun:
            self._tokens.labels("prompt").inc(len(its.request.tokens))
            self._tokens.labels("reused").inc(its.reused)
            self._tokens.labels("completion").inc(len(its.tokens))
            seconds = its.tokens[-1].time - its.tokens[0].time
            if seconds > 0:
                self._speed.observe((len(its.tokens) - 1) / seconds)

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Live(Collector):
    """What others count already, read when it is asked for."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    def collect(self) -> Iterator[Metric]:
        answering, model = self._answering, self._answering.model
        for name, about, value in (
            ("multimodal_queue_waiting", "Requests that wait for their turn.", answering.turns.waiting),
            ("multimodal_queue_running", "Requests that have their turn.", answering.turns.running),
        ):
            yield GaugeMetricFamily(name, about, value=value)
        hits = CounterMetricFamily("multimodal_cache_hits", "What was there when it was asked for.", labels=["cache"])
        misses = CounterMetricFamily("multimodal_cache_misses", "What was not.", labels=["cache"])
        for name, cache in (
            ("decoded_pictures", model.prepared),
            ("encoded_pictures", model.engine.pictures),
            ("answers", answering.cache),
        ):
            hits.add_metric([name], cache.hits)
            misses.add_metric([name], cache.misses)
        yield hits
        yield misses
