"""`moe-worker eval`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moe_worker.config.engine import FORMATS, KV_DTYPES

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("eval")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=_FILE,
    required=True,
    help="Text to score, plain or .zst; documents between NUL bytes, else between blank lines.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Tokens the model is given at most. Default: what the model allows.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="float32", show_default=True, help="auto, float32 or bfloat16.")
@click.option(
    "--format",
    "number_format",
    type=click.Choice(FORMATS),
    default="auto",
    show_default=True,
    help="Of weights (auto: as the checkpoint has them). Choose w4a8 for what was trained in W4A8.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(KV_DTYPES),
    default="auto",
    show_default=True,
    help="Of the KV cache (auto: as the engine has it).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a sentence.")
def evaluate(
    checkpoint: Path,
    data: Path,
    context: int | None,
    *,
    as_json: bool,
    **options: str,
) -> None:
    """Score a checkpoint on text, in bits per byte (lower is better).

    Every document is scored alone, in windows of --context tokens without overlap; the first begins with
    the begin-of-text token, a later one with the one token before it.

    \b
    Example:
      moe-worker eval examples/docs-moe --data test.txt.zst
    """
    from moe_worker.train.evaluate import score_checkpoint  # noqa: PLC0415 - torch: not for --help

    score = score_checkpoint(checkpoint, data, context=context, **options)
    if as_json:
        click.echo(json.dumps(score.to_json()))
    else:
        click.echo(
            f"{score.bits_per_byte:.4f} bits per byte ({score.documents:,} documents, "
            f"{score.utf8_bytes:,} bytes, {score.tokens:,} tokens)"
        )
