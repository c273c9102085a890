"""Decode and prefill on a GPU, beside vLLM's figures for the same shape; random weights, context 512.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_decode [--formats bf16 w4a8] [--batch 1 16 64 256]
        [--tokens 128] [--rounds 5] [--profile] [--launches] [--json]

Needs torch and triton only. First the kernels are compared with plain float64 torch on a small model. The
peer is vLLM 0.26 with bf16 weights (CUDA graphs, FLASH_ATTN_MLA), measured on one H200 with the same shape;
on another card the ratio means nothing.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.gpu_random import SMALL, PlainModel, Shape, random_model
from moe_worker.models.cuda import CudaModel, DecodeGraph

# vLLM 0.26 bf16 on one H200, 2026-11-23: tokens a second at each batch size, and of prefill.
PEER_DECODE = {1: 312, 16: 4430, 64: 14518, 256: 28291}
PEER_PREFILL = 90_000
PAGE = 64
CONTEXT = 512
PREFILL_CHUNK = 32  # sequences of CONTEXT tokens in one pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["bf16", "w4a8"], choices=["bf16", "w4a8"])
    parser.add_argument("--batch", nargs="+", type=int, default=sorted(PEER_DECODE))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--launches", action="store_true", help="kernel launches of one layer")
    parser.add_argument("--skip-prefill", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with torch.inference_mode():
        for name in args.formats:
            error, same = disagreement(name == "w4a8")
            note(
                args,
                f"{name}: small model beside float64: logits differ by {error:.4f}, same tokens {same}",
            )
            for row in measure(name, args):
                report(row, args)


def measure(name: str, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    torch.manual_seed(0)
    device = torch.device("cuda")
    pages = (CONTEXT + args.tokens) // PAGE + 1
    most = max(*args.batch, PREFILL_CHUNK)
    model, _, _ = random_model(Shape(), most * pages, PAGE, name == "w4a8", device)
    for cache in model.caches:
        cache.normal_()
    if args.launches:
        note(args, f"{name}: {launches_per_layer(model)} launches a layer with experts")
    for batch in args.batch:
        rate = decode_rate(model, batch, pages, args)
        yield row(f"decode {name}, batch {batch}", rate, PEER_DECODE.get(batch))
    if not args.skip_prefill:
        yield row(f"prefill {name}", prefill_rate(model, pages, args), PEER_PREFILL)


def row(what: str, ours: float, peer: float | None) -> dict[str, object]:
    return {
        "what": what, "ours": round(ours, 1), "peer": peer, "ratio": round(ours / peer, 3) if peer else None,
        "unit": "tokens/s", "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def started(model: CudaModel, batch: int, pages: int) -> DecodeGraph:
    graph = DecodeGraph(model, batch, pages)
    graph.pages_BP.copy_(torch.arange(batch * pages, device="cuda").view(batch, pages))
    graph.tokens_B.random_(model.embedding_VD.shape[0])
    graph.positions_B.fill_(CONTEXT)
    graph.capture()
    return graph


def decode_rate(model: CudaModel, batch: int, pages: int, args: argparse.Namespace) -> float:
    graph = started(model, batch, pages)
    seconds = []
    for _ in range(args.rounds):
        graph.positions_B.fill_(CONTEXT)
        seconds.append(timed(lambda: graph.steps(args.tokens)))
    if args.profile:
        graph.positions_B.fill_(CONTEXT)
        profile(graph, batch)
    return float(batch * args.tokens / statistics.median(seconds))


def prefill_rate(model: CudaModel, pages: int, args: argparse.Namespace) -> float:
    pages_BP = torch.arange(PREFILL_CHUNK * pages, device="cuda", dtype=torch.int32).view(
        PREFILL_CHUNK, pages
    )
    tokens_T = torch.randint(model.embedding_VD.shape[0], (PREFILL_CHUNK * CONTEXT,), device="cuda")
    last_B = torch.arange(1, PREFILL_CHUNK + 1, device="cuda") * CONTEXT - 1

    def once() -> None:
        shared = model.prefill_pass([0] * PREFILL_CHUNK, [CONTEXT] * PREFILL_CHUNK, pages_BP)
        x_TD, added_MD = model.forward(tokens_T, shared)
        added_TKD = added_MD.unflatten(0, (tokens_T.shape[0], -1))
        model.logits(x_TD[last_B], added_TKD[last_B].flatten(0, 1)).argmax(-1)

    once()
    seconds = [timed(once) for _ in range(args.rounds)]
    if args.profile:
        print_profile("prefill", once)
    return float(tokens_T.shape[0] / statistics.median(seconds))


def timed(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def profile(graph: DecodeGraph, batch: int) -> None:
    print_profile(f"decode step, batch {batch}", graph.step)


def print_profile(title: str, work: Callable[[], object]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda each: -each.device_time_total)
    total = sum(each.device_time_total for each in rows)
    print(f"--- {title}: {total / 1e3:.3f} ms in kernels")
    for each in rows[:14]:
        mean = each.device_time_total / each.count
        print(f"{each.device_time_total / 1e3:9.3f} ms {each.count:5d} x {mean:8.1f} us  {each.key[:70]}")


def launches_per_layer(model: CudaModel) -> int:
    """Kernels of a step with three layers less those of a step with two."""
    counts: list[int] = []
    for layers in (2, 3):
        part = replace(model, layers=model.layers[:layers], caches=model.caches[:layers])
        graph = DecodeGraph(part, 16, 16)
        graph.run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            graph.run()
            torch.cuda.synchronize()
        counts.append(sum(each.count for each in seen.key_averages()))
    return counts[1] - counts[0]


def disagreement(quantized: bool) -> tuple[float, str]:
    """On a small model: the median token's relative error of logits, and how many decoded tokens agree."""
    torch.manual_seed(1)
    device = torch.device("cuda")
    model, layers, head_VD = random_model(SMALL, 32, PAGE, quantized, device)
    plain = PlainModel(SMALL, model.embedding_VD, layers, head_VD, quantized)
    pages_BP = torch.tensor([[3, 1, 5, 7]], dtype=torch.int32, device=device)
    tokens_T = torch.randint(SMALL.vocabulary, (100,), device=device)
    shared = model.prefill_pass([0], [100], pages_BP)
    ours_TV = model.logits(*model.forward(tokens_T, shared)).double()
    exact_TV = plain.logits(tokens_T)
    errors_T = (ours_TV - exact_TV).norm(dim=1) / exact_TV.norm(dim=1)
    graph = DecodeGraph(model, 1, 4)
    graph.pages_BP.copy_(pages_BP)
    graph.tokens_B.copy_(ours_TV[-1:].argmax(-1))
    graph.positions_B.fill_(100)
    same, text = 0, torch.cat((tokens_T, graph.tokens_B))
    graph.capture()
    for _ in range(32):
        graph.step()
        same += int(plain.logits(text)[-1].argmax()) == int(graph.tokens_B)
        text = torch.cat((text, graph.tokens_B))
    return float(errors_T.median()), f"{same}/32"


def note(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text, flush=True)


def report(values: dict[str, object], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(values), flush=True)
        return
    peer = "" if values["peer"] is None else f"  vLLM bf16 {values['peer']}  {values['ratio']}x"
    print(f"{values['what']:26} {values['ours']:>12} tokens/s{peer}", flush=True)


if __name__ == "__main__":
    main()
