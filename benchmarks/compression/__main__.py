"""The compression experiment: what sparsity, four bits, distillation and pruning cost, at equal training
tokens.

    python -m benchmarks.compression --data train.txt --valid valid.txt --test test.txt --out runs/compression
    python -m benchmarks.compression ... --speed          # afterwards, on the machine that should be timed
    python -m benchmarks.compression ... --smoke --device cpu   # minutes: a tiny model, whether it runs

One GPU, and no package but torch, triton, numpy, tqdm, tokenizers, safetensors, pyyaml, click and matplotlib
where the text is plain (.zst needs zstandard). Each variant and seed has its own folder. The same command
resumes after an interruption, --stop-after limits the time (a round of pruning finishes first), and table.md
is rewritten after every variant. Several processes may share an --out, each with its own GPU
(CUDA_VISIBLE_DEVICES): each takes the next free variant whose sources are done. --prepare only creates the
tokenizer and encodes the text, which takes minutes on few cores and no GPU. The valid score selects, the test
score is reported; protocol.py has the protocol.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import amount, not_negative, positive, run
from benchmarks.compression import protocol
from benchmarks.compression.protocol import LINES, Line
from moe_worker.config.model import parse_model_config
from moe_worker.files import locked, write_text
from moe_worker.recipe.parse import Prune, RecipeStep, Training
from moe_worker.recipe.parse import Recipe as PruneRecipe
from moe_worker.recipe.report import decode_speed
from moe_worker.recipe.run import prune_step
from moe_worker.train import data
from moe_worker.train.corpus import ScoredText, read_corpus
from moe_worker.train.data import encode_documents, read_documents
from moe_worker.train.settings import TrainSettings
from moe_worker.train.trainer import TrainingRun

SHORTEST = 15.0  # seconds; with less time left no variant starts


@dataclass
class Experiment:
    """Paths, and the amount of training."""

    args: argparse.Namespace
    deadline: float | None

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    @property
    def steps(self) -> int:
        given = self.args.steps
        return int(given or (protocol.SMOKE_STEPS if self.args.smoke else protocol.STEPS))

    def folder(self, line: str, seed: int) -> Path:
        return self.out / line / f"seed-{seed}"

    def left(self) -> float:
        """Remaining seconds of the experiment."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def settings(self, line: Line, seed: int) -> TrainSettings:
        """The trainer's settings for a variant."""
        folder, source = self.folder(line.name, seed), None
        config = self._shape(line.lite)
        if line.after is not None:
            source = self.folder(line.after, seed)
            config = source / "config.json"
        shared = protocol.SMOKE if self.args.smoke else protocol.SHARED
        steps = round(self.steps * line.share)
        return TrainSettings(
            data=self.args.data,
            valid=self.args.valid,
            out=folder,
            config=config,
            start_from=source,
            tokenizer=self.out / "tokenizer.json",
            cache=self.out,
            teacher=self.folder(line.teacher, seed) if line.teacher else None,
            steps=steps,
            seed=seed,
            device=self.args.device,
            evaluate_every=max(1, steps),  # at the end
            checkpoint_every=max(1, steps),  # and when time is up
            stop_after=max(0.0, self.left()),
            **{**shared, **line.settings},
        )

    def _shape(self, lite: bool) -> Path:
        return self.out / f"shape{'-lite' if lite else ''}.json"

    def prepare(self) -> None:
        """Data that all variants and seeds share, created by the first process: shapes, tokenizer, encoded
        text.
        """
        path, size = self.out / "tokenizer.json", int(protocol.shape(self.args.smoke)["vocab_size"])
        with locked(self.out / "lock"):
            for lite in (False, True):
                write_text(self._shape(lite), json.dumps(protocol.shape(self.args.smoke, lite)))
            if not path.exists():
                tokenizer = data.train_tokenizer(read_documents(self.args.data), size)
                write_text(path, tokenizer.to_str())
            read_corpus(self.settings(LINES[0], self.args.seeds[0]), size)

    def is_done(self, line: str, seed: int) -> bool:
        return (self.folder(line, seed) / "result.json").exists()

    def run(self, line: Line, seed: int) -> None:
        """Computes the result of a variant, unless the time is up first."""
        began = time.monotonic()
        settings = self.settings(line, seed)
        if line.prune:
            settings = self._prune(line, seed, settings)
        run = TrainingRun(settings)
        run.run()
        if not (settings.out / "model.safetensors").exists():
            return
        found = {**self._measure(run, settings), "seconds": time.monotonic() - began}
        write_text(settings.out / "result.json", json.dumps(found, indent=2))

    def _prune(self, line: Line, seed: int, settings: TrainSettings) -> TrainSettings:
        """Prunes, with fine-tuning between the rounds; the remaining training is the last round."""
        sizes = protocol.SMOKE_LITE if self.args.smoke else protocol.LITE
        shared = protocol.SMOKE if self.args.smoke else protocol.SHARED
        what = Prune(
            steps=settings.steps,
            teacher=settings.teacher,
            rounds=line.prune,
            batches=2 if self.args.smoke else 16,
            **sizes,
        )
        source = self.folder(line.after or "", seed)
        recipe = PruneRecipe(source, self.out, self.args.data, self.args.valid, (), seed, self.args.device)
        last = prune_step(recipe, RecipeStep("prune", what, Training(**shared)), what, source, settings.out)
        return replace(
            settings, config=last / "config.json", start_from=last, steps=0, teacher=None, evaluate_every=1
        )

    def _measure(self, run: TrainingRun, settings: TrainSettings) -> dict[str, Any]:
        documents = read_documents(self.args.test)
        test = run.score(ScoredText(documents, encode_documents(run.corpus.tokenizer, documents)))
        valid = run.final
        config = parse_model_config(json.loads((settings.out / "config.json").read_text()), "config.json")
        return {
            "valid": valid.bits_per_byte if valid else None,
            "test": test.bits_per_byte if test else None,
            "bytes": (settings.out / "model.safetensors").stat().st_size,
            "parameters": config.parameters_total,
            "active": config.parameters_active,
        }


