"""Trains small models that route differently on the same text, and compares them.

    TORCHDYNAMO_DISABLE=1 python -m benchmarks.routing train --corpus DIR --out runs/routing --jobs 14 \\
        --seed 0 --seed 1 --seed 2 [--run levels]
    cat runs/routing/*/rows.jsonl > rows.jsonl
    python -m benchmarks.routing plot rows.jsonl --out docs/routing-mass.svg

Protocol: every third document of train.txt.zst, one tokenizer (of every ninth), equal tokens (STEPS x BATCH
x WINDOW) in the same order for runs of one seed; scored on 24 kB of every source in valid.txt.zst, at most
6 kB of a document. The capability matrix and the loads for the balance while serving are of as much training
text. Compiling takes longer than these runs, so TORCHDYNAMO_DISABLE=1 leaves it out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.docs_sources import source_of
from moe_worker.config import ModelConfig
from moe_worker.files import write_text
from moe_worker.moe.balance import nudge, utilisation
from moe_worker.moe.capability import CapabilityMatrix
from moe_worker.train.data import BOS_ID, read_documents, read_tokenizer
from moe_worker.train.model import TrainingModel
from moe_worker.train.names import load_checkpoint_tensors
from moe_worker.train.score import cut_windows
from moe_worker.train.settings import TrainSettings
from moe_worker.train.state import read_tensors
from moe_worker.train.trainer import TrainingRun

STEPS, BATCH, WINDOW = 400, 48, 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Path("examples/docs-routing/config.json")
ONE_LEVEL = [{"groups": 4, "keep": 3, "best": 2}]
WIDE = [{"groups": 4, "keep": 3, "best": 2}, {"groups": 8, "keep": 4, "best": 2}]
MASSES = (1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
# Margin of the coefficient while serving, and the rounds of measuring loads that it is spent in.
MARGINS = ((0.0, 1), (0.02, 1), (0.05, 1), (0.1, 1), (0.2, 1), (0.05, 8), (0.1, 8), (0.2, 8))
RANKS = 4
ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Variant:
    """What one run has different: fields of config.json's `routing`, of the settings, and of config.json."""

    routing: dict[str, Any]
    settings: dict[str, Any]
    hint: bool = False
    shape: dict[str, Any] = field(default_factory=dict)


_LEVELS = json.loads(SHAPE.read_text())["routing"]["levels"]
_LATER = {"mass_after": 0.5}
# Runs with all experts that are scored at all masses.
CURVES = ("fixed", "levels", "hint")
RUNS = {
    "fixed": Variant({"levels": ONE_LEVEL}, {}),
    "annealed": Variant({"levels": ONE_LEVEL, "mass": 0.55}, _LATER),
    "annealed-0.7": Variant({"levels": ONE_LEVEL, "mass": 0.7}, _LATER),
    "annealed-0.8": Variant({"levels": ONE_LEVEL, "mass": 0.8}, _LATER),
    "annealed-late": Variant({"levels": ONE_LEVEL, "mass": 0.65}, {"mass_after": 0.75}),
    "annealed-8": Variant({"levels": ONE_LEVEL, "mass": 0.6}, _LATER, shape={"num_experts_per_tok": 8}),
    "levels-annealed-0.7": Variant({"levels": _LEVELS, "mass": 0.7}, _LATER),
    "levels": Variant({"levels": _LEVELS}, {}),
    "levels-annealed": Variant({"levels": _LEVELS, "mass": 0.55}, _LATER),
    "hint": Variant({"levels": _LEVELS}, {"domain_share": 0.05}, hint=True),
    "hint-annealed": Variant({"levels": _LEVELS, "mass": 0.55}, _LATER | {"domain_share": 0.05}, hint=True),
    "hint-0.2": Variant({"levels": _LEVELS, "mass": 0.55}, _LATER | {"domain_share": 0.2}, hint=True),
    "balance-3x": Variant({"levels": ONE_LEVEL}, {"balance_speed": 0.012}),
    "coefficient-0.5": Variant(
        {"levels": ONE_LEVEL}, {"balance": "coefficient", "balance_strength": 0.5, "sequence_balance": 0.0}
    ),
    "unbalanced": Variant({"levels": ONE_LEVEL}, {"balance_speed": 0.0, "sequence_balance": 0.0}),
    "hint-0.5": Variant({"levels": _LEVELS, "mass": 0.55}, _LATER | {"domain_share": 0.5}, hint=True),
    "hint-wide": Variant({"levels": WIDE, "mass": 0.55}, _LATER | {"domain_share": 0.1}, hint=True),
    "annealed-early": Variant({"levels": ONE_LEVEL, "mass": 0.55}, {"mass_after": 0.25}),
    "dynamic": Variant({"levels": ONE_LEVEL, "mass": 0.75}, {"expert_cost": 0.02}),
    "coefficient": Variant({"levels": ONE_LEVEL}, {"balance": "coefficient", "sequence_balance": 0.0}),
    "balance-10x": Variant({"levels": ONE_LEVEL}, {"balance_speed": 0.04}),
}


