"""Times tilings of the int4 products of a model on this GPU; the tiling that the kernels select is first.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_tiles [--tokens 1 16 64 256] [--cases input down ...]
        [--top 4] [--layer] [--few] [--sparse] [--attention] [--wide]

The products are those of one layer of the shape in benchmarks/gpu_random.py, in W4A8, and its attention by KV
splits. Several processes compile the kernels first. A time is that of one launch among 20 in a CUDA graph,
on weights that no cache holds; kernels start while the one before still runs, so that one alone takes longer.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from benchmarks.commands import need_gpu, positive
from benchmarks.gpu_random import LARGE, random_model
from moe_worker.kernels.triton import few
from moe_worker.kernels.triton import linear as linear_kernels
from moe_worker.kernels.triton.attention import AttentionTile, TokenTiles, attend, merge_values
from moe_worker.kernels.triton.e4m3 import experts_e4m3
from moe_worker.kernels.triton.experts import (
    Blocks,
    down_packed,
    expert_tiles,
    experts_packed,
    gate_up_packed,
    sort_by_expert,
)
from moe_worker.kernels.triton.latent import write_latents
from moe_worker.kernels.triton.linear import linear_packed, linear_tile
from moe_worker.kernels.triton.norm import Activation, Added, Rounding, round_values
from moe_worker.kernels.triton.packed import Packed, PackedInt4, PackedSparse14
from moe_worker.kernels.triton.products import Tile
from moe_worker.kernels.triton.wide import experts_wide, widen
from moe_worker.models.cuda import Rows
from moe_worker.models.cuda_build import prepare
from moe_worker.models.cuda_layer import Products, linear, norm

HIDDEN, INNER = LARGE["hidden_size"], LARGE["moe_intermediate_size"]
EXPERTS, PER_TOKEN = LARGE["n_routed_experts"] + 2, LARGE["num_experts_per_tok"] + 2
LINEAR = {"input": (3648, HIDDEN), "output": (HIDDEN, 2048), "head": (102400, HIDDEN)}
CASES = ("gate_up", "down", *LINEAR)
LAUNCHES = 20
CONTEXT, PAGE, HEADS, RANK, ROPE, VALUE = 512, 16, 16, 512, 64, 128
Case = tuple[str, int]
Launch = Callable[[Tile | None], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=positive, default=[1, 16, 64, 256])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--few", action="store_true", help="kernels without tensor cores and the others")
    parser.add_argument("--sparse", action="store_true", help="experts with 1:4 sparse weights, too")
    parser.add_argument("--wide", action="store_true", help="experts over dequantized weights, too")
    parser.add_argument("--layer", action="store_true", help="each kernel of a layer")
    parser.add_argument("--attention", action="store_true", help="attention by its number of KV splits")
    parser.add_argument("--top", type=positive, default=4, help="tilings that are printed")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1)
    args = parser.parse_args()
    need_gpu(parser)
    cases = [(name, tokens) for tokens in args.tokens for name in args.cases]
    jobs = [(case, tile) for case in cases for tile in candidates(case)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes) as pool:
        pool.starmap(compile_only, jobs, chunksize=2)
    for case in cases:
        report(case, args.top)
    for tokens in args.tokens if args.layer else ():
        report_layer(tokens)
    for tokens in (1, 2) if args.few else ():
        report_few(tokens)
    for tokens in args.tokens if args.attention else ():
        report_attention(tokens)
    for tokens in args.tokens if args.sparse else ():
        report_sparse(tokens)
    for tokens in args.tokens if args.wide else ():
        report_wide(tokens)


def candidates(case: Case) -> Iterator[Tile]:
    """Tiles worth a try: their sums fit the registers."""
    name, tokens = case
    if name in LINEAR:
        narrow = [(16, 2), (32, 2), (32, 4), (64, 4)] if tokens <= 64 else [(64, 4), (128, 8)]
        rows = [16] if tokens <= 16 else [16, 32, 64] if tokens <= 64 else [32, 64, 128]
        ahead = [(3, 2), (2, 4), (3, 4)] if tokens <= 64 else [(3, 1), (4, 1), (3, 2)]
        for (n, warps), m, (stages, turn) in itertools.product(narrow, rows, ahead):
            yield Tile(n, m, warps, stages, turn)
        return
    rows = [16] if tokens <= 64 else [16, 32, 64] if tokens <= 1024 else [32, 64]
    ahead = [(3, 1), (5, 1), (2, 2), (3, 2)] if tokens <= 64 else [(3, 1), (4, 1)]
    for (n, warps), m, (stages, turn) in itertools.product([(64, 4), (128, 4), (128, 8)], rows, ahead):
        yield Tile(n, m, warps, stages, turn)
        # So few registers that a multiprocessor holds three programs, or four.
        if warps == 4:
            yield Tile(n, m, warps, stages, turn, 168 if n * m > 2048 else 128)


def random_int4(*sizes: int) -> PackedInt4:
    *leading, outputs, inputs = sizes
    groups = inputs // 128
    packed = torch.randint(0, 256, (*leading, groups, outputs, 64), dtype=torch.uint8, device="cuda")
    return PackedInt4(packed, torch.rand(*leading, groups, outputs, device="cuda") * 0.01, inputs)


def random_sparse14(*sizes: int) -> PackedSparse14:
    *leading, outputs, inputs = sizes
    groups = inputs // 128
    pairs = (*leading, -(-groups // 2), 3, outputs, 16)
    packed = torch.randint(0, 256, pairs, dtype=torch.uint8, device="cuda")
    return PackedSparse14(packed, torch.rand(*leading, groups, outputs, device="cuda") * 0.01, inputs)


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


def make(case: Case, copies: int) -> Launch:
    """A function that launches the case, as the model does for None; with several sets of weights in turn."""
    name, tokens = case
    return make_linear(name, tokens, copies) if name in LINEAR else make_experts(name, tokens, copies)


def make_linear(name: str, tokens: int, copies: int) -> Launch:
    outputs, inputs = LINEAR[name]
    weights = itertools.cycle([random_int4(outputs, inputs) for _ in range(copies)])
    x, out = activation(tokens, inputs), torch.empty(tokens, outputs, dtype=torch.bfloat16, device="cuda")

    def product(tile: Tile | None) -> None:
        weight = next(weights)
        if tile is None and few.takes(weight, x):
            few.linear_few(x, weight, out)
            return
        if tile is not None:
            linear_kernels.linear_tile = lambda *_: tile
        linear_packed(x, weight, out)
        linear_kernels.linear_tile = linear_tile

    return product


def make_experts(
    name: str, tokens: int, copies: int, draw: Callable[..., Packed] = random_int4
) -> Launch:  # fmt: skip
    sizes = (EXPERTS, 2 * INNER, HIDDEN) if name == "gate_up" else (EXPERTS, HIDDEN, INNER)
    drawn = [draw(*sizes) for _ in range(copies)]
    weights, kind = itertools.cycle(drawn), drawn[0].kind
    x, (chosen, shares, counts) = activation(tokens, HIDDEN), chosen_experts(tokens)
    hidden, sorted_blocks = activation(tokens * PER_TOKEN, INNER), dict[int, Blocks]()

    def experts(tile: Tile | None) -> None:
        if tile is None:
            tile = getattr(expert_tiles(tokens, kind, tokens * PER_TOKEN / EXPERTS), name)
        if tile.m not in sorted_blocks:
            sorted_blocks[tile.m] = sort_by_expert(chosen, counts, tile.m)
        blocks = sorted_blocks[tile.m]
        if name == "gate_up":
            gate_up_packed(x, next(weights), blocks, tokens * PER_TOKEN, PER_TOKEN, tile, kind)
        else:
            down_packed(hidden, next(weights), blocks, shares, tile)

    return experts


def compile_only(case: Case, tile: Tile) -> None:
    try:
        make(case, 1)(tile)
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources:
        pass  # too large for the card: `report` prints it


def microseconds(work: Callable[[], object], launches: int = LAUNCHES) -> float:
    """Of one launch, the median of five replays of a graph of several."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            work()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return float(statistics.median(times))


