"""How many replicas a cache saves: the work that is left after it feeds the forecaster and the scaler.

The work of a request is its prompt tokens that have to be computed and its answer tokens (where the trace has
no tokens: blocks, and nothing for answers). A prompt token counts as much as an answer token, though it costs
less on most hardware. The simulated service is that of `moe replay`, with the operator's default settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from moe_tools.cache_replay.document import ReplicaUse
from moe_tools.cache_replay.recording import Key, KeyTrace
from moe_tools.progress import Advance, behind
from moe_tools.replay import policies, scoring
from moe_tools.replay.simulator import Service, outcome, simulate
from moe_tools.replay.trace import WorkTrace, of_requests

HORIZON_S: Final = 300.0
AT_MEAN: Final = 10
"""Replicas that the mean work without a cache keeps busy."""
OUTPUT_TTL_S: Final = 3600.0
"""Default of spec.cache.outputs.ttl."""


def compare(
    recording: KeyTrace, work: dict[str, Sequence[float]], advance: Advance
) -> dict[str, ReplicaUse] | None:
    """Replicas for each amount of work; None if there is no work.

    Args:
        recording: the trace, of some minutes.
        work: of each request, in the order of the trace, by the name of the cache; "none" has to be there.
        advance: told the steps that are forecast.
    """
    times = [request.at_s for request in recording.requests]
    traces = {name: of_requests(recording.name, times, amounts) for name, amounts in work.items()}
    base = traces["none"]
    total = float(base.rates.sum())
    if total <= 0:
        return None
    delay = max(1, math.ceil(HORIZON_S / base.step_s))
    service = Service(total / len(base.rates) / AT_MEAN, 1.0, delay, base.step_s)
    steps = sum(len(trace.rates) for trace in traces.values())
    found: dict[str, ReplicaUse] = {}
    done = 0
    for name, trace in traces.items():
        found[name] = _use(trace, service, total, behind(advance, done, steps))
        done += len(trace.rates)
    return found


def _use(trace: WorkTrace, service: Service, total: float, progress: Callable[[int], None]) -> ReplicaUse:
    forecasts = scoring.backtest(trace, service.delay, progress).made
    run = simulate(trace.rates, service, policies.default(service, forecasts))
    found = outcome(trace.rates, run, service, slice(None))
    return ReplicaUse(
        float(run.ordered.mean()),
        int(run.ordered.max()),
        found.violated_share,
        float(trace.rates.sum()) / total,
    )


def without_cache(recording: KeyTrace) -> list[int]:
    """The work of each request where nothing is cached."""
    return [
        _prompt(request.prompt_tokens, request.keys) + request.answer_tokens for request in recording.requests
    ]


def with_prefixes(recording: KeyTrace, recomputed: Sequence[int]) -> list[int]:
    """The work of each request where so many prompt tokens of each have to be computed."""
    return [
        tokens + request.answer_tokens for tokens, request in zip(recomputed, recording.requests, strict=True)
    ]


def with_outputs(recording: KeyTrace) -> list[int]:
    """The work of each request if whole answers are kept for OUTPUT_TTL_S.

    An upper bound: every answer counts as determined, and memory as sufficient. Requests are equal if all of
    their blocks are.
    """
    stored: dict[tuple[object, ...], float] = {}
    left = []
    for request, work in zip(recording.requests, without_cache(recording), strict=True):
        question = (request.keys, request.prompt_tokens)
        fresh = question in stored and request.at_s - stored[question] < OUTPUT_TTL_S
        left.append(0 if fresh else work)
        if not fresh:
            stored[question] = request.at_s
    return left


def _prompt(tokens: int, keys: tuple[Key, ...]) -> int:
    return tokens or len(keys)
