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
FILES = {
    "kernels": "tests/gpu/test_triton_kernels.py",
    "engine": "tests/gpu/test_cuda_engine.py",
    "few tokens": "tests/gpu/test_cuda_engine.py",
    "w4a8": "tests/gpu/test_one_w4a8.py",
}
CHOSEN = {
    "kernels": "not_numbers or not_a_number or nobody or norm or rounding or order or widened or router"
    " or padding or sorted or dense_block or latents"
    " or (few and (200-1 or 256-128-1 or elsewhere)) or (iteration and w4a8-320-2)"
    " or (linear and 320-130-77) or (attention and 6-8-counts1-4) or (experts and 64-40)",
    "engine": "nobody or small-w4a8 or padded-dense or counted",
    "few tokens": "decode and whole",
    "w4a8": "plain_torch",
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("part", FILES)
def test_kernels_agree_with_plain_torch(part):
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_, FILES[part], "-k", CHOSEN[part]]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=390, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
