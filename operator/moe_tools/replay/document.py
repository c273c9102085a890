"""The result of a replay as JSON for scripts. Its keys are stable: docs/scaling.md lists them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from moe_tools.replay.comparison import Result
from moe_tools.replay.scoring import Backtest, Score
from moe_tools.replay.simulator import Service
from moe_tools.replay.trace import WorkTrace

_DIGITS: Final = 4
METHOD: Final = "combination"


@dataclass(frozen=True)
class Replay:
    """The result of a replay."""

    trace: WorkTrace
    service: Service
    tune_until: int
    """Number of steps for tuning."""
    warm_up: int
    """Number of steps whose forecasts are not scored."""
    score: Score
    candidates: dict[str, Score]
    results: dict[str, Result]
    test: Backtest


def document(replay: Replay) -> dict[str, Any]:
    """Numbers, texts, lists and objects, ready for JSON; the same replay gives the same document."""
    last = replay.candidates["last value"]
    return {
        "trace": replay.trace.name,
        "interval_s": replay.trace.step_s,
        "horizon_s": replay.service.delay * replay.trace.step_s,
        "steps": len(replay.trace.rates),
        "warm_up_steps": replay.warm_up,
        "tune_until_steps": replay.tune_until,
        "service": {
            "capacity_per_gpu": _rounded(replay.service.capacity / replay.service.gpus),
            "gpus_per_replica": replay.service.gpus,
        },
        "forecast": {
            "method": METHOD,
            **_score(replay.score),
            "last_value_wape": _rounded(last.wape),
            "last_value_pinball_p90": _rounded(last.pinball_p90),
            "candidates": {name: _score(score) for name, score in replay.candidates.items()},
        },
        "policies": {name: _policy(replay, result) for name, result in replay.results.items()},
    }


def _score(score: Score) -> dict[str, float | None]:
    return {
        "wape": _rounded(score.wape),
        "pinball_p90": _rounded(score.pinball_p90),
        "coverage_p90": _rounded(score.coverage_p90),
    }


def _policy(replay: Replay, result: Result) -> dict[str, Any]:
    least = replay.results["clairvoyant"].judged.gpu_hours
    judged = result.judged
    return {
        "violated_share": _rounded(judged.violated_share),
        "utilisation": _rounded(judged.utilisation),
        "gpu_hours": _rounded(judged.gpu_hours),
        "gpu_hours_over_clairvoyant": _rounded(judged.gpu_hours / least) if least else None,
        "scale_events": judged.scale_events,
        "knobs": result.knobs,
        "tuned_violated_share": _rounded(result.tuned.violated_share),
    }


def _rounded(number: float) -> float | None:
    """None for what could not be measured: JSON knows no NaN."""
    return None if math.isnan(number) else round(number, _DIGITS)
