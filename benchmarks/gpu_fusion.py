"""How far a layer is fused on a GPU: kernels of one decoded token, against the eager model of transformers.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_fusion [--formats bf16 fp8 w4a16 w4a8] [--json]

Both have the shape of gpu_random.LARGE. A layer's count is that of a step of three layers less that of two.
`operators` are calls of torch operators that compute something (views left out): nodes of the model's graph.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.commands import need_gpu
from benchmarks.gpu_decode import FORMATS, row
from benchmarks.gpu_random import LARGE, random_model
from moe_worker.bench.fusion import Operators, eager_step, kernels_of
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.cuda_build import prepare
from moe_worker.models.cuda_graph import DecodeGraphs

CONTEXT, PAGE, LAYERS = 64, 16, (2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    need_gpu(parser, "`moe-worker explain MODEL --fusion` counts on a CPU, too")
    kernels, operators = unfused("cuda", LARGE)
    for name in args.formats:
        ours = fused(FORMATS[name])
        for what, baseline in (("kernels", kernels), ("kernels against operators", operators)):
            found = row(f"{what} of a layer, {name}", ours, baseline, "launches")
            found["fused"] = round(1 - ours / baseline, 3)
            print(json.dumps(found) if args.json else found, flush=True)


@torch.inference_mode()
def unfused(device: str, shape: dict[str, Any]) -> tuple[int, int]:
    """Kernels (0 on a CPU) and operators of one layer of transformers' eager model."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # noqa: PLC0415 - only the baseline

    kernels, operators = [], []
    for layers in LAYERS:
        config = DeepseekV3Config(**{k: v for k, v in shape.items() if k != "model_type"})
        config.num_hidden_layers, config.num_key_value_heads = layers, config.num_attention_heads
        with torch.device(device):
            make: Any = DeepseekV3ForCausalLM._from_config  # noqa: SLF001 - the way to a random model
            model = make(
                config, attn_implementation="eager", experts_implementation="eager", dtype=torch.bfloat16
            ).eval()
        tokens = torch.arange(16, device=device)[None] + 2
        step = eager_step(model, tokens, torch.tensor([[5]], device=device))
        step()
        kernels.append(kernels_of(step) if device == "cuda" else 0)
        with Operators() as seen:
            step()
        operators.append(seen.count)
        del model, step
    return kernels[1] - kernels[0], operators[1] - operators[0]


@torch.inference_mode()
def fused(number_format: str) -> int:
    """Kernels of one layer of this engine."""
    device = torch.device("cuda")
    plain = random_model(LARGE | {"num_hidden_layers": LAYERS[-1]}, number_format, CONTEXT, device)
    shape = CacheShape(LAYERS[-1], plain.config.attention.cache_width, PAGE, torch.bfloat16)
    cache, model = PagedCache.allocate(shape, CONTEXT // PAGE, device), prepare(plain)
    counts = []
    for layers in LAYERS:
        part = replace(cache, layers=cache.layers[:layers])
        graphs = DecodeGraphs(replace(model, layers=model.layers[:layers]), part, 1, CONTEXT)
        graphs.run(1)
        counts.append(kernels_of(partial(graphs.run, 1)))
    return counts[1] - counts[0]


if __name__ == "__main__":
    main()
