"""The outcome of a replay as tables for people."""

from __future__ import annotations

from typing import Any, Final

from rich.table import Table

from moe_client.console import console
from moe_client.console import show as show_table

_TITLES: Final = {
    "moe": "moe (forecast)",
    "static_peak": "static peak",
    "hpa": "HPA",
    "keda": "KEDA-like",
    "knative": "Knative-like",
    "perfect": "perfect forecast",
    "clairvoyant": "clairvoyant",
}


def show(made: dict[str, Any]) -> None:
    """Prints the document of a replay as two tables. "x best": GPU-hours over those of the clairvoyant."""
    on = console(highlight=False)
    unit = f"{made['interval_s'] / 60:g} min"
    on.print(
        f"{made['trace']}: {made['steps']} steps of {unit}; forecasts {made['horizon_s']:g} s ahead, scored "
        f"after {made['warm_up_steps']} steps"
    )
    show_table(_forecasts(made["forecast"]), on)
    service = made["service"]
    on.print(
        f"Simulated service: {service['capacity_per_gpu']:g} work/min a GPU, steps of "
        f"{service['gpus_per_replica']:g} GPU, started in {made['horizon_s']:g} s. "
        f"Knobs from the first {made['tune_until_steps']} steps, figures from the rest; "
        "best is the clairvoyant."
    )
    show_table(_policies(made["policies"]), on)


def _forecasts(forecast: dict[str, Any]) -> Table:
    table = Table("forecast", box=None)
    for column in ("WAPE %", "vs last value", "P90 pinball %", "P90 coverage %"):
        table.add_column(column, justify="right")
    rows = {forecast["method"]: forecast, **forecast["candidates"]}
    for name, score in rows.items():
        last = forecast["last_value_wape"]
        change = f"{100 * (score['wape'] / last - 1):+.1f} %" if last else ""
        table.add_row(
            name,
            _number(score["wape"], 2),
            change,
            _number(score["pinball_p90"], 3),
            _number(score["coverage_p90"], 1),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _policies(policies: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for column in ("violated %", "used %", "GPU-hours", "x best", "changes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("knobs")
    for name, result in policies.items():
        over = result["gpu_hours_over_clairvoyant"]
        table.add_row(
            _TITLES[name],
            f"{result['violated_share']:.2f}",
            f"{result['utilisation']:.1f}",
            f"{result['gpu_hours']:.1f}",
            "" if over is None else f"{over:.3f}",
            str(result["scale_events"]),
            ", ".join(f"{knob} {value:g}" for knob, value in result["knobs"].items()),
        )
    return table