def report(case: Case, top: int) -> None:
    launch = make(case, 2 if case[0] in ("gate_up", "down", "head") else 24)
    found: list[tuple[float, str]] = []
    for tile in (None, *candidates(case)):
        try:
            time = microseconds(partial(launch, tile), LAUNCHES if case[1] <= 1024 else 2)
            found.append((time, "as chosen" if tile is None else str(tuple(tile))))
        except triton.runtime.errors.OutOfResources:
            continue
    best = sorted(found[1:])[:top]
    text = "  ".join(f"{each:7.1f} {tile}" for each, tile in (found[0], *best))
    print(f"{case[0]:8} {case[1]:5} tokens us: {text}", flush=True)


def report_sparse(tokens: int) -> None:
    """Products of experts, dense and 1:4 sparse; of these more sets, so that no cache holds them."""
    for name in ("gate_up", "down"):
        dense, sparse = make_experts(name, tokens, 5), make_experts(name, tokens, 12, random_sparse14)
        launches = LAUNCHES if tokens <= 1024 else 4
        times = [microseconds(partial(work, None), launches) for work in (dense, sparse)]
        print(
            f"{name:8} {tokens:5} tokens us: dense {times[0]:.1f}  1:4 {times[1]:.1f}"
            f"  {times[0] / times[1]:.2f} times as fast", flush=True,
        )  # fmt: skip


