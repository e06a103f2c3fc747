"""Figures for Prometheus, on an address of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from emberpc.server.collections import IndexBackend
from emberpc.server.engine import Engine
from emberpc.server.scraping import PageServer

log = logging.getLogger(__name__)

#: From a cached text to a corpus, in seconds.
_DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


@dataclass(frozen=True)
class Calls:
    """Figures of the calls."""

    count: Counter
    failures: Counter
    seconds: Histogram

    @classmethod
    def register(cls, registry: CollectorRegistry) -> Calls:
        """Make them known to a registry."""
        return cls(
            Counter("emberpc_request_count", "Calls that ended.", ["method"], registry=registry),
            Counter(
                "emberpc_request_failure", "Calls that failed, by status code.", ["method", "err"], registry=registry
            ),
            Histogram(
                "emberpc_request_duration_seconds",
                "Wall time of calls.",
                ["method"],
                buckets=_DURATIONS,
                registry=registry,
            ),
        )

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Take in a call that ended; `code` is the name of a status code."""
        name = method.rpartition("/")[2]
        self.count.labels(name).inc()
        self.seconds.labels(name).observe(seconds)
        if code != "OK":
            self.failures.labels(name, code).inc()


class EngineFigures(Collector):
    """What an engine did and does; read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Read the figures."""
        engine, counts = self._engine, self._engine.counts
        totals = {
            "batch_count": ("Micro-batches run.", counts.batches),
            "batch_texts": ("Texts in them.", counts.texts),
            "batch_tokens": ("Tokens in them, padding not included.", counts.tokens),
            "batch_padding_tokens": ("Tokens that batches were filled up with.", counts.padding),
            "batch_failures": ("Micro-batches that failed.", counts.failed_batches),
            "queue_refused": ("Calls refused for what waited already.", counts.refused),
            "queue_expired": ("Calls whose time was up before they were begun.", counts.expired),
            "workers_lost": ("Workers that died and were replaced.", counts.lost_workers),
            "cache_hits": ("Texts that the cache knew.", engine.cache.hits),
            "cache_misses": ("Texts that it did not know.", engine.cache.misses),
        }
        for name, (text, total) in totals.items():
            yield CounterMetricFamily(f"emberpc_{name}", text, value=total)
        gauges = {
            "queue_size_tokens": ("Tokens that wait.", engine.waiting_tokens),
            "worker_tokens_per_second": ("What one worker does, as lately measured.", engine.tokens_per_second),
            "cache_bytes": ("Bytes of the outcomes kept.", engine.cache.bytes),
            "models": ("Models served.", len(engine.models())),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"emberpc_{name}", text, value=value)


class IndexFigures(Collector):
    """What probes of searches found; read when somebody asks."""

    def __init__(self, index: IndexBackend) -> None:
        self._index = index

    def collect(self) -> Iterable[Metric]:
        """Read the figures."""
        recall = GaugeMetricFamily(
            "emberpc_search_recall", "Mean recall of the latest searches probed.", labels=["collection"]
        )
        count = CounterMetricFamily("emberpc_search_probes", "Searches done again exactly.", labels=["collection"])
        for name, probed in self._index.probed().items():
            recall.add_metric([name], probed.recall)
            count.add_metric([name], probed.count)
        yield from (recall, count)


def serve_metrics(address: str, engine: Engine, index: IndexBackend) -> Calls:
    """Serve figures over HTTP, at /metrics; return where calls are to be reported.

    Args:
        address: HOST:PORT.
        engine: whose figures.
        index: whose figures too.

    Raises:
        OSError: the address cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(EngineFigures(engine))
    registry.register(IndexFigures(index))
    ProcessCollector(registry=registry)
    host, _, port = address.rpartition(":")
    server = PageServer(host.strip("[]"), int(port), make_wsgi_app(registry))
    log.info("figures at http://%s:%d/metrics", host, server.port)
    return Calls.register(registry)