@click.group()
def main() -> None:
    """Compare ways of routing."""


@main.command()
@click.option("--corpus", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--run", "names", multiple=True, type=click.Choice(tuple(RUNS)))
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), default=(0,))
@click.option("--jobs", type=click.IntRange(1), default=1, help="Runs at once, each a process of one thread.")
@click.option("--steps", type=click.IntRange(1), default=STEPS)
@click.option("--batch", type=click.IntRange(1), default=BATCH)
@click.option("--margins/--no-margins", default=True, help="Score the margin of runs with all experts, too.")
def train(
    corpus: Path, out: Path, names: tuple[str, ...], seeds: tuple[int, ...], jobs: int, **options: Any
) -> None:
    """Train runs, by default all of them, and score each at its end into OUT/RUN-SEED/rows.jsonl.

    The first seed of all runs comes first.
    """
    began, (text, _) = time.monotonic(), training_text(corpus, out)
    tokenizer_of(out, text)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        runs = {
            pool.submit(train_run, out, name, seed, **options): f"{name}-{seed}"
            for seed in seeds
            for name in names or RUNS
        }
        for done in as_completed(runs):
            click.echo(f"{time.monotonic() - began:5.0f} s  {runs[done]}  {done.result()}")


def train_run(out: Path, name: str, seed: int, *, steps: int, batch: int, margins: bool) -> str:
    """Trains and scores one run; returns what to tell of it."""
    torch.set_num_threads(1)
    began, variant, folder = time.monotonic(), RUNS[name], out / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "shape.json"
    config.write_text(
        json.dumps({**json.loads(SHAPE.read_text()), **variant.shape, "routing": variant.routing})
    )
    values: dict[str, Any] = {"balance_speed": 4e-3, **variant.settings}
    run = TrainingRun(
        TrainSettings(
            data=out / "train.txt", out=folder, config=config, tokenizer=out / "tokenizer.json", steps=steps,
            batch=batch, window=WINDOW, dropout=0.0, warmup=20, seed=seed, cache=out, device=DEVICE,
            domains=out / "labels.txt" if variant.hint else None, **values,
        )
    )  # fmt: skip
    ready = time.monotonic()
    run.run()
    trained = time.monotonic()
    found = list(rows(out, folder.name, margins=margins))
    write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in found))
    return (
        f"{found[0]['bits_per_byte']:.4f} bits per byte; ready {ready - began:.1f} s, trained "
        f"{trained - ready:.1f} s, scored {time.monotonic() - trained:.1f} s"
    )


def training_text(corpus: Path, out: Path, every: int = 3) -> tuple[Path, Path]:
    """Every `every`-th document and labels of their sources; the text that is scored lies next to them."""
    out.mkdir(parents=True, exist_ok=True)
    text, labels = out / "train.txt", out / "labels.txt"
    if not labels.exists():
        documents = read_documents(corpus / "train.txt.zst")[::every]
        text.write_text("\0".join(documents))
        (out / "valid.txt").write_text("\0".join(read_documents(corpus / "valid.txt.zst")))
        labels.write_text("\n".join(map(source_of, documents)))
    return text, labels


def tokenizer_of(out: Path, text: Path) -> Path:
    """Trained on every third document of `text`, once."""
    from moe_worker.train.data import train_tokenizer  # noqa: PLC0415 - only the first run needs it

    path = out / "tokenizer.json"
    if not path.exists():
        size = json.loads(SHAPE.read_text())["vocab_size"]
        path.write_text(train_tokenizer(read_documents(text)[::3], size).to_str())
    return path


