"""Measures a checkpoint's routers on text: quality and experts by mass, and the load of each expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_worker.config.directory import CONFIG, find_checkpoint, read_checkpoint_config, read_json
from moe_worker.config.routing_report import ROUTING_FILE, read_routing_report
from moe_worker.engine.offline import Engine
from moe_worker.errors import CheckpointError, SettingsError
from moe_worker.moe.balance import nudge
from moe_worker.moe.capability import CapabilityMatrix
from moe_worker.progress import bar
from moe_worker.train.corpus import read_labels
from moe_worker.train.data import read_documents
from moe_worker.train.evaluate import score_engine, window_of

MASSES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
# In which the margin of the balance is spent.
ROUNDS = 8


@dataclass(frozen=True)
class Measured:
    """A model that cuts at `mass`.

    activated: routed experts of a token, mean over layers. loads: tokens of each expert, by layer.
    utilisation: the mean over the largest load of a layer, the worst layer's.
    """

    mass: float
    bits_per_byte: float
    activated: float
    utilisation: float
    loads: dict[int, list[int]]


def measure(checkpoint: Path, data: Path, mass: float, context: int | None, **options: Any) -> Measured:
    """Scores the checkpoint; `options` are those of Engine. Raises WorkerError."""
    own = read_json(find_checkpoint(checkpoint) / CONFIG).get("routing") or {}
    engine = Engine(checkpoint, progress=True, config_override={"routing": {**own, "mass": mass}}, **options)
    counter, tokens = engine.expert_counter(), 0

    def passed(count: int) -> None:
        nonlocal tokens
        tokens += count
        counter.count(count)

    score = score_engine(engine, read_documents(data), context, passed)
    loads = {layer: row for layer, row, _ in counter.read()[1]}
    activated = sum(map(sum, loads.values())) / max(1, len(loads) * tokens)
    used = min((sum(row) / len(row) / max(1, *row) for row in loads.values()), default=1.0)
    return Measured(mass, score.bits_per_byte, activated, used, loads)


def even_out(
    loads: dict[int, list[int]], margin: float, measured: Callable[[dict[str, Any]], Measured]
) -> Measured:
    """Spends the margin in rounds; each asks for what the loads of the one before leave.

    All at once, the busiest experts would lose more than they have too much, and others become the busiest.
    measured: the model with a part "balance" of routing.json, in which the margin is what was spent so far.
    Returns the model with the whole margin.
    """
    nudges: dict[int, Tensor] = {layer: torch.zeros(len(row)) for layer, row in loads.items()}
    for number in range(1, ROUNDS + 1):
        for layer, row in loads.items():
            nudges[layer] += nudge(torch.tensor(row), 1.0, margin / ROUNDS)
        spent = round(margin * number / ROUNDS, 6)
        rows = {str(layer): [round(min(x, spent), 6) for x in row.tolist()] for layer, row in nudges.items()}
        found = measured({"margin": spent, "nudges": rows})
        loads = found.loads
    return found


def check(
    checkpoint: Path, data: Path, labels: Path | None, margin: float | None, context: int | None
) -> None:
    """Refuses what cannot be measured before minutes are spent on it. Raises WorkerError."""
    config = read_checkpoint_config(find_checkpoint(checkpoint))
    if margin is not None and not config.moe.has_bias:
        raise SettingsError(
            f"--margin is {margin:g}, but the routers of {config.architecture} have no bias to carry it; "
            "leave it out"
        )
    window_of(config, context)
    documents = read_documents(data)
    if labels is not None:
        read_labels(labels, len(documents))


def learn_domains(checkpoint: Path, data: Path, labels: Path, **options: Any) -> dict[str, Any]:
    """Which experts each domain's tokens go to: the part "domains" of routing.json, with its fit.

    labels: the domain of each document, one a line. Each document counts with its first context of tokens;
    what a domain needs is half of a layer's experts. Raises WorkerError.
    """
    documents = read_documents(data)
    domains = read_labels(labels, len(documents))
    engine = Engine(checkpoint, progress=True, **options)
    config, names = engine.config, sorted(set(domains))
    layers = config.moe_layers
    experts = config.moe.routed
    matrix = CapabilityMatrix(len(layers), len(names), experts, max(1, experts // 2))
    labelled = list(zip(documents, domains, strict=True))
    for document, domain in bar(labelled, desc="learn domains", unit="document"):
        ids = engine.tokenizer.encode(document)[: config.max_position_embeddings]
        counts_LE = torch.stack([torch.bincount(x[x >= 0], minlength=experts) for x in engine.choices(ids)])
        matrix.observe(names.index(domain), counts_LE, len(ids))
    shares = [[[round(value, 6) for value in row] for row in table] for table in matrix.affinity().tolist()]
    return {
        "names": names,
        "named": max(1, experts // 2),
        "fit": matrix.fit(),
        "shares": {str(layer): table for layer, table in zip(layers, shares, strict=True)},
    }


def earlier(checkpoint: Path, *, masses: bool) -> dict[str, Any]:
    """What the checkpoint's report says and a run does not measure, and so keeps; nothing if it is invalid.

    masses: whether the run measures less than all of the mass.
    """
    try:
        if read_routing_report(checkpoint) is None:
            return {}
    except CheckpointError:
        return {}
    found = read_json(checkpoint / ROUTING_FILE)
    kept = {"domains", "balance"} | (set() if masses else {"text", "most_loss", "least_mass", "masses"})
    return {name: value for name, value in found.items() if name in kept}


def report(measured: list[Measured], text: str, most_loss: float) -> dict[str, Any]:
    """What routing.json holds.

    least_mass is the smallest one up to which no mass costs more than a share `most_loss` of the bits per
    byte of all of it. Loads are shares, of the model with all of its mass.
    """
    ordered = sorted(measured, key=lambda one: -one.mass)
    whole = ordered[0]
    allowed = whole.mass
    for one in ordered:
        if one.bits_per_byte > whole.bits_per_byte * (1 + most_loss):
            break
        allowed = one.mass
    return {
        "text": text,
        "most_loss": most_loss,
        "least_mass": allowed,
        "masses": [
            {
                "mass": one.mass,
                "bits_per_byte": one.bits_per_byte,
                "activated": one.activated,
                "utilisation": one.utilisation,
            }
            for one in ordered
        ],
        "loads": {
            str(layer): [round(count / max(1, sum(row)), 6) for count in row]
            for layer, row in whole.loads.items()
        },
    }
