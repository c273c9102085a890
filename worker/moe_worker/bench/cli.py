"""`moe-worker bench`."""

import json
from dataclasses import replace
from pathlib import Path

import click

from moe_api.ranges import FiniteRange
from moe_worker.bench.measure import Result, Workload, as_json, measure
from moe_worker.bench.plot import plot
from moe_worker.config.engine import DTYPES, FORMATS, EngineOptions
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.errors import SettingsError
from moe_worker.progress import bar
from moe_worker.sampling.parameters import MAX_TEMPERATURE

PICTURES = (".png", ".pdf", ".svg")
HEADINGS = ("batch", "prefill tok/s", "TTFT ms", "TPOT ms", "decode tok/s")


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Checkpoint directory.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 4, 16),
    show_default=True,
    help="Sequences at once; give it several times to compare.",
)
@click.option("--prompt", default=128, show_default=True, type=click.IntRange(1), help="Tokens of a prompt.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(3), help="Tokens generated.")
@click.option(
    "--rounds",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Rounds; the figures are medians over them.",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=FiniteRange(0, MAX_TEMPERATURE),
    help="0: the likeliest token each time (greedy); above 0 tokens are sampled.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help=", ".join(DTYPES))
@click.option(
    "--format",
    default="auto",
    show_default=True,
    help="Of weights: " + ", ".join(FORMATS) + " (auto: four bits if the checkpoint has them, else dense).",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch. Default: as `serve` would choose.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path),
    help="Write throughput against latency here. Default: no picture.",
)
@click.option("--json", "as_lines", is_flag=True, help="Print one JSON object a batch size, no table.")
def bench(  # noqa: PLR0913, PLR0917 - one for each option
    model: Path,
    batches: tuple[int, ...],
    prompt: int,
    tokens: int,
    rounds: int,
    temperature: float,
    picture: Path | None,
    as_lines: bool,
    **options: int | str | None,
) -> None:
    """Measure how fast a checkpoint runs on this machine.

    Random prompts go through the whole engine, scheduler and sampling included; gRPC is left out.

    \b
    Example:
      moe-worker bench --model examples/docs-moe --batch 1 --batch 8 --plot bench.png
    """
    if picture is not None:
        _check_picture(picture)
    asked = EngineOptions(context_length=prompt + tokens, prefix_cache=False, **options)  # type: ignore[arg-type]
    settings = replace(asked, max_batch_size=max(batches), prefill_tokens=max(prompt, asked.prefill_tokens))
    loaded = load(model, settings, progress=True)
    work = Workload(prompt, tokens, rounds, temperature)
    results = _measure_all(loaded, settings, work, sorted(set(batches)))
    for line in [json.dumps(as_json(result)) for result in results] if as_lines else _table(results):
        click.echo(line)
    if picture is not None:
        title = f"{model.resolve().name}, {loaded.device}, {prompt} tokens in, {tokens} out"
        plot(results, title, picture)
        click.echo(f"wrote {picture}", err=True)


def _check_picture(path: Path) -> None:
    """Before minutes are spent on measuring."""
    if not path.resolve().parent.is_dir():
        raise SettingsError(f"--plot {path}: directory {path.parent} does not exist; create it first")
    if path.suffix not in PICTURES:
        raise SettingsError(f"--plot {path}: the name must end in .png, .pdf or .svg")


def _measure_all(
    loaded: LoadedModel, options: EngineOptions, work: Workload, batches: list[int]
) -> list[Result]:
    total = len(batches) * (work.rounds + 1)
    with bar(total=total, desc="measuring", unit="round") as measured:
        return [measure(loaded, options, work, batch, measured.update) for batch in batches]


def _table(results: list[Result]) -> list[str]:
    rows = [
        (
            str(r.batch),
            f"{r.prefill_tokens_per_s:,.0f}",
            f"{r.ttft_ms:.1f}",
            f"{r.tpot_ms:.2f}",
            f"{r.decode_tokens_per_s:,.1f}",
        )
        for r in results
    ]
    return ["  ".join(f"{cell:>13}" for cell in row) for row in (HEADINGS, *rows)]