@dataclass
class Scored:
    """A model on some documents: their domains and choices, int64 [T, K], layer by layer."""

    nats: float
    utf8_bytes: int
    tokens: int
    choices: list[tuple[str, list[Tensor]]]

    @property
    def bits_per_byte(self) -> float:
        """As moe_worker.train.score has it."""
        return self.nats / float(np.log(2)) / self.utf8_bytes

    @property
    def activated(self) -> float:
        """Routed experts of a token, mean over layers."""
        return float(np.mean([float((x >= 0).sum(1).float().mean()) for x in self._layers()]))

    def loads(self, experts: int) -> list[Tensor]:
        """Tokens of each expert, of every layer."""
        return [torch.bincount(x[x >= 0].flatten(), minlength=experts).float() for x in self._layers()]

    def exchange(self, place_E: Tensor, hidden: int) -> float:
        """Bytes that a token sends to other ranks of four and gets back in a layer, in float32.

        Each document is on the rank that has most of its experts.
        """
        total = 0.0
        for _, layers in self.choices:
            for chosen_TK in layers:
                ranks_TK = torch.where(chosen_TK < 0, RANKS, place_E[chosen_TK])
                uses_TR = torch.zeros(len(chosen_TK), RANKS + 1).scatter_(1, ranks_TK, 1.0)[:, :RANKS]
                own = int(uses_TR.sum(0).argmax())
                total += float(uses_TR.sum() - uses_TR[:, own].sum())
        return total * hidden * 4 * 2 / (self.tokens * len(self.choices[0][1]))

    def _layers(self) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*(layers for _, layers in self.choices), strict=True)]


def load(folder: Path) -> TrainingModel:
    """The trained model of a run."""
    from moe_worker.config import read_model_config  # noqa: PLC0415

    model = TrainingModel(read_model_config(folder / "config.json"), 0.0)
    with torch.no_grad():
        load_checkpoint_tensors(model, read_tensors(folder / "model.safetensors"))
    return model.to(DEVICE).eval()


def set_mass(model: TrainingModel, mass: float) -> None:
    """Every router cuts there from now on."""
    for mixture in model.mixtures:
        mixture.config = with_mass(mixture.config, mass)


def with_mass(config: ModelConfig, mass: float) -> ModelConfig:
    """The configuration with another mass."""
    return replace(config, moe=replace(config.moe, routing=replace(config.moe.routing, mass=mass)))


@torch.no_grad()
def score(model: TrainingModel, documents: list[tuple[str, str, np.ndarray]]) -> Scored:
    """Scores (domain, text, tokens) and records where the tokens went."""
    chosen: list[Tensor] = []
    for mixture in model.mixtures:
        _record(mixture, chosen)
    found = Scored(0.0, 0, 0, [])
    for domain, text, tokens in documents:
        layers: list[list[Tensor]] = [[] for _ in model.mixtures]
        for _, windows in groupby(cut_windows(tokens, WINDOW, BOS_ID), len):
            chosen.clear()
            row = torch.from_numpy(np.stack([*windows]).astype(np.int64)).to(DEVICE)
            found.nats += float(model(row[:, :-1], row[:, 1:])) * row[:, 1:].numel()
            for layer, choice in zip(layers, chosen, strict=True):
                layer.append(choice.cpu())
        found.utf8_bytes += len(text.encode())
        found.tokens += len(tokens)
        found.choices.append((domain, [torch.cat(parts) for parts in layers]))
    for mixture in model.mixtures:
        del mixture.route
    return found