def add_speed(experiment: Experiment, threads: int) -> None:
    """Tokens per second on this CPU, median of three, of each variant with weights of its first seed."""
    for line in LINES:
        folder = experiment.folder(line.name, experiment.args.seeds[0])
        if not (folder / "model.safetensors").exists():
            continue
        speeds = [decode_speed(folder, threads) for _ in range(3)]
        write_text(folder / "speed.json", json.dumps({"tokens_per_s": statistics.median(speeds)}))
        print(f"{line.title}: {statistics.median(speeds):.1f} tokens/s", flush=True)


def table(experiment: Experiment) -> str:
    """Markdown: medians over the available seeds, changes relative to the dense variant."""
    rows, dense = [], None
    for line in LINES:
        if line.name == "half":
            continue
        found = [
            json.loads(path.read_text())
            for seed in experiment.args.seeds
            if (path := experiment.folder(line.name, seed) / "result.json").exists()
        ]
        if not found or (dense is None and line.name != "dense"):
            rows.append((line.title, "not run", *[""] * 8))
            continue
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        dense = dense or middle
        speed = experiment.folder(line.name, experiment.args.seeds[0]) / "speed.json"
        rate = f"{json.loads(speed.read_text())['tokens_per_s']:.1f}" if speed.exists() else "not measured"
        rows.append(
            (
                line.title,
                f"{middle['valid']:.4f}",
                f"{(middle['valid'] / dense['valid'] - 1) * 100:+.2f} %",
                f"{middle['test']:.4f}",
                f"{(middle['test'] / dense['test'] - 1) * 100:+.2f} %",
                f"{middle['bytes'] / 1e6:.2f}",
                f"{middle['parameters']:,.0f}",
                f"{middle['active']:,.0f}",
                rate,
                f"{len(found)}",
            )
        )
    heads = ("line", "valid", "change", "test", "change", "MB on disk", "parameters", "active",
             "decode tok/s, CPU", "seeds")  # fmt: skip
    text = "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))
    kind = "SMOKE: a tiny model for a few steps; its numbers say nothing" if experiment.args.smoke else ""
    return f"{kind}\n\n{text}\n".lstrip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "valid", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=not_negative, nargs="+", default=list(protocol.SEEDS))
    parser.add_argument("--lines", nargs="+", choices=[line.name for line in LINES], help="only these")
    parser.add_argument("--steps", type=positive, help=f"of each line; {protocol.STEPS} unless --smoke")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stop-after", type=amount, help="seconds after which to end, to go on later")
    parser.add_argument("--threads", type=positive, default=2, help="of --speed")
    parser.add_argument(
        "--prepare", action="store_true", help="only create the tokenizer and encode the text"
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--speed", action="store_true", help="only time decoding of the available results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = None if args.stop_after is None else time.monotonic() + args.stop_after
    experiment = Experiment(args, deadline)
    if args.speed:
        add_speed(experiment, args.threads)
    else:
        experiment.prepare()
    if args.prepare:
        return
    failed = [] if args.speed else run_all(experiment)
    print(write_table(experiment))
    if failed:
        sys.exit(f"failed, see above: {', '.join(failed)}")


def write_table(experiment: Experiment) -> str:
    """Writes table.md and returns it."""
    with locked(experiment.out / "lock"):
        text = table(experiment)
        write_text(experiment.out / "table.md", text)
    return text


def run_all(experiment: Experiment) -> list[str]:
    """Seed by seed, so that a complete table exists early; returns the variants that failed.

    Skips variants that other processes have taken. The failure of one variant must not stop the others.
    """
    chosen = experiment.args.lines or [line.name for line in LINES]
    failed: list[str] = []
    while True:
        left = [
            (line, seed)
            for seed in experiment.args.seeds
            for line in LINES
            if line.name in chosen and line.name not in failed and not experiment.is_done(line.name, seed)
        ]
        if not left:
            return failed
        if experiment.left() < SHORTEST:
            print(f"time is up; the same command goes on with {left[0][0].name}", flush=True)
            return failed
        if not any(attempt(experiment, line, seed, failed) for line, seed in left):
            if not others_run(experiment):
                names = ", ".join(line.name for line, _ in left)
                print(f"left out, sources are missing: {names}", flush=True)
                return failed
            time.sleep(1)


def attempt(experiment: Experiment, line: Line, seed: int, failed: list[str]) -> bool:
    """Runs a variant if its sources are done and no other process has taken it; returns whether it did."""
    sources = [name for name in (line.after, line.teacher) if name is not None]
    if not all(experiment.is_done(name, seed) for name in sources):
        return False
    with locked(experiment.folder(line.name, seed) / "lock", wait=False) as taken:
        if not taken or experiment.is_done(line.name, seed):
            return False
        print(f"{line.title}, seed {seed}", flush=True)
        try:
            experiment.run(line, seed)
        except Exception:  # noqa: BLE001 - any error is printed, and reported again at the end
            traceback.print_exc()
            failed.append(line.name)
    write_table(experiment)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def others_run(experiment: Experiment) -> bool:
    """Whether another process computes a variant."""
    for path in experiment.out.glob("*/seed-*/lock"):
        with locked(path, wait=False) as free:
            if not free:
                return True
    return False


if __name__ == "__main__":
    run(main)
