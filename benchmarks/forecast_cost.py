"""CPU cost of the forecaster: an update each minute, occasional refits, a thousand deployments.

    python -m benchmarks.forecast_cost [--days 4] [--json]

Demand is synthetic (a daily season, noise and level shifts, a fixed seed); the cost hardly depends on it. The
baselines are the budgets: 5 ms for an update, 1 s for a refit, and 60 ms of one core for a minute of a
deployment, so that a thousand deployments fit on one core. A ratio below 1 is within the budget. Times are
processor times, so that other load matters little.
"""

import argparse
import json
import platform
import statistics
import time

import numpy as np

from benchmarks.commands import positive
from moe_operator.autoscaling.model.forecast.forecaster import Forecaster
from moe_operator.autoscaling.model.history import History

DAY = 1440
UPDATE_MS, REFIT_MS, MINUTE_MS = 5.0, 1000.0, 60.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--days", type=positive, default=4, help="days of minutes to measure, after ten more")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    updates_ms, refits_ms = measure(args.days)
    a_minute = statistics.mean(updates_ms) + sum(refits_ms) / len(updates_ms)
    p99 = statistics.quantiles(updates_ms, n=100)[98]
    for what, figure, budget in (
        ("update, median", statistics.median(updates_ms), UPDATE_MS),
        ("update, p99", p99, UPDATE_MS),
        (f"refit, mean of {len(refits_ms)}", statistics.mean(refits_ms), REFIT_MS),
        ("refit, longest", max(refits_ms), REFIT_MS),
        ("minute of one deployment, refits included", a_minute, MINUTE_MS),
    ):
        report(what, figure, budget, as_json=args.json)


def measure(days: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each update and of each refit, with all the history that is kept."""
    chance = np.random.default_rng(0)
    minutes = np.arange((10 + days) * DAY)
    level = 1000 * np.exp(np.cumsum(chance.normal(0, 0.3, 10 + days)))[minutes // DAY]
    rates = level * (1.5 + np.sin(2 * np.pi * minutes / DAY)) * np.exp(chance.normal(0, 0.08, len(minutes)))
    history = History()
    for minute in minutes[: 10 * DAY]:
        history.add(int(minute) + 1, float(rates[minute]))
    forecaster = Forecaster.restored(history, 5)
    updates_ms, refits_ms = [], []
    for minute in minutes[10 * DAY :]:
        before = time.process_time()
        forecaster.update(int(minute) + 1, float(rates[minute]))
        forecaster.forecast()
        updates_ms.append(1e3 * (time.process_time() - before))
        if forecaster.refit_due:
            before = time.process_time()
            forecaster.adopt(forecaster.refit_job()())
            refits_ms.append(1e3 * (time.process_time() - before))
    return updates_ms, refits_ms


def report(what: str, ours_ms: float, budget_ms: float, *, as_json: bool) -> None:
    line = {
        "what": what,
        "ours": round(ours_ms, 3),
        "peer": budget_ms,
        "ratio": round(ours_ms / budget_ms, 4),
        "unit": "ms",
        "device": f"{platform.machine()}, one core, Python {platform.python_version()}",
    }
    print(json.dumps(line) if as_json else f"{what}: {ours_ms:.2f} ms (budget {budget_ms:g} ms)", flush=True)


if __name__ == "__main__":
    main()