def _record(mixture: Any, chosen: list[Tensor]) -> None:
    plain = type(mixture).route

    def route(x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = plain(mixture, x_BTD)
        chosen.append(result[0].flatten(0, 1))
        return result

    mixture.route = route


def documents_of(
    text: Path, out: Path, most: int = 24_000, of_one: int = 6_000
) -> list[tuple[str, str, np.ndarray]]:
    """Of every source `most` characters of a text, `of_one` of a document: (domain, text, tokens)."""
    tokenizer = read_tokenizer(out / "tokenizer.json")
    return [
        (domain, part, np.asarray(tokenizer.encode(part, add_special_tokens=False).ids, np.int32))
        for domain, part in parts_of(text, most, of_one)
    ]


def parts_of(text: Path, most: int, of_one: int) -> Iterator[tuple[str, str]]:
    """The source of each document and its beginning, until there is enough of each source."""
    taken = dict[str, int]()
    for document in read_documents(text):
        domain = source_of(document)
        part = document[: min(of_one, most - taken.get(domain, 0))]
        if part:
            taken[domain] = taken.get(domain, 0) + len(part)
            yield domain, part


@main.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--most", type=click.IntRange(1), default=24_000, help="Characters of each source.")
@click.option("--of-one", type=click.IntRange(1), default=6_000, help="Characters of a document.")
def sample(text: Path, out: Path, most: int, of_one: int) -> None:
    """Write as much text of each source as runs are scored on, for `moe-worker routing` and `eval`."""
    write_text(out, "\0".join(part for _, part in parts_of(text, most, of_one)))


def fit(learned: Scored, scored: Scored, experts: int) -> dict[str, float]:
    """Learns the matrix on training text, and compares the half of the experts that it names with the choices
    on held-out documents. `fit_bound`: of a matrix that was learned on these documents themselves.
    """
    names = sorted({domain for domain, _ in scored.choices})
    matrix, bound = _matrix(learned, names, experts), _matrix(scored, names, experts)
    right, hits, best, seen = [], 0.0, 0.0, 0.0
    for domain, layers in scored.choices:
        counts_LE, index = _counts(layers, experts), names.index(domain)
        right.append(matrix.infer(counts_LE) == index)
        hits += float(counts_LE.gather(1, matrix.named()[:, index]).sum())
        best += float(counts_LE.gather(1, bound.named()[:, index]).sum())
        seen += float(counts_LE.sum())
    return {"fit": hits / seen, "fit_bound": best / seen, "domains_inferred": float(np.mean(right))}


def _matrix(scored: Scored, names: list[str], experts: int) -> CapabilityMatrix:
    matrix = CapabilityMatrix(len(scored.choices[0][1]), len(names), experts, experts // 2)
    for domain, layers in scored.choices:
        matrix.observe(names.index(domain), _counts(layers, experts), len(layers[0]))
    return matrix


def _counts(layers: list[Tensor], experts: int) -> Tensor:
    return torch.stack([torch.bincount(x[x >= 0], minlength=experts) for x in layers])


def rows(out: Path, run: str, *, margins: bool = True) -> Iterator[dict[str, Any]]:
    """One for each run and mass, then those of the balance at serving."""
    seen, held_out = documents_of(out / "train.txt", out), documents_of(out / "valid.txt", out)
    for folder in sorted(path.parent for path in out.glob(f"{run}/model.safetensors")):
        model = load(folder)
        config, dynamic = model.config, model.config.moe.routing.is_dynamic
        experts, hidden = config.moe.routed, config.hidden_size
        place_E = torch.arange(experts) * RANKS // experts
        name = folder.name.rsplit("-", 1)[0]
        for mass in MASSES if name in CURVES or dynamic else (1.0,):
            set_mass(model, mass)
            found = score(model, held_out)
            used = [*map(utilisation, found.loads(experts))]
            yield {
                "run": folder.name, "mass": mass, "trained_mass": config.moe.routing.mass,
                "bits_per_byte": found.bits_per_byte, "activated": found.activated,
                "exchange_bytes": found.exchange(place_E, hidden),
                "utilisation": min(used), "utilisation_mean": float(np.mean(used)),
                **fit(score(model, seen), found, experts),
            }  # fmt: skip
        set_mass(model, 1.0)
        if margins and not dynamic and name not in CURVES[1:]:
            yield from balanced(model, seen, held_out, folder.name)


def balanced(
    model: TrainingModel, seen: list[Any], held_out: list[Any], name: str
) -> Iterator[dict[str, Any]]:
    """The coefficient at serving: loads are of `seen`, the figures of `held_out`."""
    plain = [mixture.bias_E.clone() for mixture in model.mixtures]
    for margin, rounds in MARGINS:
        for _ in range(rounds):
            loads = score(model, seen).loads(model.config.moe.routed)
            for mixture, load_E in zip(model.mixtures, loads, strict=True):
                mixture.bias_E.add_(nudge(load_E, 1.0, margin / rounds).to(mixture.bias_E))
        found = score(model, held_out)
        used = [*map(utilisation, found.loads(model.config.moe.routed))]
        yield {
            "run": name, "margin": margin, "rounds": rounds, "bits_per_byte": found.bits_per_byte,
            "utilisation": min(used), "utilisation_mean": float(np.mean(used)),
        }  # fmt: skip
        for mixture, bias_E in zip(model.mixtures, plain, strict=True):
            mixture.bias_E.copy_(bias_E)


@main.command()
@click.option("--out", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--run", "name", default="*", help="Folder of one run.")
@click.option("--json", "as_json", is_flag=True)
def report(out: Path, name: str, as_json: bool) -> None:
    """Score all runs of a folder."""
    torch.set_num_threads(1)
    for row in rows(out, name):
        text = (
            json.dumps(row)
            if as_json
            else "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        )
        click.echo(text)


@main.command()
@click.argument("lines", type=click.File())
@click.option("--out", type=click.Path(path_type=Path), required=True)
def plot(lines: Any, out: Path) -> None:
    """Draw quality over experts a token, from the lines of `report --json`; seeds are averaged."""
    import matplotlib as mpl  # noqa: PLC0415 - only here

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "moe-operator"
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the choice of what draws

    curves: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for row in map(json.loads, lines):
        if "mass" in row:
            masses = curves.setdefault(row["run"].rsplit("-", 1)[0], {})
            masses.setdefault(row["mass"], []).append((row["activated"], row["bits_per_byte"]))
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, masses in curves.items():
        if len(masses) > 1:
            points = [np.mean(seeds, axis=0) for seeds in masses.values()]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="routed experts a token", ylabel="bits per byte", title="mass 1 (right) to 0.5 (left)")
    axes.legend()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
