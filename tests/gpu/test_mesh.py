"""A mesh of GPUs, over NCCL, gives what one of them gives, also behind moves of experts."""

import pytest
import torch

from moe_worker.config.mesh import MeshShape
from tests.worker.test_mesh_kernels import CASES, FOUR_RANKS, check, found_by_ranks

GPUS = torch.cuda.device_count()
two, four = (pytest.mark.skipif(count > GPUS, reason=f"needs {count} CUDA devices") for count in (2, 4))
pytestmark = pytest.mark.gpu
MESHES = [pytest.param(*case, marks=two) for case in CASES]
MESHES += [pytest.param(*case, marks=four) for case in FOUR_RANKS]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mesh", "cases"), MESHES)
def test_several_gpus_compute_what_one_computes(tmp_path, mesh, cases):
    found = found_by_ranks(tmp_path, mesh, cases, {"TRITON_INTERPRET": "0"})
    check(found, mesh)
    sizes = {1: 64, 2: 32, 4: 32}
    assert found["uneven"]["graphs"] == [sizes[MeshShape.parse(mesh).expert]]  # of the largest shard
