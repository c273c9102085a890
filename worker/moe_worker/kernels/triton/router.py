"""Router in float32: scores in slices of the inputs, then the choice of experts with their histogram.

Legend: T tokens, D hidden, E routed experts, G groups, K experts a token, the shared ones behind the chosen,
S slices of the inputs, A all experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_worker.config.moe import Level, Routing
from moe_worker.kernels.triton.launch import launch, wait_for_inputs


@triton.jit
def _load_inputs(x, token_M, d, mask_M, WIDTH: tl.constexpr):
    """The inputs `d` of each token in float32: [M, D]."""
    from_x = x + token_M[:, None].to(tl.int64) * WIDTH + d[None, :]
    return tl.load(from_x, mask=mask_M[:, None] & (d < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_router(weight, d, e, WIDTH: tl.constexpr, EXPERTS: tl.constexpr):
    """The router's weights of the inputs `d`: [D, E]."""
    mask_dE = (d < WIDTH)[:, None] & (e < EXPERTS)[None, :]
    return tl.load(weight + e[None, :] * WIDTH + d[:, None], mask=mask_dE, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def _logits(
    x, weight, out, tokens,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e, d = tl.arange(0, BLOCK_E), tl.program_id(1) * SLICE + tl.arange(0, BLOCK_D)
    mask_M, mask_e = token_M < tokens, e < EXPERTS
    # With few tokens a program has no inputs but these.
    w_dE = _load_router(weight, d, e, WIDTH, EXPERTS)
    wait_for_inputs()
    x_Md = _load_inputs(x, token_M, d, mask_M, WIDTH)
    # Three products of 10-bit parts are as exact as float32, and run on tensor cores.
    logits_ME = tl.dot(x_Md, w_dE, input_precision="tf32x3")
    for start in range(BLOCK_D, SLICE, BLOCK_D):
        x_Md = _load_inputs(x, token_M, d + start, mask_M, WIDTH)
        w_dE = _load_router(weight, d + start, e, WIDTH, EXPERTS)
        logits_ME += tl.dot(x_Md, w_dE, input_precision="tf32x3")
    to = out + (token_M[:, None] * tl.num_programs(1) + tl.program_id(1)) * EXPERTS + e[None, :]
    tl.store(to, logits_ME, mask=mask_M[:, None] & mask_e[None, :])


@triton.jit
def _kept_groups(
    choice_ME, e, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The choice with experts outside the best groups of one level at -inf."""
    EACH: tl.constexpr = EXPERTS // GROUPS
    g = tl.arange(0, BLOCK_G)[None, :]
    group_MG = tl.full((choice_ME.shape[0], BLOCK_G), float("-inf"), tl.float32)
    for i in tl.static_range(GROUPS):
        own_ME = tl.where(e // EACH == i, choice_ME, float("-inf"))
        score_M = tl.max(own_ME, axis=1)
        if BEST == 2:
            best_M = tl.argmax(own_ME, axis=1)
            score_M += tl.max(tl.where(e == best_M[:, None], float("-inf"), own_ME), axis=1)
        group_MG = tl.where(g == i, score_M[:, None], group_MG)
    kept_ME = tl.zeros(choice_ME.shape, tl.int32)
    for _ in tl.static_range(KEPT):
        best_M = tl.argmax(group_MG, axis=1)
        kept_ME = tl.where(e // EACH == best_M[:, None], 1, kept_ME)
        group_MG = tl.where(g == best_M[:, None], float("-inf"), group_MG)
    return tl.where(kept_ME > 0, choice_ME, float("-inf"))


@triton.jit(do_not_specialize=["tokens"])
def _choose(
    logits, bias, experts, weights, counts, valid, tokens, scale, mass,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, SLICES: tl.constexpr,
    TOP_K: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_K: tl.constexpr, LEVELS: tl.constexpr, LEVEL_COUNT: tl.constexpr, DYNAMIC: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    token_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_M = token_M < tokens
    e, k = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_K)[None, :]
    mask = mask_M[:, None] & (e < EXPERTS)
    wait_for_inputs()
    sums_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for s in tl.static_range(SLICES):
        sums_ME += tl.load(logits + (token_M[:, None] * SLICES + s) * EXPERTS + e, mask=mask, other=0.0)
    if SIGMOID:
        scores_ME = 1.0 / (1.0 + tl.exp(-sums_ME))
    else:
        sums_ME = tl.where(e < EXPERTS, sums_ME, -1e30)
        powers_ME = tl.exp(sums_ME - tl.max(sums_ME, axis=1)[:, None])
        scores_ME = powers_ME / tl.sum(powers_ME, axis=1)[:, None]
    choice_ME = scores_ME
    if BIAS:
        choice_ME += tl.load(bias + e, mask=e < EXPERTS, other=0.0)
    # Of NaN, argmax can give a place behind the last expert. NaN counts as the largest, as in torch: a token
    # that has one fails, and its experts exist.
    choice_ME = tl.where(choice_ME == choice_ME, choice_ME, 1e30)  # noqa: PLR0124 - false for NaN
    choice_ME = tl.where(e < EXPERTS, choice_ME, float("-inf"))
    for i in tl.static_range(LEVEL_COUNT):
        choice_ME = _kept_groups(
            choice_ME, e, EXPERTS, LEVELS[4 * i], LEVELS[4 * i + 1], LEVELS[4 * i + 2], LEVELS[4 * i + 3]
        )
    # Columns behind the chosen experts are the shared ones, which every token takes with weight 1.
    ids_MK = tl.where(k >= TOP_K, EXPERTS + k - TOP_K, 0) + tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    shares_MK = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in tl.static_range(TOP_K):
        best_M = tl.argmax(choice_ME, axis=1)
        share_M = tl.sum(tl.where(e == best_M[:, None], scores_ME, 0.0), axis=1)
        ids_MK = tl.where(k == i, best_M[:, None], ids_MK)
        shares_MK = tl.where(k == i, share_M[:, None], shares_MK)
        choice_ME = tl.where(e == best_M[:, None], float("-inf"), choice_ME)
    if DYNAMIC:
        # Experts stand best first: those behind `mass` of the summed scores become none.
        before_MK = tl.cumsum(shares_MK, axis=1) - shares_MK
        left_MK = (k > 0) & (k < TOP_K) & (before_MK >= (mass * tl.sum(shares_MK, axis=1))[:, None])
        ids_MK = tl.where(left_MK, -1, ids_MK)
        shares_MK = tl.where(left_MK, 0.0, shares_MK)
    if NORMALISE:
        shares_MK = shares_MK / (tl.sum(shares_MK, axis=1) + 1e-20)[:, None]
    shares_MK = tl.where(k >= TOP_K, 1.0, shares_MK * scale)
    stored = mask_M[:, None] & (k < TOP_K + SHARED)
    to = token_M[:, None] * (TOP_K + SHARED) + k
    counted = stored
    if PADDED:
        counted &= token_M[:, None] < tl.load(valid)
    tl.store(experts + to, tl.where(counted, ids_MK, -1), mask=stored)
    tl.store(weights + to, shares_MK, mask=stored)
    if DYNAMIC:
        counted &= ids_MK >= 0
    tl.atomic_add(counts + ids_MK, 1, mask=counted)


# Programs of the scores: about two for each multiprocessor of an H200. Where each took all inputs, 300 to
# 4,000 tokens took 50 us.
PROGRAMS = 256


def router_tile(tokens: int, width: int) -> tuple[int, int]:
    """Tokens and inputs of one program."""
    if tokens <= 256:
        return 16, 64
    slices = max(1, PROGRAMS // triton.next_power_of_2(triton.cdiv(tokens, 64)))
    return 64, 64 * triton.cdiv(width, 64 * slices)


def route(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing, counts_A: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Experts int32 [T, K] and their weights float32 [T, K]; adds to the histogram `counts_A` (int32).

    Equal scores choose the expert of lower number. Where the routing is dynamic, experts that a token does
    not need are -1 with weight 0, and are not counted. Tokens behind the first `valid` (int32 [1]; None: all)
    are padding of a fixed-size batch: they go to expert -1, which is none, and are not counted.
    """
    tokens, width = x_TD.shape
    experts = weight_ED.shape[0]
    block_m, cut = router_tile(tokens, width)
    slices, block_e = triton.cdiv(width, cut), max(16, triton.next_power_of_2(experts))
    logits_TSE = torch.empty(tokens, slices, experts, dtype=torch.float32, device=x_TD.device)
    _logits[(triton.cdiv(tokens, block_m), slices)](
        x_TD, weight_ED, logits_TSE, tokens,
        WIDTH=width, EXPERTS=experts, SLICE=cut, BLOCK_E=block_e, BLOCK_M=block_m, BLOCK_D=64, num_warps=4,
        **launch(tokens),
    )  # fmt: skip
    columns = routing.per_token
    experts_TK = torch.empty(tokens, columns, dtype=torch.int32, device=x_TD.device)
    weights_TK = torch.empty(tokens, columns, dtype=torch.float32, device=x_TD.device)
    levels = tuple(number for level in routing.limits for number in _numbers(level))
    block_m = 1 if tokens <= 256 else 2
    _choose[(triton.cdiv(tokens, block_m),)](
        logits_TSE, bias_E, experts_TK, weights_TK, counts_A, valid, tokens, routing.scale, routing.mass,
        EXPERTS=experts, BLOCK_E=block_e, SLICES=slices, TOP_K=routing.top_k, SHARED=routing.shared,
        BLOCK_K=triton.next_power_of_2(columns), LEVELS=levels, LEVEL_COUNT=len(routing.limits),
        DYNAMIC=routing.is_dynamic, SIGMOID=not routing.softmax, NORMALISE=routing.normalise,
        BIAS=bias_E is not None, PADDED=valid is not None,
        BLOCK_M=block_m, num_warps=1, **launch(tokens),
    )  # fmt: skip
    return experts_TK, weights_TK


def _numbers(level: Level) -> tuple[int, int, int, int]:
    """A level as `_choose` takes it, the fourth number being the groups' block."""
    return level.groups, level.keep, level.best, triton.next_power_of_2(level.groups)
