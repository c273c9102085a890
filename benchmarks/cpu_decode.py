"""Prefill and decode on the CPU at batch 1 in W4A8; baselines: llama.cpp (Q4_0), transformers (bfloat16).

    python -m benchmarks.cpu_decode [--llama-python PYTHON] [--rounds 3] [--json]

The model is CPU_SHAPE of the file shapes.py in the folder --shapes, with random weights: only speed is
compared. The baselines are scripts in that folder (docs/benchmarks.md). Each runs in its own process between
two measurements of ours, with 2 threads; medians over the rounds are reported. llama.cpp runs if llama_cpp
can be imported, here or by the interpreter that --llama-python names; `--peers none` measures only our
engine.
"""

import argparse
import importlib.util
import json
import platform
import re
import runpy
import statistics
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commands import positive
from moe_worker.config.model import parse_model_config
from moe_worker.engine.loading import usable_cores
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.kernels.likeliest import likeliest
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.build import build_model
from moe_worker.models.memory import describe, weight_memory
from moe_worker.models.native import NativeModel
from moe_worker.models.source import TensorSource
from moe_worker.quant.int4 import Int4Weight

CONTEXTS = (128, 1024)
STEPS = 48
CHUNK = 512
PAGE = 16
LLAMA, TRANSFORMERS = "llama.cpp Q4_0", "transformers bf16"
Rates = dict[tuple[str, int], list[float]]  # (what, context) to tokens per second, one value for each round


class RandomSource:
    """Weights as large as trained ones; int4 directly, since rounding 0.9 billion takes minutes."""

    device, dtype, round_tokens = torch.device("cpu"), torch.bfloat16, True

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=dtype or self.dtype)
        return torch.randn(shape, generator=self.generator).mul_(0.02).to(dtype or self.dtype)

    def matrix(self, name: str, outputs: int, inputs: int) -> Int4Weight:
        del name
        # From -7 to 7: with -8 the mean would not be zero, and all hidden states and routes would become
        # similar.
        values = torch.randint(1, 16, (outputs, inputs), dtype=torch.uint8, generator=self.generator)
        packed = values[:, 0::2] | values[:, 1::2] << 4
        return Int4Weight(packed, torch.full((outputs, inputs // 128), 0.004), None, inputs)


class Ours:
    """The model with room for one sequence."""

    def __init__(
        self, shape: dict[str, Any], kernels: Kernels, cache: torch.dtype, source: TensorSource
    ) -> None:
        values = {"model_type": "deepseek_v3", "norm_topk_prob": True, **shape}
        config = parse_model_config(values, "shapes.py")
        longest = max(CONTEXTS) + STEPS
        model = build_model(config, source, longest)
        self.memory = describe(weight_memory(model))
        self.model = NativeModel.of(model, kernels)
        rows = CacheShape(config.num_hidden_layers, config.attention.cache_width, PAGE, cache)
        self.cache = PagedCache.allocate(rows, -(-longest // PAGE), torch.device("cpu"))
        self.pages = array("i", range(self.cache.pages))

    def step(self, tokens: list[int], start: int) -> int:
        batch = Batch.of([Segment(tokens, start, self.pages)], self.cache)
        logits_1V = self.model.next_logits(batch, self.cache, [len(tokens) - 1])
        return int(likeliest(logits_1V).tokens_B)

    def measure(self, context: int) -> tuple[float, float]:
        """Tokens a second of prefill and of greedy decode."""
        generator = torch.Generator().manual_seed(context)
        prompt = torch.randint(3, 32000, (context,), generator=generator).tolist()
        begin = time.perf_counter()
        for start in range(0, context, CHUNK):
            token = self.step(prompt[start : start + CHUNK], start)
        middle = time.perf_counter()
        for position in range(context, context + STEPS):
            token = self.step([token], position)
        return context / (middle - begin), STEPS / (time.perf_counter() - middle)


def options(about: str, rounds: int) -> argparse.ArgumentParser:
    """Those of benchmarks of CPU_SHAPE."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Path, default=Path(__file__).parents[2] / "shared" / "peers")
    parser.add_argument("--variant", help="kernels to use; by default the fastest of this CPU")
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--threads", type=positive, default=min(2, usable_cores()))
    parser.add_argument("--json", action="store_true")
    return parser


def shape_and_kernels(args: argparse.Namespace) -> tuple[dict[str, Any], Kernels]:
    if not (args.shapes / "shapes.py").exists():
        raise SystemExit(f"{args.shapes}/shapes.py does not exist; give the folder with --shapes")
    torch.set_num_threads(args.threads)
    return runpy.run_path(str(args.shapes / "shapes.py"))["CPU_SHAPE"], Kernels(args.variant, args.threads)


def main() -> None:
    parser = options(__doc__ or "", rounds=3)
    parser.add_argument("--peers", choices=("all", "none"), default="all")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--gguf", type=Path, default=Path("/tmp/moe_cpu_shape_q4_0.gguf"))  # noqa: S108
    parser.add_argument("--cache", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    shape, kernels = shape_and_kernels(args)
    ours = Ours(shape, kernels, getattr(torch, args.cache), RandomSource())
    peers = peer_commands(args) if args.peers == "all" else {}
    ours.measure(CONTEXTS[0])  # warms up
    rates = {name: {} for name in ("ours", *peers)}  # type: dict[str, Rates]
    for _ in range(args.rounds):
        for context in CONTEXTS:
            note(rates["ours"], context, ours.measure(context))
        for name, command in peers.items():
            run_peer(rates[name], command, args.shapes)
    device = f"{cpu_name()}, {args.threads} threads, {kernels.variant}"
    report(rates, device, args.json)


def peer_commands(args: argparse.Namespace) -> dict[str, list[str]]:
    commands = {}
    here = args.llama_python == sys.executable
    if here and importlib.util.find_spec("llama_cpp") is None:
        print("llama_cpp is not installed here: llama.cpp is left out (see --llama-python)", file=sys.stderr)
    else:
        commands[LLAMA] = [args.llama_python, "cpu_llama_cpp.py", "q4_0", str(args.gguf)]
    commands[TRANSFORMERS] = [sys.executable, "cpu_transformers.py"]
    return commands


def run_peer(rates: Rates, command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    rows = re.findall(r"context (\d+) prefill (\S+) decode (\S+) tok/s", result.stdout)
    if result.returncode or not rows:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    for context, prefill, decode in rows:
        note(rates, int(context), (float(prefill), float(decode)))


def note(rates: Rates, context: int, measured: tuple[float, float]) -> None:
    for what, rate in zip(("prefill", "decode"), measured, strict=True):
        rates.setdefault((what, context), []).append(rate)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def report(rates: dict[str, Rates], device: str, as_json: bool) -> None:
    if not as_json:
        print(f"W4A8, CPU_SHAPE, batch 1; {device}; tokens a second, medians")
    for (what, context), ours in sorted(rates["ours"].items()):
        mine = statistics.median(ours)
        for peer in [name for name in rates if name != "ours"] or [""]:
            theirs = statistics.median(rates[peer][what, context]) if peer else None
            row = {
                "what": f"{what}, context {context}, W4A8, compared with {peer or 'nothing'}",
                "ours": mine,
                "peer": theirs,
                "ratio": mine / theirs if theirs else None,
                "unit": "tokens/s",
                "device": device,
            }
            beside = f"   {peer} {theirs:8.1f}   {mine / theirs:5.2f}x" if theirs else ""
            print(json.dumps(row) if as_json else f"{what:8} {context:5} {mine:8.1f}{beside}")


if __name__ == "__main__":
    main()
