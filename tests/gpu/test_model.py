"""Plain torch on a GPU computes what it computes on a CPU."""

import pytest

import moe_worker
from tests.checkpoints import write_checkpoint
from tests.gpu.device import needs_cuda

pytestmark = needs_cuda


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_computes_the_same(tmp_path, dtype):
    directory = write_checkpoint(tmp_path)
    ids = [7 * place % 300 + 2 for place in range(50)]
    exact = moe_worker.Engine(directory, device="cpu").logits(ids)
    gpu = moe_worker.Engine(directory, device="cuda", dtype=dtype).logits(ids)
    assert (gpu - exact).norm() <= {"float32": 1e-4, "bfloat16": 0.1}[dtype] * exact.norm()
