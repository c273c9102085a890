"""Throughput against latency, one point a batch size."""

from collections.abc import Sequence
from pathlib import Path

from moe_worker.bench.measure import Result


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Writes the picture; its format is the file's suffix."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second; only the end draws

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    latencies = [result.tpot_ms for result in results]
    throughputs = [result.decode_tokens_per_s for result in results]
    axes.plot(latencies, throughputs, marker="o")
    for result in results:
        axes.annotate(
            f"batch {result.batch}",
            (result.tpot_ms, result.decode_tokens_per_s),
            textcoords="offset points",
            xytext=(6, -10),
        )
    axes.set_xlabel("time per output token of a stream (ms)")
    axes.set_ylabel("output tokens a second, all streams")
    axes.set_xlim(0, 1.2 * max(latencies))  # room for the last name
    axes.set_ylim(0, 1.1 * max(throughputs))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
