"""Tokens per second of training a shape, by phase, with both ways of computing experts.

    python -m benchmarks.train_speed --config benchmarks/compression/config.json

Random tokens need the same products as text, and their routers are nearly balanced, as trained ones are. The
time before the first timed step is compilation. train/experts.py selects the way that training uses.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import amount, at_least_two, not_negative, positive, run
from moe_worker.config import read_model_config
from moe_worker.engine.loading import choose_device
from moe_worker.errors import WorkerError
from moe_worker.train import experts
from moe_worker.train.data import WindowSampler
from moe_worker.train.learner import Learner
from moe_worker.train.settings import TrainSettings

WAYS = {"grouped": 0, "at once": 1 << 30}
TIGHTENING: dict[str, Any] = {"sparsity": "s14", "dense_share": 0.0, "shrink_share": 1.0}
PHASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "masks tighten": TIGHTENING,
    "masks and int4": {**TIGHTENING, "shrink_share": 0.0, "w4a8_share": 1.0},
}


def measure(args: argparse.Namespace, way: str, phase: str) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    experts.GROUPED_FROM = WAYS[way]
    config, device = read_model_config(args.config), choose_device(args.device)
    settings = TrainSettings(
        data=Path(),
        out=Path(tempfile.gettempdir()),
        config=args.config,
        steps=args.warm + args.steps,
        batch=args.batch,
        window=args.window,
        dropout=args.dropout,
        **PHASES[phase],
    )
    tokens = torch.randint(2, config.vocab_size, (4 * args.batch * args.window,), device=device)
    sampler = WindowSampler(tokens.int(), args.window, args.batch, seed=0)
    learner = Learner(config, settings, device)
    began = started = time.perf_counter()
    for step in range(settings.steps):
        if step == args.warm:
            learner.check()  # waits for the device
            started = time.perf_counter()
        learner.step(step, sampler, None, measure=False)
    learner.check()
    rate = args.steps * args.batch * args.window / (time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return f"{phase:16} {way:8} {rate:12,.0f} {started - began:12.1f} {memory:10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="config.json of the model to train")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--window", type=at_least_two, default=1024)
    parser.add_argument("--dropout", type=amount, default=0.1)
    parser.add_argument("--steps", type=positive, default=30, help="timed")
    parser.add_argument("--warm", type=not_negative, default=10, help="steps before, not timed")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print(f"{'phase':16} {'experts':8} {'tokens/s':>12} {'warm-up s':>12} {'peak GB':>10}", flush=True)
    for phase in args.phases:
        for way in WAYS:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                print(measure(args, way, phase), flush=True)
            except WorkerError:  # of wrong arguments, for all lines
                raise
            except Exception:  # noqa: BLE001 - e.g. out of memory: the other lines are still useful
                traceback.print_exc()


if __name__ == "__main__":
    run(main)
