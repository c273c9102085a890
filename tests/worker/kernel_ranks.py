"""One rank of a mesh on the Triton kernels; interpreted where there is no GPU.

    TRITON_INTERPRET=1 python -m tests.worker.kernel_ranks RANK MESH ADDRESS FILE CASE...

Each rank draws the same random models and keeps its part of them. Rank 0 compares with the whole model on the
kernels of one process, and writes what it found to FILE.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("MOE_WORKER_MESH_SECRET", "of these ranks")

import torch
import torch.distributed as dist

from benchmarks.gpu_mesh_accuracy import described, row_errors, settle_routes
from benchmarks.gpu_mesh_case import Case, difference, random_tokens
from benchmarks.gpu_random import SMALL
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.requests import Request
from moe_worker.mesh import cuda_stage, fixed
from moe_worker.mesh.member import join
from moe_worker.models import cuda
from moe_worker.models.batch import Segment
from moe_worker.sampling.parameters import SamplingParameters
from tests.gpu.device import DEVICE, multiply_in_e4m3

VALUES = SMALL | {"num_hidden_layers": 2}
CONTEXT, MOVE_S = 64, 60
# The number formats of cases that are named by something else.
ON = {"overflow": "dense", "settled": "dense", "moved": "w4a8", "large": "w4a8", "uneven": "w4a8"}
# A greedy token counts as that of one process if that scores it at most this much below its own: a share of
# the norm of the row.
NEARLY = 0.02


def member_device(rank):
    return f"cuda:{rank}" if DEVICE.type == "cuda" else "cpu"


def compare(case, shards):
    """Differences of a pass with prompts, a mixed one, a decode step, and one in which one shard has work."""
    counts, found = [3, 2, 4, 2], []
    texts = [random_tokens(count + 2, n, 500) for n, count in enumerate(counts)]
    pages = [[2 * n, 2 * n + 1] for n in range(4)]

    def after(n, at=0):
        at += counts[n]
        return Segment(texts[n][at : at + 1], at, pages[n], n % shards)

    prompts = [
        Segment(t[:c], 0, pages[n], n % shards) for n, (t, c) in enumerate(zip(texts, counts, strict=True))
    ]
    steps = [
        prompts,
        [after(0), after(1), Segment(random_tokens(3, 9, 500), 0, [8], shards - 1)],
        [after(2), after(3)],
        [after(0, 1)],
    ]
    for segments in steps:
        found.append(difference(*case.both(segments)))
    return found


def compare_uneven(case, shards):
    """Differences of passes whose shards alone would have graphs of different sizes: the first one records
    the graph, later ones launch it. And of the greedy tokens, how many are those of one process.
    """
    found, same, rows = [], 0, 0
    for turn in range(3):
        counts = [30, 11] if turn % 2 == 0 else [11, 30]
        owners = [0, 0] if shards == 1 else [turn % shards, (turn + 1) % shards]
        segments = [
            Segment(random_tokens(count, 10 * turn + n, 500), 0, list(range(4 * n, 4 * n + 4)), owners[n])
            for n, count in enumerate(counts)
        ]
        ours, alone = case.both(segments)
        found.append(difference(ours, alone))
        lost = alone.max(dim=-1).values - alone.gather(-1, ours.argmax(dim=-1, keepdim=True))[:, 0]
        same += int((lost <= NEARLY * alone.norm(dim=-1)).sum())
        rows += len(ours)
    return found, [same, rows]


def generated(loaded, flights):
    core = EngineCore(loaded, EngineOptions(max_batch_size=4, prefill_tokens=64), flights=flights)
    for number in range(2):
        sampling = SamplingParameters(max_tokens=3, ignore_eos=True)
        core.submit(Request(number, tuple(random_tokens(3 + number, number, 500)), sampling, 0))
    found = [[] for _ in range(2)]
    while not core.idle:
        for delta in core.step():
            found[delta.id].append(delta.token)
    return found, {layer.layer: sum(layer.tokens) for layer in core.expert_statistics.layers}


@torch.inference_mode()
def move(runner):
    """Experts of all layers, twice; the numbers of the layers whose places have changed."""
    rebalancing, end = runner.rebalancing, time.monotonic() + MOVE_S
    while rebalancing.count < 2:
        assert time.monotonic() < end, "experts have not moved"
        runner.tend()
        time.sleep(0.01)
    while rebalancing.moving:
        runner.tend()
        time.sleep(0.01)
    return sorted(rebalancing.places.moved)


def run_case(member, name):
    number_format, shards = ON.get(name, name), member.shape.expert
    few = (lambda tokens, ranks, top_k: max(1, tokens // 3)) if name == "overflow" else fixed.capacity_for
    cuda_stage.capacity_for = few
    redundant = shards * 2 if number_format == "w4a8" and shards > 1 else 0
    change = settle_routes if name in {"settled", "large", "uneven"} else None
    if name == "large":
        multiply_in_e4m3(SimpleNamespace(setattr=setattr))
        cuda.WIDE_TOKENS_E4M3 = 1
    device, moving = torch.device(member_device(member.rank)), 0.01 if name == "moved" else 0.0
    case = Case(
        member, VALUES, number_format, device, CONTEXT, 4, 20, 64, redundant, moving=moving, change=change
    )
    if not member.leads:
        case.runner.follow()
        return None
    if name == "uneven":
        differences, tokens = compare_uneven(case, shards)
        case.end()
        graphs = sorted(size.tokens for size in case.part.prompts._graphs)
        return {"differences": differences, "tokens": tokens, "graphs": graphs}
    report = {"differences": compare(case, shards)}
    if name == "settled":
        report["errors"] = [described(each) for each in row_errors(case, 4)]
    if name == "moved":
        report["moved"] = move(case.runner)
        report["differences"] += compare(case, shards)
    if name == "dense":
        ours, ahead, alone = (
            generated(loaded, flights)
            for loaded, flights in ((case.loaded(), 1), (case.loaded(), 2), (case.loaded_alone(), 1))
        )
        report |= {"ours": ours, "ahead": ahead, "alone": alone}
    case.end()
    return report


def main():
    rank, mesh, address, file, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    device = member_device(rank)
    options = EngineOptions(device=device, mesh=mesh, mesh_leader=address, mesh_rank=int(rank))
    member = join(options, "digest", torch.device(device))
    member.quiet()  # interpreted kernels leave the thread that beats no time on a busy machine
    reports = {name: run_case(member, name) for name in cases}
    if member.leads:
        Path(file).write_text(json.dumps(reports))
    dist.barrier()
    if DEVICE.type == "cuda":
        os._exit(0)  # NCCL keeps connections for as long as graphs hold them
    member.close()


if __name__ == "__main__":
    main()
