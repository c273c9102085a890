"""w4a8 means one thing (tests/loud.py): plain torch and CPU variants; tests/gpu has the Triton kernels."""

import pytest
import torch

from moe_worker.kernels.cpu import build, library
from moe_worker.models import attention_build, mla
from moe_worker.models.native import NativeModel
from moe_worker.models.runner import ModelRunner
from moe_worker.quant import int8
from tests.loud import CPU, DIVERGED, TOLERANCE, difference, model, plain_logits, run


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


@pytest.mark.parametrize("axes", [{1: 2}, {1: (0, 1)}], ids=["rows of kv_b_proj", "all heads"])
def test_scales_of_w_uk_and_w_uv_for_anything_else_would_show(axes, expected, monkeypatch):
    monkeypatch.setattr(attention_build, "round_columns", lambda x, axis: shared(x, axes[axis]))
    assert difference(plain_logits(), expected) > DIVERGED


def shared(weight, axis):
    """int8 with one scale for all along `axis`."""
    scales = weight.abs().amax(dim=axis, keepdim=True) / 127
    return (weight / scales).round() * scales


@pytest.mark.parametrize(
    "change",
    [
        (attention_build, "round_columns", lambda x, _: x),
        (attention_build, "round_columns", lambda x, _: x.bfloat16().float()),
        (attention_build, "round_columns", shared),
        (mla.LatentAttention, "_rounded", lambda _, x: x),
    ],
    ids=["weights not rounded", "bfloat16", "scales that are no powers of two", "inputs not rounded"],
)
def test_other_roundings_of_w_uk_and_w_uv_would_show(change, expected, monkeypatch):
    monkeypatch.setattr(*change)
    assert difference(plain_logits(), expected) > 50 * TOLERANCE["cpu"]
