"""What a prior for dynamic top-k could save at most: the capability matrix as a bias, with the domain known.

    python -m benchmarks.routing_prior valid.txt.zst [--model DIR] [--json]

The bias of an expert is `strength` times its share in a domain's choices over the largest share, so it takes
the place of another one only if their scores differ by less than `strength`; weights stay those of its own
score. `domain`: the matrix row of the document's own source, which a worker would have to guess. `mean`: one
bias for all, the mean over sources. Both are learned from every other document of a source and scored on the
rest, the first 256 tokens of each, by bits per byte and by experts a token at several masses.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.docs_sources import source_of
from benchmarks.routing import WINDOW, Scored, load, score, set_mass
from moe_worker.train.data import read_documents, read_tokenizer
from moe_worker.train.model import TrainingModel

MODEL = Path(__file__).parents[1] / "examples" / "docs-moe"
MASSES, STRENGTHS = (1.0, 0.85, 0.8, 0.75, 0.7), (0.03, 0.1)
WITH_PRIOR = (0.8, 0.7)
DOCUMENTS, LEAST = 4, 600  # of a source for each half; characters
Document = tuple[str, str, np.ndarray]


@dataclass(frozen=True)
class Bench:
    """A model, its own biases by layer, and documents of each source to score."""

    model: TrainingModel
    plain: Sequence[Tensor]
    documents: Mapping[str, list[Document]]

    def run(self, mass: float, biases: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Bits per byte and experts a token, with biases [L, E] of each source added."""
        set_mass(self.model, mass)
        found = []
        for source, documents in self.documents.items():
            for number, mixture in enumerate(self.model.mixtures):
                extra_E = 0.0 if biases is None else biases[source][number]
                mixture.bias_E.copy_(self.plain[number] + extra_E)
            found.append(score(self.model, documents))
        tokens = sum(each.tokens for each in found)
        nats, size = sum(each.nats for each in found), sum(each.utf8_bytes for each in found)
        activated = sum(each.activated * each.tokens for each in found) / tokens
        return {"bits_per_byte": nats / float(np.log(2)) / size, "activated": activated}


@click.command(help=__doc__)
@click.argument("corpus", type=click.Path(exists=True, path_type=Path))
@click.option("--model", "folder", type=click.Path(exists=True, path_type=Path), default=MODEL)
@click.option("--json", "as_json", is_flag=True)
def main(corpus: Path, folder: Path, as_json: bool) -> None:
    torch.set_num_threads(1)
    model = load(folder)
    learned, scored = halves(corpus, folder)
    shares = {source: affinity(score(model, own), model) for source, own in learned.items()}
    bench = Bench(model, [mixture.bias_E.clone() for mixture in model.mixtures], scored)
    for row in rows(bench, shares):
        click.echo(json.dumps(row) if as_json else "  ".join(f"{key} {row[key]}" for key in row))


def rows(bench: Bench, shares: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """One for each mass without a prior, and for each prior."""
    for mass in MASSES:
        yield {"prior": "none", "strength": 0.0, "mass": mass, **bench.run(mass)}
    mean_LE = torch.stack([*shares.values()]).mean(0)
    priors = {"domain": shares, "mean": dict.fromkeys(shares, mean_LE)}
    for name, own in priors.items():
        for strength in STRENGTHS:
            biases = {source: strength * row_LE for source, row_LE in own.items()}
            for mass in WITH_PRIOR:
                yield {"prior": name, "strength": strength, "mass": mass, **bench.run(mass, biases)}


def halves(corpus: Path, folder: Path) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    """Documents by source to learn from, and others to score."""
    tokenizer, found = read_tokenizer(folder / "tokenizer.json"), defaultdict[str, list[Document]](list)
    for text in read_documents(corpus):
        source = source_of(text)
        if len(text) < LEAST or len(found[source]) == 2 * DOCUMENTS:
            continue
        ids = tokenizer.encode(text[: 8 * WINDOW], add_special_tokens=False).ids[: WINDOW - 1]
        found[source].append((source, tokenizer.decode(ids), np.asarray(ids, np.int32)))
    learned, scored = ({source: own[first::2] for source, own in found.items()} for first in (0, 1))
    return learned, scored


def affinity(scored: Scored, model: TrainingModel) -> Tensor:
    """The share of each expert in the choices over the largest one, [L, E]."""
    counts_LE = torch.stack(scored.loads(model.config.moe.routed))
    return counts_LE / counts_LE.amax(dim=1, keepdim=True).clamp(min=1)


if __name__ == "__main__":
    main()
