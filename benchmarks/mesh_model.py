"""A model of DeepSeek-V3 on many H200, from measured times of kernels and published rates of links.

Nothing here was run on such a machine: every figure is *simulated*. A decode step of each GPU reads its
attention weights, the experts that all tokens activate there, and its cache; before and after the experts of
a layer all GPUs exchange tokens. Assumptions, each varied alone by `simulated_rows`:

- reading: the share of the copy bandwidth (4.26 TB/s, measured) that a step of batch 256 reaches, 0.78
  (docs/benchmarks.md);
- an exchange between two H200: 6.0 us and 63 GB/s to one other GPU, from NCCL's 6.2 us for 3 kB (batch 1 of
  `benchmarks.gpu_mesh` in W4A8 on 1x2) and 8.7 and 14.4 us for 132 and 528 kB (batch 64 and 256 in bf16);
- packing: 21 us a layer for the four kernels that pack and unpack tokens, measured there at 128 tokens a GPU
  (13 us at one token);
- links: 450 GB/s a direction and GPU inside a host of 8 (NVLink 4, published by NVIDIA), 50 GB/s between
  hosts (400 Gb/s ConnectX-7), of which 0.7 are reached: an assumption;
- imbalance: the busiest GPU has 1 / 0.961 of the mean load, as `benchmarks.mesh_balance` finds for 8
  redundant of 64 experts; 1 / 0.649 is its figure for the checkpoint's order;
- nothing of an exchange is hidden behind computation;
- the leader's host prepares a step while the GPUs compute the one before. It needs at most 24 us for each
  sequence (a step of 256 sequences took 8.2 ms on two H200, most of it computation); the steps of many GPUs
  have many sequences, which is varied alone.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

LAYERS, DENSE, HIDDEN, VOCABULARY = 61, 3, 7168, 129280
EXPERTS, TOP_K = 256, 8
EXPERT_WEIGHTS = 3 * HIDDEN * 2048
DENSE_WEIGHTS = 3 * HIDDEN * 18432
ATTENTION_WEIGHTS = HIDDEN * 1536 + 1536 * 24576 + HIDDEN * 576 + 512 * 32768 + 16384 * HIDDEN
LATENT_BYTES = 2 * 576
HOST = 8
# int8 values, a scale for 128 of them, place and weight of each expert (4 bytes each); bf16 back.
SENT_BYTES, RETURNED_BYTES = HIDDEN + HIDDEN // 128 * 4 + 8 * TOP_K, 2 * HIDDEN


@dataclass(frozen=True)
class Assumptions:
    """bandwidth, inside and between hosts, to one other GPU (pair): bytes a second. weight_bytes: of W4A8,
    scales included. packing_s: of a layer. host_s: of the leader for each sequence.
    """

    bandwidth: float = 4.26e12
    reading: float = 0.78
    weight_bytes: float = 0.53
    latency_s: float = 6.0e-6
    pair: float = 63e9
    packing_s: float = 21e-6
    inside: float = 450e9
    between: float = 50e9
    reached: float = 0.7
    imbalance: float = 1 / 0.961
    host_s: float = 0.0


def step_s(gpus: int, batch: int, context: int, given: Assumptions) -> tuple[float, float]:
    """Seconds of a decode step outside exchanges, and in them. batch: sequences of each GPU."""
    held = EXPERTS / gpus
    activated = held * (1 - (1 - TOP_K / EXPERTS) ** (gpus * batch)) * given.imbalance
    moe = LAYERS - DENSE
    weights: float = LAYERS * ATTENTION_WEIGHTS + DENSE * DENSE_WEIGHTS + VOCABULARY * HIDDEN
    weights += moe * EXPERT_WEIGHTS * (1 + min(held, activated))
    read = weights * given.weight_bytes + LAYERS * batch * context * LATENT_BYTES
    return read / (given.bandwidth * given.reading), moe * exchange_s(gpus, batch, given)


def exchange_s(gpus: int, batch: int, given: Assumptions) -> float:
    """Seconds to the experts of a layer and back; a token goes once to each GPU that has one of its."""
    each = batch * (1 - (1 - 1 / gpus) ** TOP_K) * given.imbalance  # tokens to each other GPU
    near, far = min(gpus, HOST) - 1, max(0, gpus - HOST)
    nbytes = each * (SENT_BYTES + RETURNED_BYTES)
    links = max(near * nbytes / given.inside, far * nbytes / given.between) / given.reached
    return 2 * given.latency_s + given.packing_s + max(links, nbytes / given.pair)


BASE = Assumptions()
VARIED = {
    "as assumed": BASE,
    "links half as fast": replace(BASE, inside=BASE.inside / 2, between=BASE.between / 2),
    "exchanges with four times the latency": replace(BASE, latency_s=4 * BASE.latency_s),
    "nothing is packed, and links alone bound a pair": replace(BASE, packing_s=0.0, pair=math.inf),
    "reading at 0.55 of the bandwidth": replace(BASE, reading=0.55),
    "experts in the checkpoint's order": replace(BASE, imbalance=1 / 0.649),
    "perfectly even loads": replace(BASE, imbalance=1.0),
    "24 us of the leader's host for each sequence": replace(BASE, host_s=24e-6),
}


def simulated_rows(batch: int = 64, context: int = 4096) -> list[dict[str, Any]]:
    """Decode rates of one GPU; the baseline is the same with exchanges that take no time."""
    rows = []
    for gpus in (8, 32):
        for name, given in VARIED.items():
            compute, exchange = step_s(gpus, batch, context, given)
            step = max(compute + exchange, given.host_s * gpus * batch)
            ours, baseline = batch / step, batch / compute
            rows.append(
                {
                    "what": f"decode of DeepSeek-V3 in W4A8, 1x{gpus}, {batch} sequences a GPU, context "
                    f"{context}: {name}",
                    "ours": ours,
                    "baseline": baseline,
                    "ratio": ours / baseline,
                    "unit": "tokens/s a GPU",
                    "device": f"{gpus} H200",
                    "simulated": True,
                }
            )
    return rows
