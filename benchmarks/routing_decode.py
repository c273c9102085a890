"""What fewer experts are worth: decode at batch 1 with all of the mass and with less, random weights in W4A8.

    python -m benchmarks.routing_decode --device cpu [--shapes DIR] [--threads 2]
    python -m benchmarks.routing_decode --device cuda

Random weights score nearly equally, so half of the mass is about half of the experts: that compares the work
of a step, and says nothing about quality (benchmarks/routing.py does). Rounds on the CPU take turns; medians.
The GPU's figure is of the captured step.
"""

import argparse
import json
import runpy
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import positive, share


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", type=Path, default=Path(__file__).parents[2] / "shared" / "peers")
    parser.add_argument("--mass", nargs="+", type=share, default=[1.0, 0.65, 0.5])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    first = None
    for row in cpu(args) if args.device == "cpu" else cuda(args):
        first = first or row["tokens_per_second"]
        print(json.dumps(row | {"ratio": round(row["tokens_per_second"] / first, 3)}), flush=True)


def cpu(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of CPU_SHAPE, on the kernels."""
    from benchmarks.cpu_decode import Ours, RandomSource  # noqa: PLC0415
    from moe_worker.kernels.cpu.library import Kernels  # noqa: PLC0415

    shape, kernels = (
        runpy.run_path(str(args.shapes / "shapes.py"))["CPU_SHAPE"],
        Kernels(threads=args.threads),
    )
    torch.set_num_threads(args.threads)
    rates: dict[float, list[float]] = {mass: [] for mass in args.mass}
    models = {
        mass: Ours({**shape, "routing": {"mass": mass}}, kernels, torch.bfloat16, RandomSource())
        for mass in args.mass
    }
    for _ in range(args.rounds):
        for mass, model in models.items():
            rates[mass].append(model.measure(128)[1])
    for mass, model in models.items():
        used = torch.stack(list(model.model.fusion.experts_used.values()))[:, :-1].sum(1).float()
        tokens = args.rounds * (128 + 48)
        yield {
            "device": "cpu", "mass": mass, "activated": round(float(used.mean()) / tokens, 2),
            "tokens_per_second": round(statistics.median(rates[mass]), 2),
        }  # fmt: skip


def cuda(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of gpu_random.LARGE, the captured step."""
    from benchmarks import gpu_decode, gpu_random  # noqa: PLC0415

    options = argparse.Namespace(rounds=args.rounds, profile=False)
    for mass in args.mass:
        gpu_random.LARGE["routing"] = {"mass": mass}
        bench = gpu_decode.Bench.of("w4a8", 1, 640, 128)
        rate = gpu_decode.graph_rate(bench, 1, options)
        counts_LA = bench.model.counts_LA[1:, : gpu_random.LARGE["n_routed_experts"]]
        yield {
            "device": torch.cuda.get_device_name(), "mass": mass,
            "activated": round(float((counts_LA > 0).sum(1).float().mean()), 2),
            "tokens_per_second": round(rate, 1),
        }  # fmt: skip
        del bench
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
