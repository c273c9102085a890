"""Times tilings of the int4 products of a model on this GPU; the tiling that the kernels select is first.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_tiles [--tokens 1 16 64 256] [--wide] [--top 4]

The products are those of one layer of the shape in benchmarks/gpu_random.py, in W4A8. Kernels are compiled by
several processes first; times are means of 20 launches on weights that no cache holds.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from benchmarks.gpu_random import LARGE
from moe_worker.kernels.triton import linear as linear_kernels
from moe_worker.kernels.triton.experts import ExpertTiles, expert_tiles, experts_packed, sort_by_expert
from moe_worker.kernels.triton.linear import linear_packed, linear_tile
from moe_worker.kernels.triton.norm import Activation
from moe_worker.kernels.triton.tiles import PackedInt4, Tile
from moe_worker.kernels.triton.wide import experts_wide, widen

HIDDEN, INNER = LARGE["hidden_size"], LARGE["moe_intermediate_size"]
EXPERTS, PER_TOKEN = LARGE["n_routed_experts"] + 2, LARGE["num_experts_per_tok"] + 2
LINEAR = {"input": (3648, HIDDEN), "output": (HIDDEN, 2048), "head": (102400, HIDDEN)}
LAUNCHES = 20
Case = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--wide", action="store_true", help="where dequantized weights are faster")
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    cases = [(name, tokens) for tokens in args.tokens for name in ("experts", *LINEAR)]
    jobs = [(case, tile) for case in cases for tile in candidates(case)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes) as pool:
        pool.starmap(compile_only, jobs, chunksize=4)
    for case in cases:
        report(case, args.top)
    if args.wide:
        for tokens in (256, 512, 1024, 2048, 4096):
            report_wide(tokens)


def candidates(case: Case) -> Iterator[Tile]:
    name, tokens = case
    rows = (
        [16] if tokens <= 16 else [16, 32] if tokens <= 64 else [32, 64] if tokens <= 256 else [32, 64, 128]
    )
    widths = [32, 64, 128] if name in LINEAR and tokens <= 16 else [64, 128]
    for n, m, warps, stages in itertools.product(widths, rows, (4, 8), (2, 3, 4)):
        if 8 * 32 * warps <= n * m <= 64 * 32 * warps:
            yield Tile(n, m, warps, stages)


def random_int4(*sizes: int) -> PackedInt4:
    *leading, outputs, inputs = sizes
    groups = inputs // 128
    packed = torch.randint(0, 256, (*leading, groups, outputs, 64), dtype=torch.uint8, device="cuda")
    return PackedInt4(packed, torch.rand(*leading, groups, outputs, device="cuda") * 0.01, inputs)


def activation(tokens: int, width: int) -> Activation:
    x = Activation.empty(tokens, width, torch.device("cuda"))
    x.x_TD.normal_()
    x.q_TD.random_(-127, 128)
    x.scales_TX.uniform_()
    return x


def chosen_experts(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    routed = torch.rand(tokens, EXPERTS - 2, device="cuda").topk(PER_TOKEN - 2).indices
    shared = torch.arange(EXPERTS - 2, EXPERTS, device="cuda").expand(tokens, 2)
    chosen = torch.cat((routed, shared), dim=1).int()
    shares = torch.rand(tokens, PER_TOKEN, device="cuda")
    return chosen, shares, chosen.flatten().bincount(minlength=EXPERTS).int()


def make(case: Case, copies: int) -> Callable[[Tile | None], None]:
    """A function that launches the case; it alternates between several sets of weights."""
    name, tokens = case
    if name in LINEAR:
        outputs, inputs = LINEAR[name]
        weights = itertools.cycle([random_int4(outputs, inputs) for _ in range(copies)])
        x, out = activation(tokens, inputs), torch.empty(tokens, outputs, dtype=torch.bfloat16, device="cuda")

        def linear(tile: Tile | None) -> None:
            if tile is not None:
                linear_kernels.linear_tile = lambda *_: tile
            linear_packed(x, next(weights), out)
            linear_kernels.linear_tile = linear_tile

        return linear
    pairs = itertools.cycle(
        [
            (random_int4(EXPERTS, 2 * INNER, HIDDEN), random_int4(EXPERTS, HIDDEN, INNER))
            for _ in range(copies)
        ]
    )
    x, (chosen, shares, counts) = activation(tokens, HIDDEN), chosen_experts(tokens)

    def experts(tile: Tile | None) -> None:
        tiles = expert_tiles(tokens, packed=True) if tile is None else ExpertTiles(tile, tile)
        gate_up, down = next(pairs)
        blocks = sort_by_expert(chosen, counts, tiles.rows)
        experts_packed(x, gate_up, down, blocks, shares, tiles)

    return experts


def compile_only(case: Case, tile: Tile) -> None:
    try:
        make(case, 1)(tile)
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources:
        pass  # too large for the card: `report` prints it


def kernel_times(work: Callable[[], None]) -> dict[str, float]:
    """Microseconds that `work` spends in each kernel, means."""
    for _ in range(3):
        work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(LAUNCHES):
            work()
        torch.cuda.synchronize()
    return {each.key: each.device_time_total / LAUNCHES for each in seen.key_averages()}


def report(case: Case, top: int) -> None:
    launch = make(case, 2 if case[0] == "experts" else 24)
    found: dict[str, list[tuple[float, str]]] = {}
    for tile in (None, *candidates(case)):
        try:
            times = kernel_times(partial(launch, tile))
        except triton.runtime.errors.OutOfResources:
            continue
        for kernel, each in times.items():
            if "packed" in kernel:
                found.setdefault(kernel, []).append((each, "as chosen" if tile is None else str(tuple(tile))))
    for kernel, rows in found.items():
        best = sorted(rows[1:])[:top]
        text = "  ".join(f"{each:7.1f} {tile}" for each, tile in (rows[0], *best))
        print(f"{case[0]:8} {case[1]:5} tokens {kernel:14} us: {text}", flush=True)


def report_wide(tokens: int) -> None:
    launch = make(("experts", tokens), 2)
    narrow = sum(kernel_times(lambda: launch(None)).values())
    gate_up, down = random_int4(EXPERTS, 2 * INNER, HIDDEN), random_int4(EXPERTS, HIDDEN, INNER)
    x, (chosen, shares, counts) = activation(tokens, HIDDEN), chosen_experts(tokens)

    def wide() -> None:
        experts_wide(x.x_TD, widen(gate_up), widen(down), chosen, shares, counts, emulated=True)

    times = sorted(((each, kernel) for kernel, each in kernel_times(wide).items()), reverse=True)
    total = sum(each for each, _ in times)
    parts = "  ".join(f"{each:.0f} {kernel[:28]}" for each, kernel in times[:5])
    print(f"experts  {tokens:5} tokens: narrow {narrow:8.0f} us, wide {total:8.0f} us: {parts}", flush=True)


if __name__ == "__main__":
    main()
