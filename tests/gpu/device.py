"""Where the tests of Triton kernels run: on a GPU, or interpreted on the CPU."""

import math
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

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")]


def multiply_in_e4m3(monkeypatch):
    """Lets large passes multiply in e4m3; where the device has no such grouped product, by plain torch."""
    from moe_worker.kernels.triton import e4m3  # noqa: PLC0415 - triton is not everywhere

    if e4m3.lacking(DEVICE) is not None:
        monkeypatch.setattr(e4m3, "lacking", lambda _: None)
        monkeypatch.setattr(e4m3, "grouped", plain_grouped)


def plain_grouped(x, weight, ends_A):
    """What the library multiplies on a GPU. Behind the last end it writes nothing."""
    out = torch.full((len(x.values), weight.values.shape[1]), math.nan, dtype=torch.bfloat16, device=DEVICE)
    begin = 0
    for values_OI, scales_O, end in zip(*weight, ends_A.tolist(), strict=True):
        own = x.values[begin:end].float() * x.scales[begin:end, None]
        out[begin:end] = (own @ (values_OI.float() * scales_O[:, None]).t()).bfloat16()
        begin = end
    return out
