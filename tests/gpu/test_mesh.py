"""A mesh of two GPUs, over NCCL, gives what one of them gives, also behind moves of experts."""

import pytest
import torch

from tests.worker.test_mesh_kernels import CASES, check, found_by_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mesh", "cases"), CASES, ids=str)
def test_two_gpus_compute_what_one_computes(tmp_path, mesh, cases):
    found = found_by_ranks(tmp_path, mesh, cases, {"TRITON_INTERPRET": "0"})
    check(found, mesh)
    assert found["uneven"]["graphs"] == [32 if mesh == "1x2" else 64]  # of the shard with more tokens
