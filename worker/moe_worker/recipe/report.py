"""Cost and savings of each step of a recipe: report.md, report.json, and two pictures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_worker.bench.measure import Workload, measure
from moe_worker.config.directory import read_checkpoint_config
from moe_worker.config.engine import EngineOptions
from moe_worker.config.quality import QUALITY_FILE
from moe_worker.engine.loading import load
from moe_worker.files import replacing, write_text
from moe_worker.models.safetensors import stored_tensors
from moe_worker.progress import transient_bar
from moe_worker.quant.matrix import DENSE, POSITIONS, SCALES, VALUES

KIND_OF = {
    "weight_packed": VALUES,
    "weight_s14_values": VALUES,
    "weight_s14_positions": POSITIONS,
    "weight_scale": SCALES,
    "weight_shape": SCALES,
}


@dataclass(frozen=True)
class ReportRow:
    """One step. Bytes are those of model.safetensors by kind; memory has the same."""

    step: str
    folder: str
    bits_per_byte: float
    parameters_total: int
    parameters_active: int
    nbytes: dict[str, int]
    decode_tokens_per_s: float

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.nbytes.values())


def describe_step(step: str, folder: Path, bits_per_byte: float, threads: int | None) -> ReportRow:
    """Reads the sizes of a checkpoint and measures its decode speed on this machine, batch size 1."""
    config = read_checkpoint_config(folder)
    kinds: Counter[str] = Counter({VALUES: 0, POSITIONS: 0, SCALES: 0, DENSE: 0})
    for name, tensor in stored_tensors(folder).items():
        kinds[KIND_OF.get(name.rpartition(".")[2], DENSE)] += tensor.nbytes
    speed = decode_speed(folder, threads)
    return ReportRow(
        step,
        str(folder),
        bits_per_byte,
        config.parameters_total,
        config.parameters_active,
        dict(kinds),
        speed,
    )


def decode_speed(folder: Path, threads: int | None) -> float:
    """Tokens per second on this machine's CPU: plain weights in float32, packed ones in W4A8."""
    packed = read_checkpoint_config(folder).storage is not None
    options = EngineOptions(
        device="cpu",
        dtype="float32",
        format="w4a8" if packed else "dense",
        context_length=64,
        max_batch_size=1,
        prefix_cache=False,
        threads=threads,
    )
    loaded = load(folder, options, progress=True)
    work = Workload(prompt=16, tokens=32, rounds=3)
    with transient_bar(total=work.rounds + 1, desc="measuring", unit="round") as measured:
        return measure(loaded, options, work, 1, measured.update).decode_tokens_per_s


def write_report(out: Path, rows: list[ReportRow]) -> Path:
    """Writes report.json, quality.png, bytes.png and report.md; returns the last."""
    write_text(out / "report.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    _plot(out, rows)
    write_text(out / "report.md", markdown(rows))
    quality = {
        "bits_per_byte": {"before": rows[0].bits_per_byte, "after": rows[-1].bits_per_byte},
        "text": "valid",
    }
    write_text(Path(rows[-1].folder) / QUALITY_FILE, json.dumps(quality, indent=2) + "\n")
    return out / "report.md"


def markdown(rows: list[ReportRow]) -> str:
    """The report's text."""
    first, lines = rows[0], []
    for row in rows:
        change = (row.bits_per_byte / first.bits_per_byte - 1) * 100
        kinds = " | ".join(f"{nbytes / 1e6:.2f}" for nbytes in row.nbytes.values())
        lines.append(
            f"| {row.step} | {row.bits_per_byte:.4f} | {change:+.2f} % | {row.parameters_total:,} "
            f"| {row.parameters_active:,} | {kinds} | {row.total / 1e6:.2f} | {first.total / row.total:.2f} "
            f"| {row.decode_tokens_per_s:,.1f} |"
        )
    return _REPORT.format(rows="\n".join(lines), folder=rows[-1].folder)


_REPORT = """# Compression report

Bits per byte on the validation text, by training's own pass with the weights as stored. Megabytes on disk and in
memory by what they are. Decode speed on this machine's CPU, one sequence: plain weights in float32, packed ones
as W4A8.

| step | bits per byte | change | parameters | active | MB values | MB positions | MB scales | MB dense rest | MB | ratio | decode tok/s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

![bits per byte after each step](quality.png)
![bytes by kind after each step](bytes.png)

The compressed checkpoint is in `{folder}`.
"""  # noqa: E501 - a table's row is one line


def _plot(out: Path, rows: list[ReportRow]) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second; only the end draws

    names = [row.step for row in rows]
    quality = Figure(figsize=(6, 3.5), layout="constrained")
    axes = quality.subplots()
    axes.plot(range(len(rows)), [row.bits_per_byte for row in rows], marker="o")
    axes.set_ylabel("bits per byte, validation text")
    sizes = Figure(figsize=(6, 3.5), layout="constrained")
    bars, bottoms = sizes.subplots(), [0.0] * len(rows)
    for kind in rows[0].nbytes:
        heights = [row.nbytes[kind] / 1e6 for row in rows]
        bars.bar(range(len(rows)), heights, bottom=bottoms, label=kind)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    bars.set_ylabel("MB")
    bars.legend()
    for figure, plot, name in ((quality, axes, "quality.png"), (sizes, bars, "bytes.png")):
        plot.set_xticks(range(len(rows)), names)
        with replacing(out / name) as beside:
            figure.savefig(beside, dpi=120, format="png")
