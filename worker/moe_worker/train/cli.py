"""`moe-worker train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moe_api.ranges import FiniteRange
from moe_worker.train.settings import (
    BALANCES,
    OPTIMIZERS,
    PRECISIONS,
    RANGES,
    SALIENCIES,
    SPARSITIES,
    TOLD,
    TrainSettings,
)

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_DEFAULT = TrainSettings


def _number(name: str) -> click.IntRange | FiniteRange:
    """The type of a number's option. The setting itself refuses what is so large that help need not say."""
    least, most, above = RANGES[name]
    told = most if most <= TOLD else None
    if TrainSettings.__annotations__[name] == "int":
        return click.IntRange(int(least), None if told is None else int(told))
    return FiniteRange(least, told, min_open=above)


@click.command(context_settings={"show_default": True})
@click.option("--config", type=_FILE, required=True, help="config.json of the model to train (deepseek_v3).")
@click.option(
    "--data",
    type=_FILE,
    required=True,
    help="Training text, plain or .zst; documents between NUL bytes, else between blank lines.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to."
)
@click.option("--valid", type=_FILE, help="Text to score along the way. Default: none.")
@click.option(
    "--start-from",
    type=_FOLDER,
    help="Checkpoint directory of the same shape to start from. Default: random weights.",
)
@click.option("--tokenizer", type=_FILE, help="tokenizer.json to use. Default: train one on the text.")
@click.option("--steps", type=_number("steps"), default=_DEFAULT.steps, help="Optimizer steps.")
@click.option("--batch", type=_number("batch"), default=_DEFAULT.batch, help="Windows in a step.")
@click.option("--window", type=_number("window"), default=_DEFAULT.window, help="Tokens in a window.")
@click.option(
    "--learning-rate",
    type=_number("learning_rate"),
    default=_DEFAULT.learning_rate,
    help="Peak learning rate.",
)
@click.option(
    "--weight-decay",
    type=_number("weight_decay"),
    default=_DEFAULT.weight_decay,
    help="Weight decay of the matrices.",
)
@click.option(
    "--optimizer",
    type=click.Choice(OPTIMIZERS),
    default=_DEFAULT.optimizer,
    help="muon: Muon for the matrices inside the layers, AdamW for the rest.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=_DEFAULT.precision,
    help="Of products; float32 is faster on a CPU without instructions for bfloat16.",
)
@click.option(
    "--clip-norm",
    type=_number("clip_norm"),
    default=_DEFAULT.clip_norm,
    help="Maximum norm of the gradient; 0: no limit.",
)
@click.option("--dropout", type=_number("dropout"), default=_DEFAULT.dropout, help="Dropout probability.")
@click.option("--warmup", type=_number("warmup"), default=_DEFAULT.warmup, help="Steps of rising rate.")
@click.option(
    "--decay-share",
    type=_number("decay_share"),
    default=_DEFAULT.decay_share,
    help="Share of the steps over which the rate falls to zero.",
)
@click.option(
    "--balance-speed",
    type=_number("balance_speed"),
    default=_DEFAULT.balance_speed,
    help="How far one step moves the routers' balancing bias.",
)
@click.option(
    "--sequence-balance",
    type=_number("sequence_balance"),
    default=_DEFAULT.sequence_balance,
    help="Weight of the loss term that balances the experts within each sequence; 0: none.",
)
@click.option(
    "--balance",
    type=click.Choice(BALANCES),
    default=_DEFAULT.balance,
    help="What balances experts: a bias that moves step by step, or a coefficient 1 / (load + eps).",
)
@click.option(
    "--balance-strength",
    type=_number("balance_strength"),
    default=_DEFAULT.balance_strength,
    help="The largest difference that the coefficient makes to a score.",
)
@click.option(
    "--expert-cost",
    type=_number("expert_cost"),
    default=_DEFAULT.expert_cost,
    help="Weight of the cost of experts, for a config.json with a routing.mass below 1.",
)
@click.option(
    "--mass-after",
    type=_number("mass_after"),
    default=_DEFAULT.mass_after,
    help="Share of the steps that train with all experts; then the mass falls to that of config.json, and "
    "the cost rises, over half of the rest.",
)
@click.option(
    "--domains",
    type=_FILE,
    help="Labels of the training documents, one a line: a hint for the routers. Default: none.",
)
@click.option(
    "--domain-share", type=_number("domain_share"), default=_DEFAULT.domain_share, help="Weight of that hint."
)
@click.option(
    "--sparsity",
    type=click.Choice(SPARSITIES),
    default=_DEFAULT.sparsity,
    help="Train the matrices inside the layers to keep 1 (s14) or 2 (s24) of four consecutive inputs.",
)
@click.option(
    "--dense-share",
    type=_number("dense_share"),
    default=_DEFAULT.dense_share,
    help="Share of the steps at the start that are dense.",
)
@click.option(
    "--shrink-share",
    type=_number("shrink_share"),
    default=_DEFAULT.shrink_share,
    help="Share of the steps after that in which masks tighten and weights may return; then masks are fixed.",
)
@click.option(
    "--saliency",
    type=click.Choice(SALIENCIES),
    default=_DEFAULT.saliency,
    help="What decides which weights are kept: |w|, or |w times its gradient|.",
)
@click.option(
    "--w4a8-share",
    type=_number("w4a8_share"),
    default=_DEFAULT.w4a8_share,
    help="Share of the steps at the end that compute with int4 weights and int8 activations; the checkpoint "
    "is then packed.",
)
@click.option("--group", type=_number("group"), default=_DEFAULT.group, help="Inputs that share a scale.")
@click.option(
    "--teacher", type=_FOLDER, help="Checkpoint directory of a model to learn from (bf16). Default: none."
)
@click.option(
    "--teacher-share",
    type=_number("teacher_share"),
    default=_DEFAULT.teacher_share,
    help="Share of the teacher in the loss.",
)
@click.option(
    "--teacher-top",
    type=_number("teacher_top"),
    default=_DEFAULT.teacher_top,
    help="Most likely tokens of the teacher kept on disk, 4 bytes each for every token of the text.",
)
@click.option(
    "--hidden-share",
    type=_number("hidden_share"),
    default=_DEFAULT.hidden_share,
    help="Weight of the distance to its last hidden states; it then runs during training.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the encoded text and teachers' tokens, which runs share. Default: that around --out.",
)
@click.option("--seed", type=_number("seed"), default=_DEFAULT.seed, help="Same seed, same run.")
@click.option(
    "--evaluate-every",
    type=_number("evaluate_every"),
    default=_DEFAULT.evaluate_every,
    help="Steps between scores.",
)
@click.option(
    "--checkpoint-every",
    type=_number("checkpoint_every"),
    default=_DEFAULT.checkpoint_every,
    help="Steps between states to resume from.",
)
@click.option(
    "--stop-after",
    type=_number("stop_after"),
    help="Seconds after which to save and end early, to resume later. Default: no limit.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default=_DEFAULT.device,
    help="Where to train; auto takes a GPU where there is one.",
)
def train(**settings: Any) -> None:
    """Train a model on text.

    Writes a checkpoint directory that `moe-worker serve` loads, metrics.jsonl, and loss.png. The same
    command goes on with an interrupted run.

    \b
    Example:
      moe-worker train --config examples/docs-moe/config.json --data train.txt.zst \\
          --valid valid.txt.zst --out runs/docs-moe
      moe-worker train ... --sparsity s14 --w4a8-share 0.2 --teacher runs/docs-moe --out runs/sparse
    """
    from moe_worker.train.trainer import TrainingRun  # noqa: PLC0415 - torch: seconds, not for --help

    run = TrainingRun(TrainSettings(**settings))
    folder = run.run()
    if not (folder / "model.safetensors").exists():
        click.echo(f"time was up: the same command goes on from the state in {folder}")
        return
    if run.final is not None:
        click.echo(f"{run.final.bits_per_byte:.4f} bits per byte on {run.settings.valid}")
    click.echo(f"written to {folder}")
