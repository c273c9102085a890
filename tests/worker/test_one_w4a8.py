"""w4a8 means one thing (tests/loud.py): plain torch and CPU variants; tests/gpu has the Triton kernels."""

import pytest
import torch

from moe_worker.kernels.cpu import build, library
from moe_worker.models.native import NativeModel
from moe_worker.models.runner import ModelRunner
from moe_worker.quant import int8
from tests.loud import CPU, DIVERGED, TOLERANCE, LoudSource, difference, model, plain_logits, run


@pytest.fixture(scope="module")
def expected():
    return plain_logits()


def variants():
    try:
        return library.supported_variants()
    except build.BuildError:
        return ()


@pytest.mark.parametrize("variant", variants())
@torch.inference_mode()
def test_cpu_kernels_compute_what_plain_torch_does(variant, expected):
    native = NativeModel.of(model(CPU, torch.float32), library.Kernels(variant))
    actual = run(lambda cache: ModelRunner(native), CPU, torch.float32)
    assert difference(actual, expected) < TOLERANCE["cpu"]


@pytest.mark.parametrize("piece", [64, 128, 10**6])
def test_pieces_cut_in_any_other_way_would_show(piece, expected, monkeypatch):
    """64 everywhere breaks dense blocks, 128 hidden states, and one scale a row all."""
    rounded = int8.round_pieces
    monkeypatch.setattr("moe_worker.quant.matrix.round_pieces", lambda x_TI, _: rounded(x_TI, piece))
    assert difference(plain_logits(), expected) > DIVERGED


def test_kv_b_in_int8_would_show(expected, monkeypatch):
    """As the CPU kernels once had it: one scale a head and output row."""
    take = LoudSource.take

    def rounded(self, name, *shape, dtype=None):
        values, latent = take(self, name, *shape, dtype=dtype), self.config.latent
        if "kv_b_proj" in name:
            heads = values.view(latent.num_attention_heads, -1, latent.kv_lora_rank)
            key, value = heads.tensor_split([latent.qk_nope_head_dim], dim=1)
            for part, axis in ((key, 1), (value, 2)):  # W_UK is multiplied transposed
                scale = part.abs().amax(dim=axis, keepdim=True) / 127
                part.copy_((part / scale).round() * scale)
        return values

    monkeypatch.setattr(LoudSource, "take", rounded)
    assert difference(plain_logits(), expected) > DIVERGED
