"""Decode on the CPU at batch 1: 1:4 sparse int4 weights (s14) compared with dense int4 ones, both W4A8.

    python -m benchmarks.sparse_decode [--rounds 5] [--threads 2] [--json]

The model is CPU_SHAPE of ../shared/peers with random weights, as in benchmarks.cpu_decode: only speed is
compared. All projections and experts are sparse; the output head, router, norms and embedding are the same in
both. The two models alternate; the output is medians over the rounds, and their ratio.
"""

import argparse
import json
import runpy
import statistics
from pathlib import Path

import torch

from benchmarks.cpu_decode import Ours, RandomSource
from moe_worker.engine.loading import usable_cores
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.quant.matrix import Matrix
from moe_worker.quant.sparse14 import Sparse14Weight

CONTEXT = 128


class SparseSource(RandomSource):
    """As dense ones are drawn; the head is dense, as a compressed checkpoint has it."""

    def matrix(self, name: str, outputs: int, inputs: int) -> Matrix:  # type: ignore[override]
        if "layers." not in name:
            return super().matrix(name, outputs, inputs)
        draw = {"dtype": torch.uint8, "generator": self.generator}
        values = torch.randint(0, 256, (outputs, inputs // 8), **draw)  # type: ignore[call-overload]
        positions = torch.randint(0, 256, (outputs, inputs // 16), **draw)  # type: ignore[call-overload]
        scales = torch.full((outputs, -(-inputs // 128)), 0.004)
        return Sparse14Weight(values, positions, scales, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=Path, default=Path(__file__).parents[2] / "shared" / "peers")
    parser.add_argument("--variant", help="kernels to use; by default the fastest of this CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not (args.shapes / "shapes.py").exists():
        raise SystemExit(f"{args.shapes}/shapes.py does not exist; give the folder with --shapes")
    torch.set_num_threads(args.threads)
    kernels = Kernels(args.variant, args.threads)
    shape = runpy.run_path(str(args.shapes / "shapes.py"))["CPU_SHAPE"]
    sources = {"dense": RandomSource(), "s14": SparseSource()}
    models = {name: Ours(shape, kernels, torch.float32, source) for name, source in sources.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for number in range(args.rounds + 1):
        for name, model in models.items():
            _, rate = model.measure(CONTEXT)
            if number:  # the first one warms up
                rates[name].append(rate)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    ratio = middle["s14"] / middle["dense"]
    if args.json:
        print(json.dumps({**middle, "ratio": ratio, "variant": kernels.variant, "threads": args.threads}))
        return
    print(f"W4A8, CPU_SHAPE, batch 1, context {CONTEXT}; {args.threads} threads, {kernels.variant}")
    for name, model in models.items():
        print(f"{name:5} {middle[name]:8.1f} tokens/s   {model.memory}")
    print(f"s14 / dense: {ratio:.2f}x")


if __name__ == "__main__":
    main()
