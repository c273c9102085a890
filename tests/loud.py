"""A random model in w4a8 in which rounding anywhere else than docs/formats.md says would show.

A few inputs of each product (the *loud* ones) are 300 times as large as the others and have weights of 0: all
they do is to coarsen the scale of the piece in which they lie. With pieces cut otherwise, or with one scale a
row, int8 would round to 0 what results are made of, or would keep what it should not. W_UK has a loud
output, which meets latents of 0, and a head of W_UV is loud, which the output projection leaves out: with
scales that several outputs share, nothing would be left of the other ones.
"""

import torch

from benchmarks.gpu_random import SMALL, RandomSource, config_of
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.build import build_model
from moe_worker.models.runner import ModelRunner
from moe_worker.quant.int4 import quantize_int4

CPU = torch.device("cpu")
# Pieces: 64 of hidden states and of an expert's values (192); 128 of a dense block's, although these are 320;
# 64 of attention's output, although 128 divides it: it is 6 heads of 64.
SHAPE = SMALL | {"num_hidden_layers": 2, "moe_intermediate_size": 192, "n_shared_experts": 1}
LOUD = 300.0
# Sequences are short: a value at the edge of two bfloat16 or int8 numbers may round either way, and what
# follows in its sequence then differs, too.
TOKENS = torch.randint(500, (8, 3), generator=torch.Generator().manual_seed(1)).tolist()
# Shares of the logits' length: plain torch and the CPU kernels compute in float32, Triton kernels in bf16.
TOLERANCE = {"cpu": 1e-4, "triton": 0.05}
# What plain torch itself is off by, at least, when it rounds otherwise.
DIVERGED = 0.08


class LoudSource(RandomSource):
    """Random weights with loud rows, and columns of 0 where these are read; the same on all devices."""

    def __init__(self, device, dtype):
        super().__init__(device, dtype, "w4a8")
        self.drawn, self.config = RandomSource(CPU, dtype, "w4a8"), config_of(SHAPE)

    def take(self, name, *shape, dtype=None):
        values = self.drawn.take(name, *shape, dtype=dtype)
        last, latent = name.split(".")[-2], self.config.latent
        if last in ("input_layernorm", "post_attention_layernorm", "norm"):
            values[-64:] *= LOUD
        elif last == "q_a_layernorm":
            values[0] = 0
        elif last == "kv_a_layernorm":
            values[0] = 0  # the latent that meets W_UK's loud output
        elif name.endswith("gate.weight"):
            values[:, -64:] = 0
        elif last == "kv_b_proj":
            heads = values.view(latent.num_attention_heads, -1, latent.kv_lora_rank)
            heads[:, : latent.qk_nope_head_dim, 0] *= LOUD
            heads[0, latent.qk_nope_head_dim :] *= LOUD
        return values.to(self.device)

    def matrix(self, name, outputs, inputs):
        plain = self.drawn.take(name, outputs, inputs, dtype=torch.float32)
        part, latent = name.split(".")[-2], self.config.latent
        if part == "o_proj":
            plain[:, : latent.v_head_dim] = 0
        elif part == "up_proj":
            plain[self._loud(name, outputs)] *= LOUD
        elif part == "down_proj":
            plain[:, self._loud(name, inputs)] = 0
        if part in ("q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "lm_head"):
            plain[:, -64:] = 0
        return quantize_int4(plain).map(lambda tensor: tensor.to(self.device))

    def _loud(self, name, width):
        """Hidden values: the last 64 of an expert, some in a dense block's second piece of 128."""
        if "layers.0" in name:
            return slice(140, 150)
        return torch.arange(width) % self.config.moe.intermediate >= self.config.moe.intermediate - 64


def model(device, dtype):
    return build_model(config_of(SHAPE), LoudSource(device, dtype), 128)


def run(runner, device, dtype, width=None):
    config = config_of(SHAPE)
    shape = CacheShape(config.num_hidden_layers, width or config.attention.cache_width, 16, dtype)
    cache = PagedCache.allocate(shape, len(TOKENS), device)
    batch = Batch.of([Segment(each, 0, [page]) for page, each in enumerate(TOKENS)], cache)
    return runner(cache).logits(batch, cache, range(len(batch.tokens))).float().cpu()


@torch.inference_mode()
def plain_logits():
    return run(lambda cache: ModelRunner(model(CPU, torch.float32)), CPU, torch.float32)


def difference(actual, expected):
    """Of the median token: where two experts have nearly the same score, a token may go to the other one."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
