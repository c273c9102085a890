"""Where the tests of Triton kernels run: on a GPU, or interpreted on the CPU."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
# bf16 keeps 8 bits: a rounded value is off by at most 2**-9 of itself. The interpreter cuts bits off instead.
BF16 = 8e-3 if INTERPRETED else 4e-3

needs_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not INTERPRETED, reason="needs a CUDA device, or TRITON_INTERPRET=1"
    ),
]