def report_few(tokens: int) -> None:
    pairs = itertools.cycle(
        [(random_int4(EXPERTS, 2 * INNER, HIDDEN), random_int4(EXPERTS, HIDDEN, INNER)) for _ in range(2)]
    )
    x, (chosen, shares, counts) = activation(tokens, HIDDEN), chosen_experts(tokens)
    cut, taken = expert_tiles(tokens, kind="w4a8"), few.Taken(chosen, PER_TOKEN - 2, EXPERTS - 2)
    blocks = sort_by_expert(chosen, counts, cut.rows)
    weights = itertools.cycle([random_int4(*LINEAR["input"]) for _ in range(24)])
    chosen_cuts = few.GATE_UP, few.DOWN
    wide_x, out = activation(tokens, HIDDEN), torch.empty(tokens, LINEAR["input"][0], device="cuda")
    hidden = few.gate_up_few(x, next(pairs)[0], taken)
    work = {
        "gate_up, few": lambda: few.gate_up_few(x, next(pairs)[0], taken),
        "down, few": lambda: few.down_few(hidden, next(pairs)[1], taken, shares),
        "experts, few": lambda: few.experts_few(x, *next(pairs), taken, shares),
        "tiles": lambda: experts_packed(x, *next(pairs), blocks, shares, cut),
        "input, few": lambda: few.linear_few(wide_x, next(weights), out),
        "tiles ": lambda: linear_packed(wide_x, next(weights), out),
    }
    text = "  ".join(f"{name} {microseconds(each):.1f}" for name, each in work.items())
    for cut_few in (few.Cut(*each) for each in ((128, 4), (256, 4), (256, 8), (512, 4), (512, 8))):
        few.GATE_UP = few.DOWN = cut_few
        each = [microseconds(work[name]) for name in ("gate_up, few", "down, few", "experts, few")]
        text += f"  {tuple(cut_few)} {' '.join(f'{time:.1f}' for time in each)}"
    few.GATE_UP, few.DOWN = chosen_cuts
    print(f"{tokens} tokens us: {text}", flush=True)


