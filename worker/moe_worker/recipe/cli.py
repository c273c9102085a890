"""`moe-worker compress`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads for measuring speed. Default: as `serve` would choose.",
)
@click.option("--check", is_flag=True, help="Only say whether the recipe can work.")
def compress(recipe: Path, threads: int | None, *, check: bool) -> None:
    """Make a checkpoint smaller by the steps of a recipe.

    Steps are prune, finetune, sparsify and quantize, in any order, four bits last. Each writes a checkpoint
    into its own folder in `out`, and the same command goes on where it was interrupted. At the end report.md
    says what every step did to bits per byte, bytes and speed.

    \b
    Example (paths are taken from the recipe's folder):
      model: runs/docs-moe          # a bf16 checkpoint directory
      out: runs/docs-moe-small
      data: train.txt
      valid: valid.txt
      training: {batch: 32, learning_rate: 2e-3}
      steps:
        - prune: {experts: 8, layers: 7, rounds: 3, steps: 900, teacher: runs/docs-moe}
        - sparsify: {pattern: s14, steps: 3000, saliency: gradient}
        - quantize: {steps: 600, group: 64}
    """
    from moe_worker.recipe.parse import read_recipe  # noqa: PLC0415 - torch: seconds, not for --help
    from moe_worker.recipe.report import describe_step, write_report  # noqa: PLC0415
    from moe_worker.recipe.run import check_recipe, run_steps  # noqa: PLC0415

    read = read_recipe(recipe)
    if check:
        check_recipe(read)
        click.echo(f"{recipe}: {len(read.steps)} steps that can work")
        return
    rows = []
    for step, folder, score in run_steps(read):
        click.echo(f"{step}: {score:.4f} bits per byte, in {folder}")
        rows.append(describe_step(step, folder, score, threads))
    click.echo(f"written {write_report(read.out, rows)}")
