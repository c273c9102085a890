"""Settings of the adaptive eviction policy, chosen with one trace left out and judged on it.

`python -m benchmarks.eviction_settings TRACE:CAPACITY[,CAPACITY...] ...`: for each trace, the settings with
the largest mean part of the distance from LRU to Belady on the other traces (each trace counts once), and
what they reach on the trace that was left out, and what the settings of the policy reach there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from unittest import mock

from benchmarks.commands import file_with_numbers, run
from moe_api.caching import adaptive
from moe_tools.cache_replay import simulation
from moe_tools.cache_replay.recording import KeyTrace, read
from moe_tools.recorded import TraceError

WINDOWS = ((0.5, 1.0, 2.0), (1.0,), (0.25, 0.5, 1.0, 2.0, 4.0))
MEMORIES = (20_000, 60_000, 200_000)
HISTORIES = (1, 3)
NAMES = ("_WINDOWS", "_MEMORY", "_HISTORY")
"""Of `moe_api.caching.adaptive`."""
Settings = tuple[object, ...]
"""In the order of NAMES."""
PRESENT: Settings = tuple(getattr(adaptive, name) for name in NAMES)


def closed(recording: KeyTrace, capacities: list[int], settings: Settings) -> list[float]:
    """Part of the distance from LRU to Belady, in percent, for each capacity."""
    found = []
    with contextlib.ExitStack() as patched:
        for name, value in zip(NAMES, settings, strict=True):
            patched.enter_context(mock.patch.object(adaptive, name, value))
        for capacity in capacities:
            lru, ours, best = (
                simulation.run(policy, recording, capacity).hits for policy in ("lru", "moe", "belady")
            )
            found.append(100 * (ours - lru) / max(1, best - lru))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", nargs="+", type=file_with_numbers, metavar="TRACE:CAPACITY,...")
    traces = {path: (read(path), sizes) for path, sizes in parser.parse_args().trace}
    if len(traces) < 2:
        parser.error("one trace is left out, so give at least two")
    grid = [PRESENT, *itertools.product(WINDOWS, MEMORIES, HISTORIES)]
    results = {
        settings: {path: closed(*trace, settings) for path, trace in traces.items()} for settings in grid
    }
    for path in traces:
        others = [other for other in traces if other != path]

        def worth(settings: Settings, others: list[str] = others) -> float:
            return statistics.fmean(statistics.fmean(results[settings][other]) for other in others)

        chosen = max(grid, key=worth)
        print(f"{path.name}: windows, memory and history chosen on the others: {chosen}")
        for name, settings in (("chosen", chosen), ("present", PRESENT)):
            print(f"  {name:8}", ", ".join(f"{share:.1f} %" for share in results[settings][path]), flush=True)


if __name__ == "__main__":
    run(main, TraceError)
