"""The experiment of compression: what sparsity, four bits, distillation and pruning cost, at equal tokens.

    python -m benchmarks.compression --data train.txt --valid valid.txt --test test.txt --out runs/compression
    python -m benchmarks.compression ... --speed          # afterwards, on the machine that should be timed
    python -m benchmarks.compression ... --smoke --device cpu   # minutes: a tiny model, whether it runs

One GPU, and no package but torch, triton, numpy, tqdm, tokenizers, safetensors, pyyaml and matplotlib where
the text is plain (.zst needs zstandard). Each line and seed has its own folder; the same command goes on
where it was interrupted, --stop-after ends it in time (a round of pruning ends first), and table.md is
written anew after every line. Valid is scored to choose, test to report; protocol.py has the protocol.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.compression import protocol
from benchmarks.compression.protocol import LINES, Line
from moe_worker.config.model import parse_model_config
from moe_worker.files import write_text
from moe_worker.recipe.parse import Prune, Step, Training
from moe_worker.recipe.parse import Recipe as PruneRecipe
from moe_worker.recipe.report import decode_speed
from moe_worker.recipe.run import prune_step
from moe_worker.train import data
from moe_worker.train.corpus import ScoredText
from moe_worker.train.data import encode_documents, read_documents
from moe_worker.train.settings import TrainSettings
from moe_worker.train.trainer import TrainingRun


@dataclass
class Experiment:
    """Where everything is and how much is trained."""

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

    def left(self) -> float | None:
        return None if self.deadline is None else max(1.0, self.deadline - time.monotonic())

    def settings(self, line: Line, seed: int) -> TrainSettings:
        """What the trainer is told for a line."""
        folder, source = self.folder(line.name, seed), None
        if line.after is not None:
            source = self.folder(line.after, seed)
            config = source / "config.json"
        else:
            config = self.out / f"shape{'-lite' if line.lite else ''}.json"
            write_text(config, json.dumps(protocol.shape(self.args.smoke, line.lite)))
        shared = protocol.SMOKE if self.args.smoke else protocol.SHARED
        steps = round(self.steps * line.share)
        return TrainSettings(
            data=self.args.data,
            valid=self.args.valid,
            out=folder,
            config=config,
            start_from=source,
            tokenizer=self._tokenizer(),
            teacher=self.folder(line.teacher, seed) if line.teacher else None,
            steps=steps,
            seed=seed,
            device=self.args.device,
            evaluate_every=max(1, steps // 4),
            checkpoint_every=max(1, steps // 10),
            stop_after=self.left(),
            **{**shared, **line.settings},
        )

    def _tokenizer(self) -> Path:
        """One for all lines and seeds, trained once."""
        path = self.out / "tokenizer.json"
        if not path.exists():
            size = int(protocol.shape(self.args.smoke)["vocab_size"])
            tokenizer = data.train_tokenizer(read_documents(self.args.data), size)
            write_text(path, tokenizer.to_str())
        return path

    def run(self, line: Line, seed: int) -> dict[str, Any] | None:
        """The line's result, computed where it is not there yet; None where time is up."""
        result = self.folder(line.name, seed) / "result.json"
        if result.exists():
            kept: dict[str, Any] = json.loads(result.read_text())
            return kept
        began = time.monotonic()
        settings = self.settings(line, seed)
        if line.prune:
            settings = self._prune(line, seed, settings)
        run = TrainingRun(settings)
        run.run()
        if not (settings.out / "model.safetensors").exists():
            return None
        found = {"seconds": time.monotonic() - began, **self._measure(run, settings)}
        write_text(result, json.dumps(found, indent=2))
        return found

    def _prune(self, line: Line, seed: int, settings: TrainSettings) -> TrainSettings:
        """Cuts, with fine-tuning between the rounds; what is left to train is the last round."""
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
        recipe = PruneRecipe(
            source, settings.out.parent, self.args.data, self.args.valid, (), seed, self.args.device
        )
        last = prune_step(recipe, Step("prune", what, Training(**shared)), what, source, settings.out)
        return replace(
            settings, config=last / "config.json", start_from=last, steps=0, teacher=None, evaluate_every=1
        )

    def _measure(self, run: TrainingRun, settings: TrainSettings) -> dict[str, Any]:
        documents = read_documents(self.args.test)
        test = run.score(ScoredText(documents, encode_documents(run.corpus.tokenizer, documents)))
        valid = run.score(run.corpus.valid)
        config = parse_model_config(json.loads((settings.out / "config.json").read_text()), "config.json")
        return {
            "valid": valid.bits_per_byte if valid else None,
            "test": test.bits_per_byte if test else None,
            "bytes": (settings.out / "model.safetensors").stat().st_size,
            "parameters": config.parameters_total,
            "active": config.parameters_active,
        }


def add_speed(experiment: Experiment, threads: int) -> None:
    """Decode tokens a second of each line's first seed, median of three, on this machine's CPU."""
    for line in LINES:
        folder = experiment.folder(line.name, experiment.args.seeds[0])
        if not (folder / "result.json").exists():
            continue
        speeds = [decode_speed(folder, threads) for _ in range(3)]
        write_text(folder / "speed.json", json.dumps({"tokens_per_s": statistics.median(speeds)}))
        print(f"{line.title}: {statistics.median(speeds):.1f} tokens/s", flush=True)


def table(experiment: Experiment) -> str:
    """Markdown: medians over the seeds that are there, changes from the dense line."""
    rows, dense = [], None
    for line in LINES:
        if line.name == "half":
            continue
        found = [
            json.loads(path.read_text())
            for seed in experiment.args.seeds
            if (path := experiment.folder(line.name, seed) / "result.json").exists()
        ]
        if not found:
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
    parser.add_argument("--seeds", type=int, nargs="+", default=list(protocol.SEEDS))
    parser.add_argument("--lines", nargs="+", choices=[line.name for line in LINES], help="only these")
    parser.add_argument("--steps", type=int, help=f"of each line; {protocol.STEPS} unless --smoke")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stop-after", type=float, help="seconds after which to end, to go on later")
    parser.add_argument("--threads", type=int, default=2, help="of --speed")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--speed", action="store_true", help="only time decoding of what is there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = None if args.stop_after is None else time.monotonic() + args.stop_after
    experiment = Experiment(args, deadline)
    if args.speed:
        add_speed(experiment, args.threads)
    else:
        run_all(experiment)
    write_text(args.out / "table.md", table(experiment))
    print(table(experiment))


def run_all(experiment: Experiment) -> None:
    """Seed by seed, so that a whole table is there early; a line whose source is missing is left out."""
    chosen = experiment.args.lines or [line.name for line in LINES]
    for seed in experiment.args.seeds:
        for line in LINES:
            if line.name not in chosen:
                continue
            if experiment.left() == 1.0 or experiment.run(line, seed) is None:
                print("time is up; the same command goes on here", flush=True)
                return
            write_text(experiment.out / "table.md", table(experiment))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
