"""Decode on the CPU at batch 1: 1:4 sparse int4 weights (s14) compared with dense int4 ones, both W4A8.

    python -m benchmarks.sparse_decode [--rounds 5] [--threads 2] [--json]

The model is CPU_SHAPE with random weights, as in benchmarks.cpu_decode: only speed is
compared. All projections and experts are sparse; the output head, router, norms and embedding are the same in
both. The two models alternate; the output is medians over the rounds, and their ratio.
"""

import json
import statistics

import torch

from benchmarks.cpu_decode import Ours, RandomSource, options, shape_and_kernels
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
    args = options(__doc__ or "", rounds=5).parse_args()
    shape, kernels = shape_and_kernels(args)
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
