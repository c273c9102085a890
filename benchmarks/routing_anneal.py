"""Training with all experts first and with fewer later, at equal tokens: small enough for a CPU.

    python -m benchmarks.routing_anneal --corpus DIR --out runs/anneal --steps 300 [--json]

The model of examples/docs-routing with one level, as `fixed` of benchmarks/routing.py, and every twelfth
document of train.txt.zst. All runs share the first half of the steps, with six experts. Then `fixed` goes on
like that; the others lower the mass over a quarter of the steps (`moe-worker train --mass-after 0.5`), with
or without a cost of experts. Same weights, tokens and order of windows for all. Scored on the first 8,000
characters of every source in valid.txt.zst, at several masses.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import trange

from benchmarks.routing import (
    DEVICE,
    ONE_LEVEL,
    SHAPE,
    WINDOW,
    score,
    scored_documents,
    set_mass,
    tokenizer_of,
    training_text,
)
from moe_worker.train.learner import Learner
from moe_worker.train.settings import TrainSettings
from moe_worker.train.trainer import TrainingRun

AFTER = 0.5
EVERY, CHARACTERS = 12, 8000
# Mass and weight of the cost that each run ends with.
RUNS = {"fixed": (1.0, 0.0), "annealed": (0.55, 0.0), "annealed-cost": (0.6, 0.005)}
MASSES = (0.7, 0.6, 0.55, 0.5)


@click.command(help=__doc__)
@click.option("--corpus", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(8), default=300)
@click.option("--batch", type=click.IntRange(1), default=16)
@click.option("--seed", default=0)
@click.option("--json", "as_json", is_flag=True)
def main(corpus: Path, out: Path, steps: int, batch: int, seed: int, as_json: bool) -> None:
    torch.set_num_threads(1)
    text, _ = training_text(corpus, out, EVERY)
    config = out / "shape.json"
    routing = {"levels": ONE_LEVEL, "mass": MASSES[-1]}  # each run sets its own before the cut begins
    config.write_text(json.dumps({**json.loads(SHAPE.read_text()), "routing": routing}))
    settings = TrainSettings(
        data=text, out=out / "run", config=config, tokenizer=tokenizer_of(out, text), steps=steps,
        batch=batch, window=WINDOW, dropout=0.0, warmup=20, balance_speed=4e-3, seed=seed, cache=out,
        device=DEVICE, precision="float32" if DEVICE == "cpu" else "bfloat16", mass_after=AFTER,
    )  # fmt: skip
    for row in rows(settings):
        click.echo(json.dumps(row) if as_json else "  ".join(f"{key} {_text(row[key])}" for key in row))


def rows(settings: TrainSettings) -> Iterator[dict[str, Any]]:
    """One for each run and mass that it is served with."""
    run, half = TrainingRun(settings), int(settings.steps * AFTER)
    documents = scored_documents(settings.shared, CHARACTERS)
    train(run, run.learner, range(half))
    for name, (mass, cost) in RUNS.items():
        learner = copy.deepcopy(run.learner)
        learner.settings = replace(settings, expert_cost=cost)
        set_mass(learner.model, mass)
        learner.model.specialise(cost, 0.0)
        train(run, learner, range(half, settings.steps))
        learner.model.eval()
        for served in (1.0, *MASSES) if name == "fixed" else MASSES:
            set_mass(learner.model, served)
            found = score(learner.model, documents)
            yield {
                "run": name, "mass": served, "trained_mass": mass, "cost": cost,
                "tokens": settings.steps * settings.batch * settings.window,
                "bits_per_byte": found.bits_per_byte, "activated": found.activated,
            }  # fmt: skip


def train(run: TrainingRun, learner: Learner, steps: range) -> None:
    """Computes `steps` of `run` with `learner`."""
    for step in trange(steps.start, steps.stop, mininterval=30):
        learner.step(step, run.sampler, None, measure=False)
    learner.check()


def _text(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
