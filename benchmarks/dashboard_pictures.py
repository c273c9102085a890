"""Draws the chart's dashboards with data that Prometheus had, to judge titles, units and legends.

    python -m benchmarks.dashboards --record recorded.json
    python -m benchmarks.dashboard_pictures recorded.json pictures

matplotlib writes one PNG a dashboard, not Grafana: places (gridPos), titles, units, limits, legends and
thresholds are the dashboard's; fonts, colours and the form of legends are near those of Grafana.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.dashboards import CHART, Body, Recording, filled

WIDTH_IN, COLUMNS, ROW_IN, GAP_IN = 16.0, 24, 0.38, 0.08
LEFT_IN, RIGHT_IN, TOP_IN = 0.75, 0.15, 0.3
"""Margins of axes in a panel."""
LINE_IN = 0.17
"""Height of a line of a legend."""
LEGEND_SHARE = 0.35
"""Of a panel, at most: Grafana scrolls longer legends."""
COLOURS = {"red": "tab:red", "orange": "tab:orange", "green": "tab:green", "blue": "tab:blue"}
MIDDLE = {"horizontalalignment": "center", "verticalalignment": "center"}
DURATIONS = (
    (604800, "weeks"),
    (86400, "days"),
    (3600, "hours"),
    (60, "mins"),
    (1, "s"),
    (1e-3, "ms"),
    (1e-6, "µs"),
)


@dataclass(frozen=True)
class Series:
    """A line of a panel; times are seconds since the start of the recording."""

    legend: str
    times: Any
    values: Any

    @property
    def finite(self) -> Any:
        return self.values[np.isfinite(self.values)]


class Box:
    """A panel's rectangle in the figure, measured in inches from its top left corner."""

    def __init__(self, figure: Figure, place: Body) -> None:
        column = WIDTH_IN / COLUMNS
        self._figure, self._x, self._y = figure, place["x"] * column, place["y"] * ROW_IN
        self.width, self.height = place["w"] * column - GAP_IN, place["h"] * ROW_IN - GAP_IN
        self._across, self._down = figure.get_size_inches()

    def axes(self, left: float, top: float, right: float, bottom: float) -> Axes:
        """Axes with these margins."""
        x, y = self._x + left, self._down - self._y - self.height + bottom
        width, height = self.width - left - right, self.height - top - bottom
        place = (x / self._across, y / self._down, width / self._across, height / self._down)
        axes: Axes = self._figure.add_axes(place)
        return axes

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        style = {"verticalalignment": "top", **style}
        self._figure.text((self._x + x) / self._across, 1 - (self._y + y) / self._down, text, **style)


