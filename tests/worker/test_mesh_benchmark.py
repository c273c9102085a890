"""`python -m benchmarks.mesh --json` prints one object a line, with the same fields in each."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import mesh
from benchmarks.mesh_balance import drawn_windows, row
from benchmarks.mesh_model import simulated_rows
from benchmarks.mesh_running import Moves, Steps

ROOT = Path(__file__).parents[2]
FIELDS = ["what", "ours", "baseline", "ratio", "unit", "device", "simulated"]


def test_figures_have_all_fields_and_their_ratio():
    one, two = Steps(0.01, 0.0, 0, 0, 0, (0.1,)), Steps(0.016, 0.004, 900, 640, 64, (0.5, 0.2))
    rows = [*mesh.step_rows("2x2", two, one), *mesh.pipeline_rows("2x2", two, two)]
    rows += [*mesh.moves_rows(Moves([0.012, 0.018], [0.01, 0.01, 0.02], 3)), mesh.load_row("before")]
    rows += simulated_rows()
    assert all(list(each) == FIELDS for each in rows)
    found = {each["what"]: each for each in rows}
    assert found["exchange of tokens in a step, mesh 2x2"]["ratio"] == pytest.approx(0.25)
    (stall,) = (each for what, each in found.items() if "median in between" in what and "worst" in what)
    assert stall["ratio"] == pytest.approx(1.8)
    assert "3 rebalancings, 2 steps" in stall["what"]


def test_copies_even_out_drawn_loads():
    windows = list(drawn_windows(random.Random(0), layers=2, windows=3, experts=64))
    found = row("synthetic, 64 experts", windows, 8, 8)
    assert list(found) == FIELDS
    assert found["simulated"]
    assert found["ours"] >= 0.93
    assert found["baseline"] < 0.8


def test_kernels_that_run_at_the_same_time_count_once():
    pytest.importorskip("triton")
    from benchmarks.gpu_mesh_measure import covered  # noqa: PLC0415 - triton is not everywhere

    assert covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4
    assert covered([]) == 0


@pytest.mark.soak
def test_the_command_runs_to_its_end():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.mesh", "--json", "--short"],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(list(each) == FIELDS for each in rows)
    text = " | ".join(each["what"] for each in rows)
    for part in ("mesh 1x2", "mesh 2x1", "mesh 2x2", "bubble of rank 1", "experts move", "recorded", "1x32"):
        assert part in text
