"""Compares policies: parameters from the first part of a trace, figures from the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from moe_operator.autoscaling.model.forecast.result import Forecast
from moe_tools.replay import policies
from moe_tools.replay.policies import Variant
from moe_tools.replay.simulator import Run, Service, SimulatedOutcome, clairvoyant, outcome, simulate
from moe_tools.replay.trace import WorkTrace

ALLOWED: Final = 0.1
"""Percent of steps with work left over that knobs may allow in the part they are chosen on."""
REACTIVE: Final = ("hpa", "keda", "knative")


@dataclass(frozen=True)
class Result:
    """One policy."""

    knobs: dict[str, float]
    tuned: SimulatedOutcome
    """On the part for tuning."""
    judged: SimulatedOutcome
    """On the rest of the trace."""
    run: Run


def compare(
    trace: WorkTrace,
    service: Service,
    forecasts: list[Forecast | None],
    tune_until: int,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> dict[str, Result]:
    """Results by the policy's name.

    Args:
        trace: the arriving work.
        service: that serves it.
        forecasts: by the step at whose end they were made.
        tune_until: parameters are tuned on the steps before this one; 0 < tune_until < steps.
        progress: called with the numbers of finished and of all runs.
    """
    rates, first = trace.rates, slice(0, tune_until)
    families: dict[str, list[Variant]] = {
        "moe": policies.moe(service, forecasts),
        "static_peak": policies.static_peak(rates[first], service),
        "hpa": policies.hpa(service),
        "keda": policies.keda(service),
        "knative": policies.knative(service),
        "perfect": [policies.perfect(rates, service)],
    }
    # Each variant runs once to be ranked; the best of each family, and the clairvoyant one, run once more.
    runs = sum(map(len, families.values())) + len(families) + 1
    done = itertools.count(1)

    def finished() -> None:
        progress(next(done), runs)

    results: dict[str, Result] = {}
    for name, variants in families.items():
        best = _best(trace, service, variants, tune_until, finished)
        results[name] = _result(trace, service, tune_until, simulate(rates, service, best.make()), best.knobs)
        finished()
    results["clairvoyant"] = _result(trace, service, tune_until, clairvoyant(rates, service), {})
    finished()
    return results


def _result(trace: WorkTrace, service: Service, tune_until: int, run: Run, knobs: dict[str, float]) -> Result:
    tuned = outcome(trace.rates, run, service, slice(0, tune_until))
    judged = outcome(trace.rates, run, service, slice(tune_until, len(trace.rates)))
    return Result(knobs, tuned, judged, run)


def _best(
    trace: WorkTrace, service: Service, variants: list[Variant], tune_until: int, ran: Callable[[], None]
) -> Variant:
    """The cheapest variant within the allowed violations; if there is none, the one with the fewest.

    The first horizon is left out: nothing that is ordered serves before it. `ran` is called for each variant.
    """
    part = slice(min(service.delay, tune_until - 1), tune_until)

    def rank(variant: Variant) -> tuple[float, float]:
        found = outcome(
            trace.rates, simulate(trace.rates[:tune_until], service, variant.make()), service, part
        )
        ran()
        return (max(found.violated_share - ALLOWED, 0.0), found.gpu_hours)

    return variants[int(np.lexsort(np.array([rank(variant) for variant in variants]).T[::-1])[0])]


def best_reactive(results: dict[str, Result]) -> str:
    """The reactive policy with the fewest GPU-hours; those within the allowed violations come first."""
    return min(
        REACTIVE,
        key=lambda name: (
            max(results[name].judged.violated_share - ALLOWED, 0.0),
            results[name].judged.gpu_hours,
        ),
    )
