"""Serve the server's figures (counters, gauges, histograms) to Prometheus over HTTP, on an address of their own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from emberpc.server.collections import IndexBackend
from emberpc.server.engine import Engine
from emberpc.server.scraping import App, PageServer

log = logging.getLogger(__name__)

#: Upper bounds of the histogram buckets for the durations of calls, in seconds. A call with a cached text takes about
#: the smallest, a call with a whole corpus the greatest.
_DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
#: Matches an HTTP header `Accept` that asks for a version of the format other than three numbers of 1 to 4 digits.
_ODD_VERSION = re.compile(r"version\s*=(?!\d{1,4}\.\d{1,4}\.\d{1,4}\s*(?:[;,]|$))", re.ASCII)


@dataclass(frozen=True)
class Calls:
    """Figures of the server's calls by method: number of calls, number of failed calls by status code, durations."""

    count: Counter
    failures: Counter
    seconds: Histogram

    @classmethod
    def register(cls, registry: CollectorRegistry) -> Calls:
        """Create the figures and register them with a Prometheus registry; return them."""
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
        """Count a call that ended.

        Args:
            method: path of the method; the part after the last `/` becomes the label `method`.
            code: name of the status code; a call with another code than `OK` counts as failed.
            seconds: wall time of the call.
        """
        name = method.rpartition("/")[2]
        self.count.labels(name).inc()
        self.seconds.labels(name).observe(seconds)
        if code != "OK":
            self.failures.labels(name, code).inc()


class EngineFigures(Collector):
    """Figures of an engine: micro-batches, queue, workers, cache, models. Prometheus gets the present values."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Yield the present figures: counters since the start, and gauges. The Prometheus registry calls this."""
        engine, counts = self._engine, self._engine.counts
        totals = {
            "batch_count": ("Micro-batches run.", counts.batches),
            "batch_texts": ("Texts in micro-batches.", counts.texts),
            "batch_tokens": ("Tokens in micro-batches, without padding.", counts.tokens),
            "batch_padding_tokens": ("Padding tokens in micro-batches.", counts.padding),
            "batch_failures": ("Micro-batches that failed.", counts.failed_batches),
            "queue_refused": ("Calls refused: the queue was full, or the deadline too soon.", counts.refused),
            "queue_expired": ("Calls whose deadline passed while they waited in the queue.", counts.expired),
            "workers_lost": ("Workers that died and were replaced.", counts.lost_workers),
            "cache_hits": ("Texts whose result was in the cache.", engine.cache.hits),
            "cache_misses": ("Texts whose result was not in the cache.", engine.cache.misses),
        }
        for name, (text, total) in totals.items():
            yield CounterMetricFamily(f"emberpc_{name}", text, value=total)
        gauges = {
            "queue_size_tokens": ("Tokens of the texts in the queue.", engine.waiting_tokens),
            "worker_tokens_per_second": ("Recent throughput of one worker.", engine.tokens_per_second),
            "cache_bytes": ("Bytes of the results in the cache.", engine.cache.bytes),
            "models": ("Models that are served.", len(engine.models())),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"emberpc_{name}", text, value=value)
        models = GaugeMetricFamily(
            "emberpc_model_info",
            "1 for each served model, with the engine that runs it.",
            labels=["model", "variant", "engine", "precision"],
        )
        for model in engine.models():
            runtime = model.plan.runtime
            models.add_metric([model.name, model.variant.name, runtime.engine, runtime.precision], 1)
        yield models


class IndexFigures(Collector):
    """Recall of searches by collection, measured by repeating some searches as exact searches.

    The figures are read when Prometheus asks for them.
    """

    def __init__(self, index: IndexBackend) -> None:
        self._index = index

    def collect(self) -> Iterable[Metric]:
        """Yield two metrics: the recall (0 to 1), and the number of repeated searches, both by collection.

        Collections without repeated searches are left out. The Prometheus registry calls this.
        """
        recall = GaugeMetricFamily(
            "emberpc_search_recall", "Mean recall of the latest repeated searches.", labels=["collection"]
        )
        count = CounterMetricFamily(
            "emberpc_search_probes", "Searches repeated as exact searches to measure recall.", labels=["collection"]
        )
        for name, probed in self._index.probed().items():
            recall.add_metric([name], probed.recall)
            count.add_metric([name], probed.count)
        yield from (recall, count)


def serve_metrics(address: str, engine: Engine, index: IndexBackend) -> Calls:
    """Start a thread that serves the figures of calls, engine, index and process over HTTP, at any path.

    Args:
        address: HOST:PORT to listen on; port 0: a free port.
        engine: the engine whose figures are served.
        index: the index backend whose figures are served.

    Returns:
        The figures of calls, which are empty. This function's caller must pass each call that ended to `Calls.observe`.

    Raises:
        OSError: the address is in use, is not an address of this host, or no file descriptor is free.
        UnicodeError: the host is not a valid name.
    """
    registry = CollectorRegistry()
    registry.register(EngineFigures(engine))
    registry.register(IndexFigures(index))
    ProcessCollector(registry=registry)
    host, _, port = address.rpartition(":")
    server = PageServer(host.strip("[]"), int(port), _page(registry))
    log.info("figures at http://%s:%d/metrics", host, server.port)
    return Calls.register(registry)


def _page(registry: CollectorRegistry) -> App:
    """Return the WSGI application that serves the figures of a registry.

    The application ignores a header `Accept` whose version is not three numbers, since prometheus_client would fail.
    """
    app: App = make_wsgi_app(registry)

    def page(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if _ODD_VERSION.search(environ.get("HTTP_ACCEPT", "")):
            del environ["HTTP_ACCEPT"]
        return app(environ, start_response)

    return page
