"""A mesh on the Triton kernels gives what the kernels of one process give. Triton interprets them here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.mesh_ranks import free_address

pytest.importorskip("triton")

from moe_worker.mesh.fixed import capacity_for

ROOT = Path(__file__).parents[2]
SECONDS = 1200  # interpreted kernels take most of it


def test_capacity_is_what_balanced_routing_needs_and_a_margin():
    assert capacity_for(20, 32, 8) == 20  # too few for less than all to be worth it
    assert capacity_for(1000, 2, 6) == 1000  # nearly every token needs both ranks
    assert capacity_for(1000, 32, 8) == 280  # 1 - (31 / 32) ** 8 = 0.224 of them, and a quarter more
    assert all(capacity_for(tokens, 8, 8) <= tokens for tokens in range(1, 300))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    ("mesh", "cases"), [("1x2", ["dense", "w4a8", "overflow"]), ("2x1", ["dense", "w4a8"])], ids=str
)
def test_a_mesh_computes_what_one_process_computes(tmp_path, mesh, cases):
    """Prompts, mixed steps, decode steps, and shards without tokens; engines one and two steps ahead."""
    address, file = free_address(), tmp_path / "found"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.worker.kernel_ranks"]
    ranks = [
        subprocess.Popen([*command, str(rank), mesh, address, str(file), *cases], cwd=ROOT, env=environment)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(SECONDS) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = json.loads(file.read_text())
    # The sums of each rank's experts are rounded to bf16 before they are added; a pipeline adds no rounding.
    limit = 0.02 if mesh == "1x2" else 0.0
    for case in found.values():
        assert all(worst <= limit for _, worst in case["differences"]), found
    assert found["dense"]["ours"] == found["dense"]["ahead"]
    assert found["dense"]["ours"][1] == found["dense"]["alone"][1]  # every token is counted once
    if mesh == "2x1":
        assert found["dense"]["ours"] == found["dense"]["alone"]
