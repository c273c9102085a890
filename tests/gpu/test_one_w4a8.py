"""w4a8 means one thing: the same layers through plain torch, every CPU variant and the Triton kernels.

Weights are drawn so that rounding anywhere else than docs/formats.md says would show. A few inputs of each
product (the *loud* ones) are 300 times as large as the others, and have weights of 0: they do nothing but
coarsen the scale of the piece in which they lie. The other inputs of that piece have weights of 0, too. Cut
otherwise, int8 would round to 0 what the result is made of. W_UK and W_UV have loud columns, whose inputs are 0:
with a scale for a row, nothing would be left of the others.
"""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_random import SMALL, RandomSource, config_of
from moe_worker.kernels.cpu import build, library
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.models import cuda
from moe_worker.models.batch import Batch, Segment
from moe_worker.models.build import build_model
from moe_worker.models.cuda_build import Sizes, prepare
from moe_worker.models.cuda_runner import CudaRunner
from moe_worker.models.native import NativeModel
from moe_worker.models.runner import NativeRunner, TorchRunner
from moe_worker.quant import int8
from moe_worker.quant.int4 import quantize_int4
from tests.gpu.device import DEVICE, needs_device

pytestmark = needs_device
CPU = torch.device("cpu")
# Pieces: of hidden states (192) and of an expert's values 64, of a dense block's (320) 128 although 128 do not
# divide them, of attention's output (6 heads of 64) 64 although 128 divide it.
SHAPE = SMALL | {"num_hidden_layers": 2, "moe_intermediate_size": 192}
LOUD = 300.0
TOKENS = torch.randint(500, (24,), generator=torch.Generator().manual_seed(1)).tolist()
# Shares of the logits' length. Plain torch and the CPU kernels compute in float32, the Triton kernels in bf16.
TOLERANCE = {"cpu": 0.003, "triton": 0.05}
# What plain torch itself is off by when it rounds otherwise.
DIVERGED = 0.15


class LoudSource(RandomSource):
    """Random weights with loud rows, and columns of 0 where their results are read; the same on all devices."""

    def __init__(self, device, dtype):
        super().__init__(CPU, dtype, "w4a8")
        self.target, self.config = device, config_of(SHAPE)

    def take(self, name, *shape, dtype=None):
        values = super().take(name, *shape, dtype=dtype)
        last, latent = name.split(".")[-2], self.config.latent
        if last in ("input_layernorm", "post_attention_layernorm", "norm"):
            values[-64:] *= LOUD
        elif last == "q_a_layernorm":
            values[0] = 0
        elif last == "kv_a_layernorm":
            values[0] = 0  # the latent that W_UV's loud column reads
        elif last == "gate":
            values[:, -64:] = 0
        elif last == "kv_b_proj":
            heads = values.view(latent.num_attention_heads, -1, latent.kv_lora_rank)
            heads[:, 0] *= LOUD  # W_UK's first column: `matrix` makes the queries that it reads 0
            heads[:, latent.qk_nope_head_dim :, 0] *= LOUD
            heads[0, latent.qk_nope_head_dim :] *= LOUD
        return values.to(self.target)

    def matrix(self, name, outputs, inputs):
        plain = RandomSource.take(self, name, outputs, inputs, dtype=torch.float32)
        part, latent = name.split(".")[-2], self.config.latent
        if part == "q_b_proj":
            plain.view(latent.num_attention_heads, -1, inputs)[:, 0] = 0
        elif part == "o_proj":
            plain[:, : latent.v_head_dim] = 0
        elif part == "up_proj":
            plain[self._loud(name, outputs)] *= LOUD
        elif part == "down_proj":
            plain[:, self._quiet(name, inputs)] = 0
        if part in ("q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "lm_head"):
            plain[:, -64:] = 0
        return quantize_int4(plain).map(lambda tensor: tensor.to(self.target))

    def _loud(self, name, width):
        """Of the hidden values: in each expert the last 64, in a dense block some of its second piece of 128."""
        if "layers.0" in name:
            return slice(140, 150)
        return torch.arange(width) % self.config.moe.intermediate >= self.config.moe.intermediate - 64

    def _quiet(self, name, width):
        return slice(128, 256) if "layers.0" in name else self._loud(name, width)


def model(device, dtype):
    return build_model(config_of(SHAPE), LoudSource(device, dtype), 128)


def run(runner, device, dtype, width=None):
    config = config_of(SHAPE)
    shape = CacheShape(config.num_hidden_layers, width or config.attention.cache_width, 16, dtype)
    cache = PagedCache.allocate(shape, 4, device)
    batch = Batch.of([Segment(TOKENS, 0, [2, 1])], cache)
    return runner(cache).logits(batch, cache, range(len(TOKENS))).float().cpu()


@torch.inference_mode()
def plain_logits():
    return run(lambda cache: TorchRunner(model(CPU, torch.float32)), CPU, torch.float32)


@pytest.fixture(scope="module")
def expected():
    return plain_logits()


def difference(actual, expected):
    """Of the median token: where two experts score alike, a token may go to the other one."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def variants():
    try:
        return library.supported_variants()
    except build.BuildError:
        return ()


@pytest.mark.parametrize("variant", variants())
@torch.inference_mode()
def test_cpu_kernels_compute_what_plain_torch_does(variant, expected):
    native = NativeModel(model(CPU, torch.float32), library.Kernels(variant))
    actual = run(lambda cache: NativeRunner(native), CPU, torch.float32)
    assert difference(actual, expected) < TOLERANCE["cpu"]


@pytest.mark.parametrize("wide", [False, True])
@torch.inference_mode()
def test_triton_kernels_compute_what_plain_torch_does(wide, expected, monkeypatch):
    monkeypatch.setattr(cuda, "WIDE_TOKENS_PACKED", 1 if wide else 8192)
    latent = config_of(SHAPE).latent
    prepared = prepare(model(DEVICE, torch.bfloat16), consume=True)
    actual = run(
        lambda cache: CudaRunner(prepared, cache, 8, 128, 256),
        DEVICE,
        torch.bfloat16,
        Sizes.of(latent).cache_width(latent),
    )
    assert difference(actual, expected) < TOLERANCE["triton"]


@pytest.mark.parametrize("piece", [64, 128, 10**6])
def test_pieces_cut_in_any_other_way_would_show(piece, expected, monkeypatch):
    """The test of the tests: 64 everywhere breaks dense blocks, 128 hidden states, and one scale a row all."""
    rounded = int8.round_pieces
    monkeypatch.setattr("moe_worker.kernels.linear.round_pieces", lambda x_TI, _: rounded(x_TI, piece))
    assert difference(plain_logits(), expected) > DIVERGED
