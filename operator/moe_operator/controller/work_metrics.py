"""Metrics of the operator's own work: duration and result of reconciles, and decisions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import metrics

from moe_operator.errors import MoEOperatorError

_BOUNDARIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class WorkMetrics:
    """Instruments named moe_operator.*; they do nothing if nobody collects them."""

    def __init__(self, meter: metrics.Meter) -> None:
        self._duration = meter.create_histogram(
            "moe_operator.reconcile.duration",
            "s",
            "Duration of a reconcile",
            explicit_bucket_boundaries_advisory=_BOUNDARIES_S,
        )
        self._decisions = meter.create_counter("moe_operator.decisions", "{decision}", "Decisions, by reason")

    @contextmanager
    def reconcile(self) -> Iterator[None]:
        """Measures one reconcile; the attribute `error.type` is set if it failed."""
        started, outcome = time.monotonic(), {}
        try:
            yield
        except MoEOperatorError as error:
            outcome = {"error.type": type(error).__name__}
            raise
        except Exception:
            outcome = {"error.type": "_OTHER"}
            raise
        finally:
            self._duration.record(time.monotonic() - started, outcome)

    def decided(self, reason: str) -> None:
        """Counts a decision."""
        self._decisions.add(1, {"moe_operator.reason": reason})
