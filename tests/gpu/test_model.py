"""Plain torch on a GPU computes what it computes on a CPU."""

import pytest

import moe_worker
from tests.checkpoints import write_checkpoint
from tests.gpu.device import needs_cuda

pytestmark = needs_cuda


@pytest.mark.parametrize(("dtype", "share", "limit"), [("float32", 1.0, 1e-4), ("bfloat16", 0.5, 0.05)])
def test_a_gpu_computes_the_same(tmp_path, dtype, share, limit):
    """In bfloat16, most rows: a token whose experts change differs, on a CPU as well."""
    directory = write_checkpoint(tmp_path)
    ids = [7 * place % 300 + 2 for place in range(50)]
    exact = moe_worker.Engine(directory, device="cpu").logits(ids)
    gpu = moe_worker.Engine(directory, device="cuda", dtype=dtype).logits(ids)
    errors = (gpu - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.quantile(share) <= limit
