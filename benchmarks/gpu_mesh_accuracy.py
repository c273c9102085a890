"""How far logits of a mesh, and of one GPU, are from those of the same weights in float32.

Both round to bf16, in another order: in a stage of several ranks each one rounds its sum of experts. Where
two experts have nearly the same score, a rounded bit decides which of them a token takes, and then its logits
differ as much as the experts do. So a row of logits says little; the distribution over many rows does, and so
do routes that no rounding changes (`settle_routes`).
"""

import torch
from torch import Tensor

from benchmarks.gpu_mesh_case import PAGE, Case, cache_of_width, random_tokens
from benchmarks.gpu_random import random_model
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.deepseek import DeepseekModel, MoeBlock
from moe_worker.models.runner import ModelRunner

SEQUENCES = 4
# An error is a detour by another expert where it is larger than rounding can make it.
DETOUR = 0.05


def settle_routes(model: DeepseekModel) -> None:
    """Biases of routers become so different that all tokens take the same experts, whatever is rounded."""
    for number, layer in enumerate(model.layers):
        if isinstance(layer.block, MoeBlock) and layer.block.router.bias_E is not None:
            bias_E = layer.block.router.bias_E
            order_E = torch.randperm(len(bias_E), generator=torch.Generator().manual_seed(number))
            bias_E.copy_(torch.pow(2.0, order_E))  # no two groups of experts have equal sums


@torch.inference_mode()
def row_errors(case: Case, prompt: int) -> tuple[Tensor, Tensor]:
    """Of the logits of all tokens of four prompts, relative to their norms: by the mesh, and by one GPU."""
    pages, shards = -(-prompt // PAGE), case.member.shape.expert
    segments = [
        Segment(
            random_tokens(prompt, n, case.config.vocab_size),
            0,
            list(range(n * pages, (n + 1) * pages)),
            n % shards,
        )
        for n in range(SEQUENCES)
    ]
    ours, alone = case.both(segments, every=True)
    exact = _exact(case, segments, SEQUENCES * pages)
    return _relative(ours, exact), _relative(alone, exact)


def _exact(case: Case, segments: list[Segment], pages: int) -> Tensor:
    """Logits in float32, in plain torch."""
    config, device = case.config, case.cache.device
    model = random_model(case.values, case.number_format, case.context, device, torch.float32)
    if case.change is not None:
        case.change(model)
    width = config.latent.kv_lora_rank + config.latent.qk_rope_head_dim
    cache = cache_of_width(width, config.num_hidden_layers, pages, device, torch.float32)
    batch = Batch.of(segments, cache)
    return ModelRunner(model).logits(batch, cache, range(len(batch.tokens)))


def _relative(actual: Tensor, exact: Tensor) -> Tensor:
    errors_N: Tensor = (actual - exact).norm(dim=-1) / exact.norm(dim=-1)
    return errors_N


def described(errors_N: Tensor) -> dict[str, float]:
    """Of the errors of all rows: the median, nine of ten, the largest, and the share of detours."""
    return {
        "median": float(errors_N.median()),
        "nine of ten": float(errors_N.quantile(0.9)),
        "largest": float(errors_N.max()),
        "share of rows by other experts": float((errors_N > DETOUR).float().mean()),
    }
