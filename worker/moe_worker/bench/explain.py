"""`moe-worker explain`."""

from pathlib import Path

import click

from moe_worker.config.engine import DTYPES, FORMATS, EngineOptions


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help=", ".join(DTYPES))
@click.option("--format", default="auto", show_default=True, help="Of weights: " + ", ".join(FORMATS))
@click.option(
    "--fusion",
    is_flag=True,
    help="Load the checkpoint and count what a decode step launches, against the eager model of transformers "
    "(if it is installed and the model has at most 2 billion parameters).",
)
def explain(model: Path, fusion: bool, **options: str) -> None:
    """Show which kernels would compute a checkpoint on this machine, and why.

    \b
    Example:
      moe-worker explain examples/docs-moe --format w4a8 --fusion
    """
    from moe_worker.engine.loading import explain_choice  # noqa: PLC0415 - torch: not for --help

    settings = EngineOptions(**options)  # type: ignore[arg-type]
    for line in explain_choice(model, settings):
        click.echo(line)
    if fusion:
        from moe_worker.bench.fusion import measure_fusion  # noqa: PLC0415 - as above

        click.echo(measure_fusion(model, settings))