def report_attention(tokens: int) -> None:
    """Attention and merge of one layer by KV splits; what a decode step chooses is not marked."""
    pages = tokens * (CONTEXT // PAGE)
    table = torch.randperm(pages, device="cuda").int().view(tokens, -1)
    caches = [torch.randn(pages * PAGE, RANK + ROPE, device="cuda").bfloat16() for _ in range(8)]
    cycle = itertools.cycle(caches)
    numbers = torch.arange(tokens, dtype=torch.int32, device="cuda")
    tiles = TokenTiles(numbers, numbers, torch.ones_like(numbers), 1)
    positions = torch.full((tokens,), CONTEXT - 1, device="cuda")
    query = torch.randn(tokens, HEADS, RANK + ROPE, device="cuda").bfloat16()
    value = torch.randn(HEADS, RANK, VALUE, device="cuda").bfloat16()
    out = Activation.empty(tokens, HEADS * VALUE, query.device)
    found = []
    for slices, cut in attention_cuts(tokens):

        def attention() -> tuple[Tensor, Tensor]:
            return attend(query, next(cycle), table, positions, tiles, RANK, PAGE, 0.1, slices, cut)  # noqa: B023

        try:
            parts = attention()
        except triton.runtime.errors.OutOfResources:
            continue
        first = microseconds(attention)
        second = microseconds(lambda: merge_values(*parts, value, out, Rounding.INT8))  # noqa: B023
        found.append((first + second, f"{first:.1f} + {second:.1f} ({slices}, {tuple(cut)})"))
    print(
        f"attention {tokens:5} tokens us by KV splits: {'  '.join(text for _, text in sorted(found)[:6])}",
        flush=True,
    )


def attention_cuts(tokens: int) -> Iterator[tuple[int, AttentionTile]]:
    wanted = {1: [8, 16], 16: [4, 8, 16], 64: [1, 2, 4]}.get(tokens, [1, 2])
    cuts = [(32, 4, 3), (32, 8, 3), (64, 4, 2), (64, 8, 2), (64, 8, 3), (32, 4, 2)]
    return ((slices, AttentionTile(*cut)) for slices, cut in itertools.product(wanted, cuts))


def report_layer(tokens: int) -> None:
    """Each kernel of a layer in a row of itself: what it takes where its weights are in the cache."""
    with torch.inference_mode():
        model = prepare(random_model(LARGE | {"num_hidden_layers": 2}, "w4a8", 1024, torch.device("cuda")))
        layer, rows, width = model.layers[1], tokens * PER_TOKEN, RANK + ROPE
        pages = torch.randperm(tokens * (CONTEXT // PAGE), device="cuda").int().view(tokens, -1)
        cache = torch.randn(pages.numel() * PAGE, width, device="cuda").bfloat16()
        positions = torch.full((tokens,), CONTEXT - 1, device="cuda")
        shared = model.decode_pass(Rows(positions, pages[:, -1].long() * PAGE + PAGE - 1, pages), PAGE)
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        added, one = (Added(torch.randn(n, HIDDEN, device="cuda").bfloat16()) for n in (rows, tokens))
        read = norm(x, None, layer.attention_norm_D, 1e-6, layer.input, Products.GROUPS)
        joint = linear(read, layer.input, Products.GROUPS)
        query = torch.empty(tokens, HEADS, width, device="cuda", dtype=torch.bfloat16)
        out = Activation.empty(tokens, HEADS * VALUE, x.device)
        arguments = (joint[:, :-width], joint[:, -width:], layer.latent, shared.rotations_CP2)

        def attention() -> tuple[Tensor, Tensor]:
            return attend(query, cache, pages, positions, shared.tiles, RANK, PAGE, 0.1, shared.slices)

        write_latents(*arguments, positions, shared.rows_T, cache, query)
        parts = attention()
        layer.counts_A.zero_()
        chosen, _ = layer.routes(read.x_TD, None)

        def whole() -> Added:
            layer.counts_A.zero_()
            return layer.block(x, layer.attention(x, added, shared, cache), shared)

        parts_of = {
            "norm of 8": lambda: norm(x, added, layer.attention_norm_D, 1e-6, layer.input, Products.GROUPS),
            "input": lambda: linear(read, layer.input, Products.GROUPS),
            "latent": lambda: write_latents(*arguments, positions, shared.rows_T, cache, query),
            "attend": attention,
            "merge": lambda: merge_values(*parts, layer.value_HRV, out, Rounding.INT8),
            "output": lambda: linear(out, layer.output, Products.GROUPS),
            "norm of 1": lambda: norm(x, one, layer.block_norm_D, 1e-6, layer.gate_up, Products.GROUPS),
            "sort": lambda: sort_by_expert(chosen, layer.counts_A, 16),
            "route": lambda: layer.routes(read.x_TD, None),
            "layer": whole,
        }
        text = "  ".join(f"{name} {microseconds(work):.1f}" for name, work in parts_of.items())
    print(f"{tokens} tokens, us: {text}", flush=True)


def report_wide(tokens: int) -> None:
    gate_up, down = random_int4(EXPERTS, 2 * INNER, HIDDEN), random_int4(EXPERTS, HIDDEN, INNER)
    x, (chosen, shares, counts) = activation(tokens, HIDDEN), chosen_experts(tokens)

    def wide() -> None:
        experts_wide(x.x_TD, widen(gate_up), widen(down), chosen, shares, counts, emulated=True)

    def sort() -> Blocks:
        return sort_by_expert(chosen, counts, 64)

    rows = Activation.empty_for(Rounding.E4M3, tokens, HIDDEN, x.x_TD.device)
    rows.x_TD.copy_(x.x_TD)
    round_values(rows, Rounding.E4M3)

    def in_e4m3() -> None:
        experts_e4m3(rows, gate_up, down, chosen, shares, counts)

    times = {"bf16": wide, "e4m3": in_e4m3, "the sort for tiles": sort}
    text = "  ".join(f"{name} {microseconds(work, 2):.0f}" for name, work in times.items())
    print(f"experts over dequantized weights, {tokens:5} tokens us: {text}", flush=True)


if __name__ == "__main__":
    main()
