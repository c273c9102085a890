"""Trains small models that route differently on the same text, and compares them.

    python -m benchmarks.routing train --corpus DIR --out runs/routing [--run levels]
    python -m benchmarks.routing report --out runs/routing --json > rows.jsonl
    python -m benchmarks.routing plot rows.jsonl --out docs/routing-mass.svg

Protocol: every third document of train.txt.zst, one tokenizer (of every ninth), equal tokens (STEPS x BATCH
x WINDOW) in the same order for runs of one seed; scored on the first 24 kB of every source in valid.txt.zst.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.docs_sources import source_of
from moe_worker.config import ModelConfig
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
MASSES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
RANKS = 4


@dataclass(frozen=True)
class Variant:
    """What one run has different: fields of config.json's `routing`, and of the settings."""

    routing: dict[str, Any]
    settings: dict[str, Any]
    hint: bool = False


_OWN = json.loads(SHAPE.read_text())["routing"]
RUNS = {
    "fixed": Variant({"levels": ONE_LEVEL}, {}),
    "dynamic": Variant({"levels": ONE_LEVEL, "mass": _OWN["mass"]}, {"expert_cost": 0.02}),
    "dynamic-cost": Variant({"levels": ONE_LEVEL, "mass": _OWN["mass"]}, {"expert_cost": 0.1}),
    "levels": Variant(_OWN, {"expert_cost": 0.02}),
    "levels-hint": Variant(_OWN, {"expert_cost": 0.02, "domain_share": 0.05}, hint=True),
    "unbalanced": Variant({"levels": ONE_LEVEL}, {"balance_speed": 0.0, "sequence_balance": 0.0}),
    "coefficient": Variant({"levels": ONE_LEVEL}, {"balance": "coefficient", "sequence_balance": 0.0}),
}


@click.group()
def main() -> None:
    """Compare ways of routing."""


@main.command()
@click.option("--corpus", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--run", "names", multiple=True, type=click.Choice(tuple(RUNS)))
@click.option("--seed", default=0)
def train(corpus: Path, out: Path, names: tuple[str, ...], seed: int) -> None:
    """Train runs, by default all of them."""
    torch.set_num_threads(1)
    text, labels = training_text(corpus, out)
    for name in names or RUNS:
        variant, folder = RUNS[name], out / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "shape.json"
        config.write_text(json.dumps({**json.loads(SHAPE.read_text()), "routing": variant.routing}))
        settings = TrainSettings(
            data=text, out=folder, config=config, tokenizer=tokenizer_of(out, text), steps=STEPS, batch=BATCH,
            window=WINDOW, dropout=0.0, warmup=20, balance_speed=variant.settings.get("balance_speed", 4e-3),
            domains=labels if variant.hint else None, seed=seed, cache=out, device=DEVICE,
            **{key: value for key, value in variant.settings.items() if key != "balance_speed"},
        )  # fmt: skip
        TrainingRun(settings).run()


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
        for window in cut_windows(tokens, WINDOW, BOS_ID):
            chosen.clear()
            row = torch.from_numpy(window.astype(np.int64)).unsqueeze(0).to(DEVICE)
            found.nats += float(model(row[:, :-1], row[:, 1:])) * (row.shape[1] - 1)
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


def scored_documents(out: Path, most: int = 24_000) -> list[tuple[str, str, np.ndarray]]:
    """Of every source the first `most` characters."""
    tokenizer, taken, found = read_tokenizer(out / "tokenizer.json"), dict[str, int](), []
    for text in read_documents(out / "valid.txt"):
        domain = source_of(text)
        if taken.get(domain, 0) >= most:
            continue
        part = text[: most - taken.get(domain, 0)]
        taken[domain] = taken.get(domain, 0) + len(part)
        tokens = np.asarray(tokenizer.encode(part, add_special_tokens=False).ids, np.int32)
        found.append((domain, part, tokens))
    return found


def fit(scored: Scored, config: ModelConfig) -> dict[str, float]:
    """Learns the matrix on every other document, and asks it about the rest."""
    routing = config.moe.routing
    coarse = routing.levels[0]
    named = routing.experts // coarse.groups * coarse.keep
    names = sorted({domain for domain, _ in scored.choices})
    matrix = CapabilityMatrix(len(scored.choices[0][1]), len(names), routing.experts, named)
    right, hits, seen = [], 0.0, 0.0
    for index, (domain, layers) in enumerate(scored.choices):
        counts_LE = torch.stack([torch.bincount(x[x >= 0], minlength=routing.experts) for x in layers])
        if index % 2 == 0:
            matrix.observe(names.index(domain), counts_LE, len(layers[0]))
            continue
        right.append(matrix.infer(counts_LE) == names.index(domain))
        named_LN = matrix.named()[:, names.index(domain)]
        hits += float(counts_LE.gather(1, named_LN).sum())
        seen += float(counts_LE.sum())
    return {
        "fit": hits / seen, "chance": named / routing.experts, "named": named,
        "domains_inferred": float(np.mean(right)),
    }  # fmt: skip


def rows(out: Path, run: str) -> Iterator[dict[str, Any]]:
    """One for each run and mass, then those of the balance at serving."""
    documents = scored_documents(out)
    for folder in sorted(path.parent for path in out.glob(f"{run}/model.safetensors")):
        model = load(folder)
        config, dynamic = model.config, model.config.moe.routing.is_dynamic
        experts, hidden = config.moe.routed, config.hidden_size
        place_E = torch.arange(experts) * RANKS // experts
        name = folder.name.rsplit("-", 1)[0]
        masses = MASSES if name in ("fixed", "dynamic", "dynamic-cost", "levels", "levels-hint") else (1.0,)
        for mass in masses:
            set_mass(model, mass)
            found = score(model, documents)
            loads = found.loads(experts)
            yield {
                "run": folder.name, "mass": mass, "trained_mass": config.moe.routing.mass if dynamic else 1.0,
                "bits_per_byte": found.bits_per_byte, "activated": found.activated,
                "exchange_bytes": found.exchange(place_E, hidden),
                "utilisation": min(map(utilisation, loads)), **fit(found, config),
            }  # fmt: skip
        set_mass(model, config.moe.routing.mass)
        if name in ("unbalanced", "fixed"):
            yield from balanced(model, documents, folder.name)


def balanced(model: TrainingModel, documents: list[Any], name: str) -> Iterator[dict[str, Any]]:
    """The coefficient at serving: loads are of every other document, the figures of the rest."""
    window, rest = documents[::2], documents[1::2]
    loads = score(model, window).loads(model.config.moe.routed)
    plain = [mixture.bias_E.clone() for mixture in model.mixtures]
    for margin in (0.0, 0.01, 0.02, 0.05, 0.1):
        for mixture, load_E, bias_E in zip(model.mixtures, loads, plain, strict=True):
            mixture.bias_E.copy_(bias_E + nudge(load_E, 1.0, margin).to(bias_E))
        found = score(model, rest)
        yield {
            "run": name, "margin": margin, "bits_per_byte": found.bits_per_byte,
            "utilisation": min(map(utilisation, found.loads(model.config.moe.routed))),
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
