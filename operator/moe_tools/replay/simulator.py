"""A simulated service: work flows through replicas that take time to start.

Work is a fluid. A replica serves at most its capacity in each step; what is left waits for the next. This
knows no batching, no caches and no uneven routing: it compares policies, it predicts no latencies.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_operator.autoscaling.model.forecast.past import Floats

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Service:
    """What is simulated."""

    capacity: float
    """Work per minute of one replica."""
    gpus: float
    """GPUs that one replica holds, from its order on."""
    delay: int
    """A replica ordered at the end of step t serves from step t + delay."""
    step_s: float


@dataclass(frozen=True)
class View:
    """What a policy sees at the end of a step."""

    step: int
    demand: float | None
    """Work per minute that arrived in the step; None: not recorded."""
    waiting: float
    """Work left over at its end."""
    ready: int
    """Replicas that served in it."""
    ordered: int
    """Ready ones and those that start."""


Policy = Callable[[View], int]
"""How many replicas to order; called once for each step, in order."""


@dataclass(frozen=True)
class Run:
    """What happened, step by step."""

    ready: Counts
    ordered: Counts
    waiting: Floats
    """Work left over at the end [steps]."""


@dataclass(frozen=True)
class SimulatedOutcome:
    """What a part of a run cost and what it brought."""

    violated_share: float
    """Share of the steps at whose end work was left over, in percent."""
    utilisation: float
    """Work that arrived over what the ordered replicas could have done, in percent."""
    gpu_hours: float
    scale_events: int
    """Steps in which the number of ordered replicas changed."""


def simulate(rates: Floats, service: Service, policy: Policy) -> Run:
    """Runs a policy over a trace.

    Args:
        rates: work per minute [steps]; NaN: not recorded, taken to be as before.
        service: what serves it; it begins with replicas enough for the first step.
    """
    # Lists, for reading an array number by number takes several times as long.
    demands = filled(rates).tolist()
    known = [None if math.isnan(rate) else rate for rate in rates.tolist()]
    minutes = service.step_s / 60
    ordered = max(1, math.ceil(demands[0] / service.capacity))
    starting: deque[list[int]] = deque()  # (the step from which they serve, how many), ascending
    waiting = 0.0
    history: list[tuple[int, int, float]] = []
    for step, demand in enumerate(demands):
        while starting and starting[0][0] <= step:
            starting.popleft()
        ready = ordered - sum(count for _, count in starting)
        waiting = max(0.0, waiting + (demand - ready * service.capacity) * minutes)
        # What is left of rounding is not work.
        waiting = waiting if waiting > 1e-9 * demand * minutes else 0.0
        history.append((ready, ordered, waiting))
        wanted = max(0, policy(View(step, known[step], waiting, ready, ordered)))
        if wanted > ordered:
            starting.append([step + service.delay, wanted - ordered])
        surplus = ordered - wanted
        while surplus > 0 and starting:  # those that have not begun to serve go first
            taken = min(surplus, starting[-1][1])
            starting[-1][1] -= taken
            surplus -= taken
            if not starting[-1][1]:
                starting.pop()
        ordered = wanted
    ready_counts, ordered_counts, left = zip(*history, strict=True)
    return Run(
        np.array(ready_counts, np.int64), np.array(ordered_counts, np.int64), np.array(left, np.float64)
    )


def outcome(rates: Floats, run: Run, service: Service, part: slice) -> SimulatedOutcome:
    """Figures of a part of a run."""
    hours = service.step_s / 3600
    ordered = run.ordered[part]
    offered = float(ordered.sum()) * service.capacity
    return SimulatedOutcome(
        violated_share=100 * float((run.waiting[part] > 0).mean()),
        utilisation=100 * float(filled(rates)[part].sum()) / offered if offered else 0.0,
        gpu_hours=float(ordered.sum()) * service.gpus * hours,
        scale_events=int((np.diff(ordered) != 0).sum()),
    )


def clairvoyant(rates: Floats, service: Service) -> Run:
    """The fewest GPU-hours without any work left over, with all of the trace known beforehand.

    The k-th replica is needed in the steps whose demand exceeds k - 1 replicas. Between two of these it is
    kept where starting it again would cost no less, and it is ordered as early as its start takes.
    """
    needed = np.ceil(filled(rates) / service.capacity - 1e-9).astype(np.int64)
    ready = np.zeros(len(needed), np.int64)
    ordered = np.zeros(len(needed), np.int64)
    lead = service.delay - 1  # it is ordered at the end of a step and counts from the next one on
    for level in range(1, int(needed.max()) + 1):
        steps = np.flatnonzero(needed >= level)
        cuts = np.flatnonzero(np.diff(steps) - 1 > lead)
        begins, ends = steps[np.r_[0, cuts + 1]], steps[np.r_[cuts, -1]] + 1
        for begin, end in zip(begins, ends, strict=True):
            ready[begin:end] += 1
            ordered[max(0, begin - lead) : end] += 1
    return Run(ready, ordered, np.zeros(len(needed)))


def filled(rates: Floats) -> Floats:
    """Without NaN: as the step before, those at the beginning as the first known one."""
    known = ~np.isnan(rates)
    if not known.any():
        return np.zeros(len(rates))
    latest = np.maximum.accumulate(np.where(known, np.arange(len(rates)), -1))
    return np.asarray(rates[np.where(latest < 0, int(np.argmax(known)), latest)])
