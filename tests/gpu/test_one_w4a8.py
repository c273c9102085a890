"""w4a8 means one thing (tests/loud.py): Triton kernels against plain torch; tests/worker has the CPU's."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from moe_worker.models import cuda
from moe_worker.models.cuda_build import Sizes, prepare
from moe_worker.models.cuda_runner import CudaRunner
from tests.gpu.device import DEVICE, needs_device
from tests.loud import SHAPE, TOLERANCE, config_of, difference, model, plain_logits, run

pytestmark = needs_device


@pytest.mark.parametrize("wide", [False, True])
@torch.inference_mode()
def test_triton_kernels_compute_what_plain_torch_does(wide, monkeypatch):
    monkeypatch.setattr(cuda, "WIDE_TOKENS_PACKED", 1 if wide else 8192)
    latent = config_of(SHAPE).latent
    # Large passes on FP8 tensor cores round otherwise: test_cuda_engine.py.
    prepared = replace(prepare(model(DEVICE, torch.bfloat16), consume=True), e4m3=False)
    width = Sizes.of(latent).cache_width(latent)
    actual = run(lambda cache: CudaRunner(prepared, cache, 8, 128, 256), DEVICE, torch.bfloat16, width)
    assert difference(actual, plain_logits()) < TOLERANCE["triton"]
