"""The Triton kernels and the engine over them without a GPU: Triton interprets them, in plain Python.

In a process of its own, since Triton decides when it is imported. A choice of tests/gpu: all take minutes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
KERNELS, ENGINE, W4A8 = "triton_kernels", "cuda_engine", "one_w4a8"
EXCHANGE, OFFLOAD, DRAW = "exchange_kernels", "kv_offload", "draw"
CHOSEN = {
    KERNELS: (
        "(not_numbers and (20 or nan)) or nobody or norm or emulated_rounding or order or widened"
        " or (router and not 37) or padding or sorted or dense_block or latents"
        " or (few and (200-1 or elsewhere)) or (linear and w4a8-320-130-77)"
        " or (attention and 6-8-counts1-4) or (experts and 64-40 and (narrow or bf16 or w4a8)) or likeliest"
        " or (expanded and (INT8-3-64 or INT8-4-48)) or (no_whole_pieces and INT8)"
        " or (parts and w4a16-1) or fp8_weights or packed_sparse or their_order"
        " or (sparse and (1-384 or 1-256)) or (half_empty and 128)"
        " or nearest or (weights_in_e4m3 and 256) or linear_in_e4m3"
    ),
    ENGINE: "nobody or counted",
    W4A8: "plain_torch and False",
    EXCHANGE: "reaches or told",
    DRAW: "reference and 1.0-dtype0-9001 or fail",
}
"""Words that choose tests of each file. They run in one process: to import and collect takes it 3.5 s."""
SLOW = {
    "offload": {OFFLOAD: "evicted"},
    "more kernels": {
        KERNELS: "not_numbers or not_a_number or router or (few and 256-128-1) or (iteration and w4a8-320-2)"
        " or (linear and 320-130-77) or expanded or (experts and 64-40) or (sparse and (40-128 or 2-640))"
        " or experts_in_e4m3 or waits_for_the_first",
    },
    "more of the engine": {ENGINE: "small-w4a8 or padded-dense or values-w4a8 or values-fp8 or in_e4m3"},
    "captured passes": {ENGINE: "captured_passes"},
    "sparse layers": {ENGINE: "sparse_layers"},
    "few tokens": {ENGINE: "decode and whole"},
    "draws": {DRAW: "reference or ties or batch or truncation"},
    "wide w4a8": {W4A8: "plain_torch and True"},
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "chosen",
    [CHOSEN, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW.values())],
    ids=["chosen", *SLOW],
)
def test_kernels_agree_with_plain_torch(chosen):
    options = ["-q", "-p", "no:cacheprovider", "--timeout=580"]
    words = " or ".join(f"(test_{file}.py and ({some}))" for file, some in chosen.items())
    files = [f"tests/gpu/test_{file}.py" for file in chosen]
    command = [sys.executable, "-m", "pytest", *options, *files, "-k", words]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
