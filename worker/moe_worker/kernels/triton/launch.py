"""Programmatic dependent launch: a kernel starts, and reads weights, while the one before it still runs.

Kernels that are launched with the options of `launch` call `wait_for_inputs` before they read what other
kernels of the pass write, and before they write. What no kernel of a pass writes (weights, positions, page
tables) may be read earlier. They call `start_next` first, so that the next kernel's programs are resident
when this one's end. A kernel that waits for the one before it, which waited too, waits for all of them.
"""

import torch
import triton
import triton.language as tl

from moe_worker.kernels.triton.tiles import COMPILED


def _supported() -> bool:
    """Whether the device has the instructions: Hopper and newer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


DEPENDENT = tl.constexpr(bool(COMPILED.value) and _supported())
# Tokens of a pass up to which its kernels start early. Where all kernels did, a layer took longer on an H200
# than its kernels timed one by one: 7 us at 16 tokens, 19 at 64, 16 at 256. Waiting programs that take the
# next kernel's places may be why; that is not established, and larger passes were not timed without.
MOST_TOKENS = 16


def launch(tokens: int) -> dict[str, bool]:
    """Options of a launch in a pass of `tokens` tokens; interpreted kernels know none."""
    return {"launch_pdl": True} if DEPENDENT.value and tokens <= MOST_TOKENS else {}


@triton.jit
def start_next():
    """Lets the next kernel's programs start as soon as all of this one's have."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs():
    """Waits until the kernels before are done, and their writes can be read."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
