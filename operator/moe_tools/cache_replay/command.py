"""`moe replay --cache`: simulates a cache on a recorded trace, with each eviction policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from rich.table import Table

from moe_client import errors
from moe_client.console import console
from moe_client.console import show as show_table
from moe_client.errors import CommandError
from moe_tools.cache_replay import simulation
from moe_tools.cache_replay.document import CacheReplay, ReplicaUse, document
from moe_tools.cache_replay.recording import KeyTrace, read
from moe_tools.progress import bar, behind
from moe_tools.recorded import TraceError

_DEFAULT_SHARE: Final = 10
_SHORTEST_S: Final = 180.0
"""Shorter traces say nothing about replicas: work is counted by minute."""
_SCALED: Final = ("lru", "moe", simulation.BELADY)
"""Policies for which replicas are computed: a forecast over the whole trace takes seconds."""
_TITLES: Final = {
    "lru": "LRU",
    "lru2": "LRU-2",
    "s3fifo": "S3-FIFO",
    "sieve": "SIEVE",
    "arc": "ARC",
    "moe": "moe (adaptive LRU-K)",
    "belady": "Belady (knows the future)",
}


def replay(path: Path, capacity: float | None, *, as_json: bool) -> None:
    """Replays the trace at `path` and prints the result of every policy.

    Args:
        path: of the trace.
        capacity: of the cache, in keys; None: a tenth of the keys in the trace.
        as_json: whether to print a document for scripts.

    Raises:
        CommandError: the trace cannot be read.
    """
    if capacity is not None and not (capacity >= 1 and capacity.is_integer()):
        raise click.UsageError(f"--capacity is {capacity:g}; with --cache it is a whole number of 1 or more")
    try:
        recording = read(path)
    except TraceError as error:
        raise CommandError(str(error), errors.WRONG) from error
    made = document(_replayed(recording, None if capacity is None else int(capacity)))
    if as_json:
        click.echo(json.dumps(made, indent=2))
    else:
        _show(made)


def _replayed(recording: KeyTrace, capacity: int | None) -> CacheReplay:
    ceiling = simulation.ceiling(recording)
    unique = ceiling.lookups - ceiling.hits
    holds = capacity or max(1, unique // _DEFAULT_SHARE)
    requests, outcomes = len(recording.requests), {}
    with bar("policies", requests * len(simulation.NAMES)) as advance:
        for index, name in enumerate(simulation.NAMES):
            outcomes[name] = simulation.run(name, recording, holds, behind(advance, index * requests))
    return CacheReplay(recording, holds, outcomes, ceiling, _replicas(recording, outcomes))


def _replicas(
    recording: KeyTrace, outcomes: dict[str, simulation.CacheOutcome]
) -> dict[str, ReplicaUse] | None:
    times = [request.at_s for request in recording.requests]
    if not recording.blocks or max(times) - min(times) < _SHORTEST_S:
        return None
    # numpy and statsmodels take a second to import.
    from moe_tools.cache_replay import replicas  # noqa: PLC0415

    work: dict[str, Sequence[float]] = {
        "none": replicas.without_cache(recording),
        "outputs": replicas.with_outputs(recording),
    }
    for name in _SCALED:
        work[name] = replicas.with_prefixes(recording, outcomes[name].by_request)
    with bar("forecasting") as advance:
        return replicas.compare(recording, work, advance)


def _show(made: dict[str, Any]) -> None:
    on = console(highlight=False)
    unit = "blocks" if made["blocks"] else "objects"
    on.print(
        f"{made['trace']}: {made['requests']} requests, {made['lookups']} lookups of {made['keys']} {unit}; "
        f"the cache holds {made['capacity']}"
    )
    show_table(_table(made), on)
    if made["replicas"] is not None:
        show_table(_replica_table(made["replicas"]), on)


def _table(made: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    cost = "recomputed tokens" if made["blocks"] else "misses"
    for column in ("hits", "hit %", "LRU to Belady %", "evictions", cost):
        table.add_column(column, justify="right", no_wrap=True)
    for name, outcome in made["cache"].items():
        table.add_row(_TITLES[name], *_cells(outcome))
    table.add_row("no bound", *_cells({**made["ceiling"], "gap_closed": None}))
    return table


def _replica_table(made: dict[str, Any]) -> Table:
    """Replicas that the scaler orders for the work that is left after a cache."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("cache", no_wrap=True)
    for column in ("work left %", "mean replicas", "peak", "violated %"):
        table.add_column(column, justify="right", no_wrap=True)
    titles = {"none": "none", "outputs": "whole answers", **_TITLES}
    for name, use in made.items():
        table.add_row(
            titles[name],
            f"{100 * use['work_share']:.1f}",
            f"{use['mean']:.2f}",
            str(use["peak"]),
            f"{use['violated_share']:.1f}",
        )
    return table


def _cells(outcome: dict[str, Any]) -> list[str]:
    gap = outcome["gap_closed"]
    return [
        str(outcome["hits"]),
        f"{100 * outcome['block_hit_share']:.2f}",
        "-" if gap is None else f"{100 * gap:.1f}",
        str(outcome["evictions"]),
        str(outcome["recomputed_tokens"]),
    ]
