"""What follows a step on the device besides the model, in few launches: the likeliest tokens, and the counts.

A step of one token takes 1.4 ms on an H200, and each of the dozen small torch kernels that these replace
takes 2 us or more, argmax over a hundred thousand logits 27 us.

Legend: B rows of the batch, V vocabulary, P parts of the vocabulary, L layers, A experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _best_of_part(scores, stride, peaks, tokens, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row * stride + v, mask=v < VOCABULARY, other=float("-inf")).to(tl.float32)
    # NaN counts as the largest: its row fails, as one with inf does.
    score = tl.where(score == score, score, float("inf"))  # noqa: PLR0124 - false for NaN
    at = row * tl.num_programs(1) + part
    tl.store(peaks + at, tl.max(score, axis=0))
    tl.store(tokens + at, part * BLOCK + tl.argmax(score, axis=0))


@triton.jit
def _best_of_parts(
    peaks, tokens, out_peaks, out_tokens, out_failed, PARTS: tl.constexpr, BLOCK_P: tl.constexpr
):
    row, p = tl.program_id(0), tl.arange(0, BLOCK_P)
    peak_P = tl.load(peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf"))
    peak = tl.max(peak_P, axis=0)
    token = tl.load(tokens + row * PARTS + tl.argmax(peak_P, axis=0))
    failed = (peak == float("inf")) | (peak == float("-inf"))
    tl.store(out_peaks + row, peak)
    tl.store(out_tokens + row, tl.where(failed, 0, token).to(tl.int64))
    tl.store(out_failed + row, failed)


def best_tokens(scores_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first of each row's likeliest tokens, int64 [B], its score, float32 [B], and whether a row fails.

    A row fails, bool [B], where a score is NaN or +inf or all are -inf; its token is 0, and its score is not
    finite.
    """
    batch, vocabulary = scores_BV.shape
    parts, device = triton.cdiv(vocabulary, BLOCK), scores_BV.device
    peaks_BP = torch.empty(batch, parts, dtype=torch.float32, device=device)
    tokens_BP = torch.empty(batch, parts, dtype=torch.int32, device=device)
    _best_of_part[(batch, parts)](
        scores_BV, scores_BV.stride(0), peaks_BP, tokens_BP, VOCABULARY=vocabulary, BLOCK=BLOCK, num_warps=8
    )
    peaks_B = torch.empty(batch, dtype=torch.float32, device=device)
    tokens_B = torch.empty(batch, dtype=torch.int64, device=device)
    failed_B = torch.empty(batch, dtype=torch.bool, device=device)
    _best_of_parts[(batch,)](
        peaks_BP, tokens_BP, peaks_B, tokens_B, failed_B, PARTS=parts,
        BLOCK_P=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    return tokens_B, peaks_B, failed_B


@triton.jit
def _add_counts(counts, tokens, active, EXPERTS: tl.constexpr, ROUTED: tl.constexpr, BLOCK_E: tl.constexpr):
    layer, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    mask = e < EXPERTS
    count = tl.load(counts + layer * EXPERTS + e, mask=mask, other=0)
    at = tokens + layer * EXPERTS + e
    tl.store(at, tl.load(at, mask=mask, other=0) + count, mask=mask)
    tl.store(active + layer, tl.load(active + layer) + tl.sum(((count > 0) & (e < ROUTED)).to(tl.int32)))


def add_counts(counts_LA: Tensor, tokens_LA: Tensor, active_L: Tensor, routed: int) -> None:
    """Adds a pass's histograms, int32, to sums of them, int64, and its activated experts to `active_L`.

    routed: experts that count as activated; the shared ones stand behind them.
    """
    layers, experts = counts_LA.shape
    _add_counts[(layers,)](
        counts_LA, tokens_LA, active_L, EXPERTS=experts, ROUTED=routed,
        BLOCK_E=triton.next_power_of_2(experts), num_warps=1,
    )  # fmt: skip
