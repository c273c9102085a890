"""`moe replay`: what scaling by forecast, or a cache, would have done with a recorded trace."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from moe_api.ranges import FiniteRange
from moe_client import errors
from moe_client.errors import CommandError
from moe_client.terminal import say

if TYPE_CHECKING:
    from moe_operator.autoscaling.model.forecast.past import Floats
    from moe_tools.replay.document import Replay
    from moe_tools.replay.trace import WorkTrace

_GPUS_AT_MEAN: Final = 10
_NOTHING: Final = 1e-9
"""Less work per minute is none: beyond it floats say more than the trace."""
_FEWEST_STEPS: Final = 3
_LONGEST_S: Final = 86_400
_MOST_REPLICAS: Final = 100_000


@click.command()
@click.option(
    "--horizon",
    type=FiniteRange(0, _LONGEST_S, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a replica takes to start, and how far ahead to look.",
)
@click.option(
    "--tune-until",
    metavar="SHARE|TIME",
    default="",
    help="The parameters of all policies are tuned before this, figures are from after it: a share of the "
    "trace (0.5) or a time (2024-05-13, or 2024-05-13T12:00). Default: the first third.",
)
@click.option(
    "--fraction",
    type=FiniteRange(min=0, min_open=True),
    default=0.5,
    show_default=True,
    metavar="GPUS",
    help="GPUs of one replica: the step in which all policies scale.",
)
@click.option(
    "--capacity",
    type=FiniteRange(min=0, min_open=True),
    metavar="WORK",
    help="Work per minute that one whole GPU does in time. Default: so that the mean demand before "
    f"--tune-until keeps {_GPUS_AT_MEAN} GPUs busy.",
)
@click.option(
    "--work",
    type=click.Choice(["requests", "tokens"]),
    default="requests",
    show_default=True,
    help="What is counted; tokens (prompt and output) only where the trace has them.",
)
@click.option(
    "--cache",
    is_flag=True,
    help="Replay the trace through a cache instead: every eviction policy, Belady's optimum and a "
    "cache without bound. --capacity is then the number of blocks or objects that the cache holds (default: "
    "a tenth of those in the trace); --json works as well, the other options do not apply.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw demand, band, capacity and violations into this file. Default: none.",
)
@click.argument("path", metavar="TRACE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def replay(path: Path, horizon: float, tune_until: str, work: str, *, as_json: bool, **choices: Any) -> None:
    """Replays TRACE through the forecaster and the scaler (or, with --cache, through a cache).

    \b
    TRACE is CSV (time,requests or t,rate, one row an interval; or TIMESTAMP,ContextTokens,GeneratedTokens,
    one row a request) or JSONL with timestamp (ms), input_length, output_length; also .gz and .xz.

    The service is simulated: a fluid queue before replicas that take --horizon to start. The parameters of
    each policy are tuned on the first part of the trace, where at most 0.1 % of the steps may end with
    unfinished work; the figures are from the rest. Nothing is random: the same trace gives the same bytes.

    \b
    moe replay azure2024_conv_10s_days1-4.csv.gz --plot azure.png
    moe replay requests.jsonl.gz --work tokens --horizon 120 --json
    moe replay --cache mooncake_conversation.jsonl.gz --capacity 10000

    With --cache, TRACE is JSONL with hash_ids (one request a line), a text with one key a line, or binary
    keys of four bytes, big-endian. docs/caching.md describes policies and figures.
    """
    if choices["cache"]:
        from moe_tools.cache_replay import command  # noqa: PLC0415 - as below

        command.replay(path, choices["capacity"], as_json=as_json)
        return
    # numpy and statsmodels take a second to import, which `moe generate` should not pay.
    from moe_tools.recorded import TraceError  # noqa: PLC0415
    from moe_tools.replay.trace import Work, read  # noqa: PLC0415

    fraction, capacity, plot = choices["fraction"], choices["capacity"], choices["plot"]
    if plot is not None:
        _check_picture(plot)
    try:
        trace = read(path, Work(work))
    except TraceError as error:
        raise CommandError(str(error), errors.WRONG) from error
    found = _replayed(trace, horizon, _boundary(trace, tune_until), fraction, capacity)
    if plot is not None:
        _draw(found, plot)
    _show(found, as_json=as_json)


def _boundary(trace: WorkTrace, text: str) -> int:
    """The step until which knobs are chosen."""
    steps = len(trace.rates)
    length = f"{steps} steps of {trace.step_s / 60:g} min"
    if steps < _FEWEST_STEPS:
        raise CommandError(
            f"{trace.name} has {length}; a replay needs {_FEWEST_STEPS} or more: some to choose the knobs "
            "of policies on, others to judge them by",
            errors.WRONG,
        )
    boundary = _step_of(trace, text) if text else steps // 3
    if not 0 < boundary < steps:
        raise click.UsageError(
            f"--tune-until {text} leaves nothing before or after it: the trace has {length}"
        )
    return boundary


def _step_of(trace: WorkTrace, text: str) -> int:
    try:
        return int(float(text) * len(trace.rates))
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(
            f"--tune-until {text!r} is neither a share like 0.5 nor a time like 2024-05-13T12:00"
        ) from None
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return int((seconds - trace.start) / trace.step_s)


def _replayed(
    trace: WorkTrace, horizon: float, boundary: int, fraction: float, capacity: float | None
) -> Replay:
    from moe_tools.progress import bar  # noqa: PLC0415
    from moe_tools.replay import comparison, scoring  # noqa: PLC0415
    from moe_tools.replay.document import Replay  # noqa: PLC0415
    from moe_tools.replay.simulator import Service  # noqa: PLC0415

    # Where nothing arrives in the first part, the whole trace says how large the service is.
    means = (_mean(trace.rates[:boundary]), _mean(trace.rates))
    mean = next((rate for rate in means if rate > _NOTHING), 0.0)
    per_gpu = capacity or mean / _GPUS_AT_MEAN
    if per_gpu <= 0:
        raise CommandError(f"no work arrives in {trace.name}: there is nothing to scale for", errors.WRONG)
    steps = max(1, math.ceil(horizon / trace.step_s))
    of_replica = per_gpu * fraction
    peak = float(trace.rates[trace.rates >= 0].max()) / of_replica if of_replica else math.inf
    if peak > _MOST_REPLICAS:
        raise CommandError(
            f"the busiest step needs {peak:.3g} replicas, more than {_MOST_REPLICAS:,}; raise --capacity or "
            "--fraction",
            errors.WRONG,
        )
    service = Service(of_replica, fraction, steps, trace.step_s)
    with bar("forecasting", len(trace.rates)) as advance:
        test = scoring.backtest(trace, steps, advance)
    with bar("policies") as advance:
        results = comparison.compare(trace, service, test.made, boundary, advance)
    score, candidates = scoring.scores(trace, test)
    return Replay(trace, service, boundary, scoring.warm_up(trace), score, candidates, results, test)


def _mean(rates: Floats) -> float:
    """Of the known ones; 0 where none is."""
    known = rates[rates >= 0]
    return float(known.mean()) if len(known) else 0.0


def _check_picture(path: Path) -> None:
    """Before minutes are spent on the replay."""
    if path.suffix != ".png":
        raise click.UsageError(f"--plot {path}: the name must end in .png")
    if not path.resolve().parent.is_dir():
        raise click.UsageError(f"--plot {path}: directory {path.parent} does not exist; create it first")


def _draw(found: Replay, path: Path) -> None:
    from moe_tools.replay import plotting  # noqa: PLC0415

    try:
        plotting.draw(found, path)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {path}: {error}", errors.WRONG) from error
    say(f"wrote {path}", err=True)


def _show(found: Replay, *, as_json: bool) -> None:
    from moe_tools.replay.document import document  # noqa: PLC0415

    made: dict[str, Any] = document(found)
    if as_json:
        click.echo(json.dumps(made, indent=2))
        return
    from moe_tools.replay import tables  # noqa: PLC0415

    tables.show(made)
