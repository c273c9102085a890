"""W4A8 products for the few tokens of a small decode step, without tensor cores.

With a token or two a step costs what its slowest chain of loads costs. A program here loads all it needs of
the weights at once, before it waits for its inputs, and multiplies in words of four int8 values (dp4a). How
it loads, rounds and multiplies is few_int4.py for int4 weights, and few_sparse14.py for 1:4 sparse ones.

Legend: T tokens, K experts a token, M = T * K rows, N outputs of a program.
"""

from typing import NamedTuple, TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.kernels.triton import few_int4, few_sparse14
from moe_worker.kernels.triton.launch import launch, wait_for_inputs
from moe_worker.kernels.triton.norm import Activation
from moe_worker.kernels.triton.packed import Packed, PackedInt4, PackedSparse14
from moe_worker.quant.int4 import GROUP

# Tokens up to which these kernels are faster than those of tiles: each row of experts reads its own weights.
FEW_TOKENS = 4
FEW_TOKENS_OF_EXPERTS = 2
# Groups that a program's registers hold.
MOST_GROUPS = 64


@triton.jit(do_not_specialize=["tokens"])
def _linear_few(
    x, x_scale, words, scales, out, tokens,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = few_int4.load_weights(words, scales, n, OUTPUTS, GROUPS, BLOCK)
    wait_for_inputs()
    for token in range(tokens):
        if ROUNDED:
            inputs = few_int4.load_token(x, x_scale, token, GROUPS, BLOCK)
        else:
            inputs = few_int4.round_token(x, token, GROUPS, BLOCK)
        y_N = few_int4.multiply(weights, inputs)
        tl.store(out + token * OUTPUTS + n, y_N.to(out.dtype.element_ty), mask=n < OUTPUTS)


@triton.jit
def _expert_of(
    experts, row, PER_TOKEN: tl.constexpr, ROUTED: tl.constexpr, FIRST: tl.constexpr, KNOWN: tl.constexpr
):
    """The expert of a row. KNOWN: whether the choice was written before the previous kernel; otherwise what
    the router chose must be waited for.
    """
    column = row % PER_TOKEN
    expert = FIRST + column - ROUTED
    if column < ROUTED:
        if not KNOWN:
            wait_for_inputs()
        expert = tl.load(experts + row)
    return expert.to(tl.int64)


@triton.jit
def _load_weights(
    words, scales, n, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr
):
    if SPARSE:
        weights = few_sparse14.load_weights(words, scales, n, OUTPUTS, GROUPS, BLOCK)
    else:
        weights = few_int4.load_weights(words, scales, n, OUTPUTS, GROUPS, BLOCK)
    return weights


@triton.jit
def _multiply(weights, token, SPARSE: tl.constexpr):
    return few_sparse14.multiply(weights, token) if SPARSE else few_int4.multiply(weights, token)


@triton.jit
def _gate_up_few(
    x, x_scale, words, scales, experts, hidden,
    PER_TOKEN: tl.constexpr, ROUTED: tl.constexpr, FIRST: tl.constexpr, INNER: tl.constexpr,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = _expert_of(experts, row, PER_TOKEN, ROUTED, FIRST, False)
    if expert >= 0:
        own, own_scales = words + expert * STRIDE, scales + expert * (GROUPS * 2 * INNER)
        gate = _load_weights(own, own_scales, n, 2 * INNER, GROUPS, SPARSE, BLOCK)
        up = _load_weights(own, own_scales, INNER + n, 2 * INNER, GROUPS, SPARSE, BLOCK)
        wait_for_inputs()
        if SPARSE:
            token = few_sparse14.load_token(x, x_scale, row // PER_TOKEN, GROUPS, BLOCK)
        else:
            token = few_int4.load_token(x, x_scale, row // PER_TOKEN, GROUPS, BLOCK)
        gate_N, up_N = _multiply(gate, token, SPARSE), _multiply(up, token, SPARSE)
        tl.store(hidden + row * INNER + n, gate_N / (1.0 + tl.exp(-gate_N)) * up_N)


@triton.jit
def _down_few(
    hidden, words, scales, experts, shares, out,
    PER_TOKEN: tl.constexpr, ROUTED: tl.constexpr, FIRST: tl.constexpr, OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = _expert_of(experts, row, PER_TOKEN, ROUTED, FIRST, True)
    if expert >= 0:
        own, own_scales = words + expert * STRIDE, scales + expert * (GROUPS * OUTPUTS)
        weights = _load_weights(own, own_scales, n, OUTPUTS, GROUPS, SPARSE, BLOCK)
        wait_for_inputs()
        if SPARSE:
            token = few_sparse14.round_hidden(hidden, row, GROUPS, BLOCK)
        else:
            token = few_int4.round_hidden(hidden, row, GROUPS, BLOCK)
        y_N = _multiply(weights, token, SPARSE) * tl.load(shares + row)
        tl.store(out + row * OUTPUTS + n, y_N.to(tl.bfloat16), mask=n < OUTPUTS)


def takes(weight: Tensor | Packed, x: Activation, most: int = FEW_TOKENS) -> TypeGuard[PackedInt4]:
    """Whether `linear_few` multiplies `x`, of up to `most` tokens, by `weight`.

    It reads one scale of `x` for each group. Values of heads have more where a head's are no whole groups.
    """
    return (
        x.x_TD.shape[0] <= most
        and x.piece == GROUP
        and isinstance(weight, PackedInt4)
        and weight.int8
        and weight.inputs % GROUP == 0
        and weight.groups <= MOST_GROUPS
    )


def takes_experts(weight: Tensor | Packed, x: Activation) -> TypeGuard[PackedInt4 | PackedSparse14]:
    """Whether `experts_few` takes experts of `weight`, and as many tokens as `x` has."""
    if isinstance(weight, PackedSparse14):
        return x.x_TD.shape[0] <= FEW_TOKENS_OF_EXPERTS and weight.groups <= MOST_GROUPS
    return takes(weight, x, FEW_TOKENS_OF_EXPERTS)


class Cut(NamedTuple):
    """How a product is cut: groups, or pairs of sparse ones, times outputs of a program, and its warps;
    measured as tiles are.
    """

    rows: int
    warps: int

    def options(self, weight: Packed) -> dict[str, int]:
        """Arguments of a launch."""
        sparse = isinstance(weight, PackedSparse14)
        block = triton.next_power_of_2(-(-weight.groups // 2) if sparse else weight.groups)
        block_n = max(4, min(64, self.rows // block))
        return {"GROUPS": weight.groups, "BLOCK": block, "BLOCK_N": block_n, "num_warps": self.warps}


LINEAR, GATE_UP, DOWN = Cut(256, 4), Cut(256, 4), Cut(512, 4)


def linear_few(x: Activation, weight: Packed, out_TO: Tensor, rounded: bool = True) -> None:
    """Writes x W^T to `out_TO` (any floating dtype), as `linear_packed` does; `takes` says whether it can.

    rounded: whether `x` has its int8 side; otherwise the kernel rounds the bf16 one.
    """
    tokens, options = x.x_TD.shape[0], LINEAR.options(weight)
    _linear_few[(triton.cdiv(weight.outputs, options["BLOCK_N"]),)](
        (x.q_TD if rounded else x.x_TD).view(torch.int32), x.scales_TX, weight.stored.view(torch.int32),
        weight.scales, out_TO, tokens, OUTPUTS=weight.outputs, ROUNDED=rounded, **options, **launch(tokens),
    )  # fmt: skip


class Taken(NamedTuple):
    """Experts int32 [T, K] of each token, the first `routed` of which the router chose.

    Those behind are `first`, `first` + 1 ... for every token: their weights are read before the choice is
    known.
    """

    experts_TK: Tensor
    routed: int
    first: int


def gate_up_few(x: Activation, gate_up: Packed, taken: Taken) -> Tensor:
    """Hidden values of each row, float32 [M, I]; rows of expert -1 are not written."""
    (tokens, per_token), inner = taken.experts_TK.shape, gate_up.outputs // 2
    rows, options = tokens * per_token, GATE_UP.options(gate_up)
    hidden_MI = torch.empty(rows, inner, dtype=torch.float32, device=x.x_TD.device)
    _gate_up_few[(inner // options["BLOCK_N"], rows)](
        x.q_TD.view(torch.int32), x.scales_TX, gate_up.stored.view(torch.int32), gate_up.scales,
        taken.experts_TK, hidden_MI, PER_TOKEN=per_token, ROUTED=taken.routed, FIRST=taken.first,
        INNER=inner, STRIDE=gate_up.stride // 4, SPARSE=isinstance(gate_up, PackedSparse14), **options,
        **launch(tokens),
    )  # fmt: skip
    return hidden_MI


def down_few(hidden_MI: Tensor, down: Packed, taken: Taken, weights_TK: Tensor) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D], of hidden values rounded to int8 in groups."""
    tokens, per_token = taken.experts_TK.shape
    rows, options = tokens * per_token, DOWN.options(down)
    out_MD = torch.empty(rows, down.outputs, dtype=torch.bfloat16, device=hidden_MI.device)
    _down_few[(triton.cdiv(down.outputs, options["BLOCK_N"]), rows)](
        hidden_MI, down.stored.view(torch.int32), down.scales, taken.experts_TK, weights_TK, out_MD,
        PER_TOKEN=per_token, ROUTED=taken.routed, FIRST=taken.first, OUTPUTS=down.outputs,
        STRIDE=down.stride // 4, SPARSE=isinstance(down, PackedSparse14), **options, **launch(tokens),
    )  # fmt: skip
    return out_MD


def experts_few(x: Activation, gate_up: Packed, down: Packed, taken: Taken, weights_TK: Tensor) -> Tensor:
    """Weighted outputs of each row, bf16 [M, D], to be summed over K, as `experts_packed` gives them; `x` is
    `by_position` where `gate_up` is sparse. `takes_experts` says whether it can.

    Rows of expert -1 are not written.
    """
    return down_few(gate_up_few(x, gate_up, taken), down, taken, weights_TK)
