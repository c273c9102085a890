"""What it saves to place the experts that a domain uses on the same ranks of a mesh.

    python -m benchmarks.mesh_affinity valid.txt.zst [--model DIR] [--json]

Domains are the sources of the documents, of each up to 16. Affinities and loads are learned from every other
document and measured on the rest: ranks that a token is sent to, mean over tokens and layers, without its
own one, which has most of the document's choices in a layer; and the mean load of the ranks over the largest.
The baseline places experts by the loads alone.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.commands import run
from benchmarks.docs_sources import source_of
from moe_worker import Engine
from moe_worker.mesh.affinity import gathered
from moe_worker.mesh.placement import Topology, imbalance, placement
from moe_worker.train.data import read_documents

MODEL = Path(__file__).parents[1] / "examples" / "docs-moe"
MOST_DOCUMENTS, LEAST_TOKENS = 16, 64
Places = tuple[int, ...]


class Recorded(NamedTuple):
    """Where a document's tokens went: experts, int64 [T, K], of each layer."""

    source: str
    layers: Sequence[Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    engine = Engine(arguments.model, device="cpu", threads=1, max_batch_size=1)
    documents = recorded(engine, arguments.corpus)
    experts = engine.config.moe.routed
    for ranks, copies in ((2, 0), (4, 0), (4, 4), (8, 0)):
        for each in rows(documents, experts, ranks, copies):
            print(json.dumps(each) if arguments.json else "{what}: {ours} ({baseline})".format(**each))


def recorded(engine: Engine, corpus: Path) -> list[Recorded]:
    """Documents by source, the first context of each."""
    taken, found = Counter[str](), []
    for text in read_documents(corpus):
        source = source_of(text)
        ids = engine.tokenizer.encode(text)[: engine.config.max_position_embeddings]
        if taken[source] < MOST_DOCUMENTS and len(ids) >= LEAST_TOKENS:
            taken[source] += 1
            found.append(Recorded(source, [chosen.long() for chosen in engine.choices(ids)]))
    return sorted(found, key=lambda one: one.source)


def rows(documents: Sequence[Recorded], experts: int, ranks: int, copies: int) -> list[dict[str, Any]]:
    learned, rest = documents[::2], documents[1::2]
    sent: dict[str, list[float]] = {"loads": [], "domains": []}
    even: dict[str, list[float]] = {"loads": [], "domains": []}
    for layer in range(len(documents[0].layers)):
        places = placed(learned, layer, experts, ranks, copies)
        loads = torch.stack([_counts(one.layers[layer], experts) for one in rest]).sum(0).tolist()
        for name, own in places.items():
            sent[name].append(statistics.mean(others(one.layers[layer], own, ranks) for one in rest))
            even[name].append(1 / imbalance(loads, own, ranks))
    what = f"{ranks} ranks, {copies} copies"
    return [
        _row(f"ranks a token is sent to, {what}", "ranks", sent),
        _row(f"balance, {what}", "mean / max", even),
    ]


def placed(
    learned: Sequence[Recorded], layer: int, experts: int, ranks: int, copies: int
) -> dict[str, Places]:
    """By loads alone, and with domains gathered."""
    by_source: dict[str, Tensor] = {}
    for source, layers in learned:
        by_source[source] = by_source.get(source, torch.zeros(experts)) + _counts(layers[layer], experts)
    loads = torch.stack([*by_source.values()]).sum(0).tolist()
    shares = [(counts / counts.sum()).tolist() for counts in by_source.values()]
    (plain,) = placement([loads], Topology(ranks), copies)
    return {
        "loads": plain,
        "domains": gathered(plain, shares, loads, ranks, learned[0].layers[layer].shape[1]),
    }


def others(chosen_TK: Tensor, places: Places, ranks: int) -> float:
    """Ranks that a token goes to; of an expert's copies the one on its own rank serves, or else the first."""
    each = len(places) // ranks
    homes = [
        [place // each for place, own in enumerate(places) if own == expert] for expert in sorted({*places})
    ]
    counts = []
    for rank in range(ranks):
        home_E = torch.tensor([rank if rank in home else home[0] for home in homes])
        uses_TR = torch.zeros(len(chosen_TK), ranks).scatter_(1, home_E[chosen_TK], 1.0)
        counts.append((float(uses_TR[:, rank].sum()), float(uses_TR.sum() - uses_TR[:, rank].sum())))
    return max(counts)[1] / len(chosen_TK)


def _counts(chosen_TK: Tensor, experts: int) -> Tensor:
    return torch.bincount(chosen_TK[chosen_TK >= 0], minlength=experts).float()


def _row(what: str, unit: str, found: dict[str, list[float]]) -> dict[str, Any]:
    ours, baseline = statistics.mean(found["domains"]), statistics.mean(found["loads"])
    return {
        "what": what, "ours": round(ours, 4), "baseline": round(baseline, 4),
        "ratio": round(ours / baseline, 3), "unit": unit, "device": "cpu", "simulated": False,
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
