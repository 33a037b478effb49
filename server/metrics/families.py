"""Metrics by name: each parent made once, every child resolved when it is made, always with the model's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Families:
    """Makes metrics in one registry. `labels` of a child come from closed sets: nothing a client sends (S-81)."""

    def __init__(self, registry: CollectorRegistry, model_name: str, beside: Families | None = None) -> None:
        """beside: of another model in the same registry; a histogram keeps the buckets that it has there."""
        self.registry = registry
        self._model = model_name
        self._parents: dict[str, Any] = {} if beside is None else beside._parents

    def gauge(self, name: str, text: str, **labels: str) -> Gauge:
        child: Gauge = self._child(Gauge, name, text, labels)
        return child

    def counter(self, name: str, text: str, **labels: str) -> Counter:
        child: Counter = self._child(Counter, name, text, labels)
        return child

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        if name not in self._parents:
            self._parents[name] = Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
        child: Histogram = self._parents[name].labels(model_name=self._model)
        return child

    def _child(self, kind: type[Counter] | type[Gauge], name: str, text: str, labels: dict[str, str]) -> Any:
        if name not in self._parents:
            self._parents[name] = kind(name, text, ["model_name", *labels], registry=self.registry)
        return self._parents[name].labels(model_name=self._model, **labels)


def names(registry: CollectorRegistry) -> list[str]:
    """Every sample name a scrape shows now."""
    return sorted({sample.name for family in registry.collect() for sample in family.samples})
