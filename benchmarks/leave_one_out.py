"""The forecaster's errors on each trace, with the combination's memory chosen on the other traces.

    python -m benchmarks.leave_one_out TRACE:STEPS... [--json]

STEPS is the horizon in steps of the trace (minutes, or the recorded interval where it is longer). The
baseline is the best single candidate on that trace, known only afterwards; a ratio below 1 is better than all
of them. About two minutes for a month of minutes on one core.
"""

import argparse
import json

from benchmarks.commands import file_with_number, run
from moe_operator.autoscaling.model.forecast.combination import MEMORIES
from moe_tools.recorded import TraceError
from moe_tools.replay import scoring, trace

CHOICES = (*((memory,) for memory in (1.0, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98)), MEMORIES)
FIGURES = ("wape", "pinball_p90")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=file_with_number, metavar="TRACE:STEPS")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {}
    for path, steps in args.traces:
        recorded = trace.read(path)
        test = scoring.backtest(recorded, steps)
        ours, candidates = scoring.scores(recorded, test)
        by_memory = {memories: scoring.recombined(recorded, test, memories) for memories in CHOICES}
        found[recorded.name] = (ours, candidates, by_memory)
    for name, (ours, candidates, by_memory) in found.items():
        others = [values[2] for other, values in found.items() if other != name]
        for figure in FIGURES:
            memories = min(CHOICES, key=lambda choice: loss(others, choice, figure)) if others else MEMORIES
            best = min(getattr(score, figure) for score in candidates.values())
            left_out = getattr(by_memory[memories], figure)
            report(f"{name}, {figure}, built in {MEMORIES}", getattr(ours, figure), best, args.json)
            report(f"{name}, {figure}, left out {memories}", left_out, best, args.json)
            report(
                f"{name}, {figure}, last value", getattr(candidates["last value"], figure), best, args.json
            )


def loss(
    others: list[dict[tuple[float, ...], scoring.Score]], choice: tuple[float, ...], figure: str
) -> float:
    """How much worse a choice is than the best one, on average over traces."""
    shares: list[float] = [
        getattr(scores[choice], figure) / min(getattr(score, figure) for score in scores.values())
        for scores in others
    ]
    return sum(shares) / len(shares)


def report(what: str, ours: float, peer: float, as_json: bool) -> None:
    line = {"what": what, "ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ours / peer, 4)}
    line |= {"unit": "% of mean demand"}
    print(
        json.dumps(line)
        if as_json
        else f"{what}: {ours:.3f} (best candidate {peer:.3f}, {ours / peer:.4f}x)",
        flush=True,
    )


if __name__ == "__main__":
    run(main, TraceError)
