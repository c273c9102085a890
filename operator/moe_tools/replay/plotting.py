"""Draws a replay: demand, what was forecast for it, what capacity there was, and where it was too little."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from moe_operator.autoscaling.model.forecast.forecaster import QUANTILES
from moe_tools.replay.comparison import ALLOWED, best_reactive
from moe_tools.replay.document import Replay
from moe_tools.replay.simulator import filled

_DAY_S: Final = 86_400
_POINTS: Final = 1500
"""Of a line at most; longer ones are drawn by the extremes of pieces."""
_LOW, _POINT, _P95 = QUANTILES.index(0.05), QUANTILES.index(0.5), QUANTILES.index(0.95)
_DEMAND, _BAND, _CAPACITY, _OTHER, _VIOLATED = "#333333", "#7fb2e5", "#1a7f37", "#c9510c", "#d1242f"


def draw(replay: Replay, path: Path) -> None:
    """Writes a PNG; the same replay gives the same bytes.

    Raises:
        OSError: the file cannot be written.
        ValueError: its name does not end in a format that can be drawn.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(3, 1, figsize=(10, 9.5), height_ratios=(3, 3, 2), layout="constrained")
    steps = len(replay.trace.rates)
    _timeline(axes[0], replay, replay.warm_up, steps, band=False)
    axes[0].set_title(f"{replay.trace.name}: demand and capacity (simulated)")
    first, last = _busiest_day(replay)
    _timeline(axes[1], replay, first, last, band=True)
    axes[1].set_title(f"the busiest day after tuning, forecast {_horizon(replay)} ahead")
    _costs(axes[2], replay)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _horizon(replay: Replay) -> str:
    return f"{replay.service.delay * replay.trace.step_s / 60:g} min"


def _busiest_day(replay: Replay) -> tuple[int, int]:
    """The day after tuning with most work, by hours; not the one with the highest spike."""
    trace = replay.trace
    day = min(round(_DAY_S / trace.step_s), len(trace.rates) - replay.tune_until)
    sums = np.concatenate([[0.0], np.cumsum(filled(trace.rates)[replay.tune_until :])])
    work = sums[day:] - sums[:-day]
    first = replay.tune_until + int(np.argmax(work))
    return first, first + day


def _timeline(axes: Any, replay: Replay, first: int, last: int, *, band: bool) -> None:
    part = slice(first, last)
    times = _times(replay, part)
    rates = replay.trace.rates
    other = best_reactive(replay.results)
    shown: list[NDArray[Any]] = [rates[part]]
    if band:
        low, high = replay.test.combined[part, _LOW], replay.test.combined[part, _P95]
        axes.fill_between(times, low, high, color=_BAND, alpha=0.5, lw=0, label="P5 to P95 of the forecast")
        axes.plot(times, replay.test.combined[part, _POINT], color="#0550ae", lw=0.9, label="forecast")
    _line(axes, times, rates[part], color=_DEMAND, lw=0.7, label="demand")
    for name, color, style in ((other, _OTHER, ":"), ("moe", _CAPACITY, "-")):
        capacity = replay.results[name].run.ready[part] * replay.service.capacity
        shown.append(capacity)
        label = f"capacity, {'moe' if name == 'moe' else name + ' (best reactive)'}"
        _line(axes, times, capacity, color=color, lw=1.1, ls=style, label=label)
    violated = np.flatnonzero(replay.results["moe"].run.waiting[part] > 0)
    if len(violated):
        axes.plot(
            times[violated],
            rates[part][violated],
            "x",
            color=_VIOLATED,
            ms=6,
            label="too little capacity (moe)",
        )
    if not band and first < replay.tune_until < last:
        axes.axvline(_times(replay, slice(replay.tune_until, replay.tune_until + 1))[0], color="#999", lw=0.8)
    axes.set_ylim(0, _top(shown))
    axes.set_ylabel("work per minute")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8, ncols=6, frameon=False)
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)


def _top(lines: list[NDArray[Any]]) -> float:
    """Above what all lines show but for 0.1 % of their steps: one spike must not flatten everything else."""
    return 1.08 * max(1e-9, *(float(np.nanquantile(line, 0.999)) for line in lines))


def _times(replay: Replay, part: slice) -> Any:
    start, step = replay.trace.start, replay.trace.step_s
    return np.array(
        [
            datetime.fromtimestamp(start + index * step, UTC).replace(tzinfo=None)
            for index in range(part.start, part.stop)
        ],
        dtype="datetime64[s]",
    )


def _line(axes: Any, times: Any, values: NDArray[Any], **style: Any) -> None:
    """Long lines by lowest and highest of each piece, so that no spike is lost and the file stays small."""
    every = max(1, 2 * len(values) // _POINTS)
    if every > 2:
        whole = len(values) // every * every
        pieces = values[:whole].reshape(-1, every).astype(np.float64)
        values = np.column_stack([pieces.min(axis=1), pieces.max(axis=1)]).ravel()
        times = np.repeat(times[:whole:every], 2)
    axes.plot(times, values, **style)


def _costs(axes: Any, replay: Replay) -> None:
    names = [name for name in replay.results if name != "clairvoyant"]
    least = replay.results["clairvoyant"].judged.gpu_hours
    costs = [replay.results[name].judged.gpu_hours / least for name in names]
    shares = [replay.results[name].judged.violated_share for name in names]
    colors = [_CAPACITY if share <= ALLOWED else _VIOLATED for share in shares]
    bars = axes.barh(names, costs, color=colors, alpha=0.75)
    labels = [f" {cost:.2f}x, {share:.2f} % violated" for cost, share in zip(costs, shares, strict=True)]
    axes.bar_label(bars, labels, fontsize=8)
    axes.axvline(1, color=_DEMAND, lw=0.8)
    axes.set_xlim(0, 1.25 * max(costs))
    axes.invert_yaxis()
    axes.set_xlabel(
        "GPU-hours over those of the clairvoyant, after tuning; red: more than 0.1 % of steps violated"
    )
    axes.spines[["top", "right"]].set_visible(False)
