"""Prometheus gets figures: what was asked, how long it waited and ran, and what is held where."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from manylora.scheduler import BatchReport

if TYPE_CHECKING:
    from manylora.service.state.hub import TinkerHub

SHARES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 2.0)
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """`Metrics` are one server's figures, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        each = ["kind", "tenant"]

        def counter(name: str, words: str) -> Counter:
            return Counter(name, words, each, registry=registry)

        def gauge(name: str, words: str, *labels: str) -> Gauge:
            return Gauge(name, words, labels, registry=registry)

        def histogram(name: str, words: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, words, labels, registry=registry, buckets=buckets)

        self._operations = counter("manylora_operations", "Operations that were run.")
        self._tokens = counter("manylora_tokens", "Tokens that were run.")
        self._compute = counter("manylora_compute_seconds", "Engine time, by share of tokens.")
        self._queue = histogram(
            "manylora_queue_seconds", "From being queued to being run.", SECONDS, *each
        )
        self._fill = histogram(
            "manylora_batch_fill", "Tokens of a batch over the token budget.", SHARES
        )
        self._held = gauge(
            "manylora_adapters", "Adapters by where they are, and snapshots.", "place"
        )
        self._waiting = gauge("manylora_requests_waiting", "Requests without an outcome.")
        self._journal_records = gauge(
            "manylora_journal_records", "Operations that no saved state contains."
        )
        self._journal_bytes = gauge("manylora_journal_bytes", "Their bytes.")

    def observe(self, report: BatchReport) -> None:
        """Count a batch; called on the engine's thread."""
        total = sum(report.tokens.values())
        for tenant, tokens in report.tokens.items():
            self._tokens.labels(report.kind, tenant).inc(tokens)
            share = tokens / total if total else 1 / len(report.tokens)
            self._compute.labels(report.kind, tenant).inc(report.seconds * share)
        for tenant, waited in report.waited:
            self._operations.labels(report.kind, tenant).inc()
            self._queue.labels(report.kind, tenant).observe(waited)
        if total:
            self._fill.observe(report.fill)

    def text(self, hub: "TinkerHub | None") -> str:
        """Return everything, as of now."""
        if hub is not None:
            resources = hub.resources
            for place, count in resources.host.counts().items():
                self._held.labels(place).set(count)
            self._waiting.set(len(resources.promises))
            records, num_bytes = resources.journal.lag()
            self._journal_records.set(records)
            self._journal_bytes.set(num_bytes)
        return generate_latest(self._registry).decode()
