"""Programmatic dependent launch: a kernel starts, and reads weights, while the one before it still runs.

Kernels that are launched with the options of `launch` call `wait_for_inputs` before they read what the kernel
before them writes, and before they write. The next kernel's programs may start once all of this one's have
waited, so that at most two kernels are resident, and what the kernels before the previous one wrote can be
read at once, as can weights, positions and page tables, which no kernel of a pass writes.
"""

import torch
import triton
import triton.language as tl

from moe_worker.kernels.triton.tiles import COMPILED


def _supported() -> bool:
    """Whether the device has the instructions: Hopper and newer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


DEPENDENT = tl.constexpr(bool(COMPILED.value) and _supported())
# Tokens of a pass up to which its kernels start early; more was not measured. Projections in tiles are
# not launched this way: their first programs crowd on the multiprocessors that are free early, and a product
# with one or two programs for each then takes longer (on an H200, 4 % of a whole step of 256 tokens).
MOST_TOKENS = 2048


def launch(tokens: int) -> dict[str, bool]:
    """Options of a launch in a pass of `tokens` tokens; interpreted kernels know none."""
    return {"launch_pdl": True} if DEPENDENT.value and tokens <= MOST_TOKENS else {}


@triton.jit
def wait_for_inputs():
    """Waits until the kernels before are done, and their writes can be read; then the next one may start."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def let_next_start():
    """The next kernel may start; for one that waits for what it needs in another way."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
