"""Draws where a checkpoint's tokens go: the affinity of sources and experts, and experts a token by position.

python -m benchmarks.routing_plot CHECKPOINT --data valid.txt.zst --mass 0.8 --out docs/routing.svg
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from benchmarks.commands import positive, run, share
from benchmarks.docs_sources import source_of
from moe_worker.config.directory import CONFIG, read_json
from moe_worker.engine.offline import Engine
from moe_worker.moe.capability import CapabilityMatrix
from moe_worker.train.data import read_documents

POSITIONS = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mass", type=share, default=0.8)
    parser.add_argument("--characters", type=positive, default=6000, help="of every source")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = read_json(args.checkpoint / CONFIG).get("routing") or {}
    engine = Engine(args.checkpoint, config_override={"routing": {**own, "mass": args.mass}})
    names, affinity_NE, layer, counts_P = observe(engine, read_documents(args.data), args.characters)
    draw(names, affinity_NE, layer, counts_P, args)


def observe(
    engine: Engine, documents: list[str], characters: int
) -> tuple[list[str], np.ndarray, int, np.ndarray]:
    """Domains, their affinities in the layer where they differ most, its number, experts by position."""
    taken: dict[str, int] = {}
    parts: list[tuple[str, str]] = []
    for text in documents:
        source = source_of(text)
        part = text[: characters - taken.get(source, 0)]
        if part:
            taken[source] = taken.get(source, 0) + len(part)
            parts.append((source, part))
    names, config = sorted(taken), engine.config
    layers = config.moe_layers
    experts = config.moe.routed
    matrix = CapabilityMatrix(len(layers), len(names), experts, experts // 2)
    sums, seen = np.zeros(config.max_position_embeddings), np.zeros(config.max_position_embeddings)
    for source, part in parts:
        ids = engine.tokenizer.encode(part)[: config.max_position_embeddings]
        choices = engine.choices(ids)
        counts = torch.stack([torch.bincount(x[x >= 0], minlength=experts) for x in choices])
        matrix.observe(names.index(source), counts, len(ids))
        sums[: len(ids)] += torch.stack([(x >= 0).sum(1).double() for x in choices]).mean(0).numpy()
        seen[: len(ids)] += 1
    affinity_LNE = matrix.affinity()
    layer = int(affinity_LNE.std(dim=1).sum(dim=1).argmax())
    most = int(np.flatnonzero(seen >= 3)[-1]) // POSITIONS * POSITIONS
    blocks = (sums[:most].reshape(-1, POSITIONS).sum(1), seen[:most].reshape(-1, POSITIONS).sum(1))
    return names, affinity_LNE[layer].numpy(), layers[layer], blocks[0] / blocks[1]


def draw(
    names: list[str], affinity_NE: np.ndarray, layer: int, counts_P: np.ndarray, args: argparse.Namespace
) -> None:
    """Writes an SVG of two panels."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "moe-operator"
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the choice of what draws

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), width_ratios=(3, 2), layout="constrained")
    shown = left.imshow(affinity_NE, aspect="auto", cmap="viridis", vmin=0)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="expert", title=f"share of a source's choices, layer {layer}")
    figure.colorbar(shown, ax=left)
    right.plot((np.arange(len(counts_P)) + 0.5) * POSITIONS, counts_P)
    right.set(xlabel="position", ylabel="experts a token", title=f"mass {args.mass:g}", ylim=(0, None))
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    run(main)