def draw(board: Body, recording: Recording) -> Figure:
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = plt.figure(figsize=(WIDTH_IN, rows * ROW_IN), facecolor="#f4f5f5")
    for panel in board["panels"]:
        box = Box(figure, panel["gridPos"])
        if panel["type"] == "row":
            box.text(0.1, 0.06, panel["title"], weight="bold")
            continue
        frame = box.axes(0, 0, 0, 0)
        frame.set(xticks=[], yticks=[])
        frame.spines[:].set(visible=True, color="#dddddd")
        box.text(0.1, 0.06, panel["title"], weight="bold")
        series = series_of(panel, recording)
        if any(one.finite.size for one in series):
            axes = DRAWN[panel["type"]](box, panel, series)
            axes.set_xlim(0, recording.end - recording.start)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{int(at) // 60}:{int(at) % 60:02d}"))
        else:
            nothing = panel["fieldConfig"]["defaults"].get("noValue", "No data")
            box.text(box.width / 2, box.height / 2, nothing, color="grey", size=11, **MIDDLE)
    return figure


def series_of(panel: Body, recording: Recording) -> list[Series]:
    found = []
    for target in panel["targets"]:
        text = filled(target["expr"], int(recording.end - recording.start))
        for series in recording.series[text]:
            legend = target["legendFormat"]
            for label in re.findall(r"\{\{(\w+)\}\}", legend):
                legend = legend.replace(f"{{{{{label}}}}}", series["metric"].get(label, ""))
            times, values = np.array(series["values"], dtype=float).T
            found.append(Series(legend, times - recording.start, values))
    return found


def timeseries(box: Box, panel: Body, series: list[Series]) -> Axes:
    config = panel["fieldConfig"]
    unit = config["defaults"]["unit"]
    lines = min(len(series), int(LEGEND_SHARE * box.height / LINE_IN) - 1)
    axes = box.axes(LEFT_IN, TOP_IN, RIGHT_IN, (lines + 1) * LINE_IN + 0.32)

    def row(number: int, cells: tuple[str, str, str], colour: str) -> None:
        y = box.height - (lines - number) * LINE_IN - 0.04
        box.text(0.32, y, cells[0], size=7, color=colour)
        box.text(box.width - 0.9, y, cells[1], size=7, color=colour, horizontalalignment="right")
        box.text(box.width - 0.15, y, cells[2], size=7, color=colour, horizontalalignment="right")

    hidden = len(series) - lines
    row(-1, (f"Name ({hidden} more: scroll)" if hidden else "Name", "Last *", "Max"), "tab:blue")
    for number, one in enumerate(series):
        style = config["defaults"]["custom"] | _override(config["overrides"], one.legend)
        dashed = "--" if style.get("lineStyle", {}).get("fill") == "dash" else "-"
        xs, ys = _with_gaps(one)
        (line,) = axes.plot(xs, ys, dashed, linewidth=style["lineWidth"])
        axes.fill_between(xs, ys, alpha=style["fillOpacity"] / 100, color=line.get_color(), linewidth=0)
        if number < lines:
            told = (one.finite[-1], one.finite.max()) if one.finite.size else (math.nan, math.nan)
            row(number, (one.legend, shown(told[0], unit), shown(told[1], unit)), "black")
            y = box.height - (lines - number) * LINE_IN - 0.04
            box.text(0.12, y, "━", color=line.get_color(), size=7)
    defaults = config["defaults"]
    least = min(axes.get_ylim()[0], defaults["custom"].get("axisSoftMin", math.inf))
    axes.set_ylim(defaults.get("min", least), defaults.get("max"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    axes.grid(color="#eeeeee")
    return axes


def _override(overrides: list[Body], legend: str) -> Body:
    return {
        change["id"].removeprefix("custom."): change["value"]
        for override in overrides
        if re.search(override["matcher"]["options"], legend)
        for change in override["properties"]
    }


def _with_gaps(one: Series) -> tuple[Any, Any]:
    """Times and values with NaN where Prometheus had no value."""
    between = np.diff(one.times)
    cuts = np.flatnonzero(between > 1.5 * between.min(initial=math.inf)) + 1
    return np.insert(one.times, cuts, np.nan), np.insert(one.values, cuts, np.nan)


def stat(box: Box, panel: Body, series: list[Series]) -> Axes:
    defaults, (one, *_) = panel["fieldConfig"]["defaults"], series
    value, colour = one.finite[-1], defaults["color"].get("fixedColor", "green")
    for step in defaults.get("thresholds", {}).get("steps", ()):
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    style = {"size": 22, "color": COLOURS[colour], **MIDDLE}
    box.text(box.width / 2, box.height / 2, shown(value, defaults["unit"]), **style)
    axes = box.axes(0.02, 0.7 * box.height, 0.02, 0.02)
    axes.fill_between(one.times, one.values, alpha=0.3, color=COLOURS[colour])
    axes.axis("off")
    return axes


def state_timeline(box: Box, panel: Body, series: list[Series]) -> Axes:
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    states = mapping["options"]
    axes = box.axes(2 * LEFT_IN, TOP_IN, RIGHT_IN, 0.7)
    for row, one in enumerate(series):
        for begin, end, value in zip(one.times, [*one.times[1:], one.times[-1]], one.values, strict=True):
            colour = COLOURS[states[f"{value:g}"]["color"]]
            axes.barh(row, end - begin, left=begin, color=colour, height=0.8)
    axes.set_yticks(range(len(series)), [one.legend for one in series])
    for number, state in enumerate(states.values()):
        box.text(1.5 + number, box.height - 0.3, f"■ {state['text']}", color=COLOURS[state["color"]])
    return axes


def heatmap(box: Box, panel: Body, series: list[Series]) -> Axes:
    """Buckets are cumulative; Grafana shows the differences, too."""
    buckets = sorted(series, key=lambda one: float(one.legend))
    times = max((one.times for one in buckets), key=len)
    table = np.zeros((len(buckets), len(times)))
    for row, one in enumerate(buckets):
        table[row, np.searchsorted(times, one.times)] = one.values
    counts = np.diff(table, axis=0, prepend=0)
    axes = box.axes(LEFT_IN, TOP_IN, RIGHT_IN, 0.5)
    cells = np.ma.masked_less_equal(counts, 0)
    axes.pcolormesh(times, np.arange(len(buckets)), cells, cmap=panel["options"]["color"]["scheme"])
    unit = panel["options"]["yAxis"]["unit"]
    axes.set_yticks(range(len(buckets)), [shown(float(one.legend), unit) for one in buckets])
    box.text(LEFT_IN, box.height - 0.2, f"0 to {shown(counts.max(), 'short')}", size=7)
    return axes


def shown(value: float, unit: str) -> str:
    """A value as Grafana writes it in this unit."""
    if not math.isfinite(value):
        return "+Inf" if value > 0 else "NaN"
    if unit in {"percent", "percentunit"}:
        return f"{value * (100 if unit == 'percentunit' else 1):.3g}%"
    if unit == "s":
        scales = [(size, f" {name}") for size, name in DURATIONS]
    else:
        scales = [(1e9, " Bil"), (1e6, " Mil"), (1e3, " K")]
    size, name = next(((size, name) for size, name in scales if abs(value) >= size), (1, ""))
    return f"{value / size:.3g}{name}" + {"reqps": " req/s", "ops": " ops/s"}.get(unit, "")


DRAWN = {"timeseries": timeseries, "stat": stat, "state-timeline": state_timeline, "heatmap": heatmap}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recorded", type=Path, help="file of benchmarks.dashboards --record")
    parser.add_argument("directory", type=Path, help="for the pictures; is created")
    arguments = parser.parse_args()
    recording = Recording(**json.loads(arguments.recorded.read_text()))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    for path in sorted((CHART / "dashboards").glob("*.json")):
        picture = arguments.directory / f"{path.stem}.png"
        draw(json.loads(path.read_text()), recording).savefig(picture, dpi=100)
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
