"""Multi-head latent attention (arXiv:2405.04434, 2.1) with the key and value expansions absorbed.

A query head's part without position is multiplied by its slice of W_UK once, after which scores and
weighted sums run over the cached latents themselves: no keys or values are ever expanded.

Legend: T tokens, B sequences, S cached positions, D hidden, H heads, N query elements without and P with
rotary position, R latent rank, W = R + P cache row, V value elements of a head, Q query rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.reference import rms_norm
from moe_worker.kvcache.latent import LatentCache
from moe_worker.models.rope import rotate

# DeepSeek's code gives the two inner norms no eps, so that they keep the default of its norm.
INNER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Span:
    """`count` tokens of the sequence in `slot`, the first of them at position `start`."""

    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """Length of the sequence once these tokens are in the cache."""
        return self.start + self.count


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one pass stand; made once, used by every layer."""

    spans: Sequence[Span]
    rotations_TP: Tensor  # complex64 [T, 1, P / 2]
    rows_T: Tensor  # rows of the flat cache
    mask_BS: Tensor | None  # decode of several sequences only: what to add to scores


@dataclass(frozen=True)
class Attention:
    """Weights of one layer's attention, prepared: the two projections of the input are one matrix."""

    input_OD: Tensor  # rows: Q query ranks (or H * (N + P) query elements), R latents, P rotary key elements
    input_bias_O: Tensor | None
    query_norm_Q: Tensor | None
    query_QO: Tensor | None
    latent_norm_R: Tensor
    key_HNR: Tensor
    value_HRV: Tensor
    output_DO: Tensor
    output_bias_D: Tensor | None
    rope_width: int
    scale: float

    def forward(self, x_TD: Tensor, positions: Positions, cache: LatentCache, layer: int) -> Tensor:
        """Writes the tokens' latents to the cache, attends over it; [T, D]."""
        rank = self.latent_norm_R.shape[0]
        joint_TO = functional.linear(x_TD, self.input_OD, self.input_bias_O)
        query_TO, latent_TR, key_TP = torch.split(
            joint_TO, [joint_TO.shape[1] - rank - self.rope_width, rank, self.rope_width], dim=1
        )
        rotated_T1P = rotate(key_TP.unsqueeze(1), positions.rotations_TP)
        row_TW = torch.cat(
            (rms_norm(latent_TR, self.latent_norm_R, INNER_NORM_EPS), rotated_T1P[:, 0]), dim=1
        )
        cache.layers[layer].index_copy_(0, positions.rows_T, row_TW)
        query_THW = self._absorbed_query(query_TO, positions.rotations_TP)
        latent_THR = attend(query_THW, positions, cache, layer, self.scale)[..., :rank]
        value_HTV = torch.bmm(latent_THR.transpose(0, 1), self.value_HRV)
        return functional.linear(value_HTV.transpose(0, 1).flatten(1), self.output_DO, self.output_bias_D)

    def _absorbed_query(self, query_TO: Tensor, rotations_TP: Tensor) -> Tensor:
        """Queries in the space of cache rows: [T, H, W]."""
        heads, plain, _ = self.key_HNR.shape
        if self.query_norm_Q is not None and self.query_QO is not None:
            query_TO = functional.linear(rms_norm(query_TO, self.query_norm_Q, INNER_NORM_EPS), self.query_QO)
        plain_THN, rope_THP = torch.split(
            query_TO.reshape(query_TO.shape[0], heads, -1), [plain, self.rope_width], dim=2
        )
        latent_HTR = torch.bmm(plain_THN.transpose(0, 1), self.key_HNR)
        return torch.cat((latent_HTR.transpose(0, 1), rotate(rope_THP, rotations_TP)), dim=2)


def attend(query_THW: Tensor, positions: Positions, cache: LatentCache, layer: int, scale: float) -> Tensor:
    """Softmax over each token's sequence up to itself, weighted sum of cache rows: [T, H, W].

    The rotary elements of the sums mean nothing; they are cut off by the caller, so that keys and values
    are the same rows and one fused operation does it all.
    """
    if len(positions.spans) > 1 and query_THW.shape[0] == len(positions.spans):
        return _attend_decode(query_THW, positions, cache, layer, scale)
    outputs = []
    for span, query_tHW in zip(
        positions.spans, torch.split(query_THW, [span.count for span in positions.spans]), strict=True
    ):
        outputs.append(_attend_span(query_tHW, cache.slot_rows(layer, span.slot, span.end), span, scale))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend_span(query_tHW: Tensor, rows_SW: Tensor, span: Span, scale: float) -> Tensor:
    heads = query_tHW.shape[1]
    if span.count == 1:
        out_1HW = functional.scaled_dot_product_attention(
            query_tHW.unsqueeze(0), rows_SW[None, None], rows_SW[None, None], scale=scale
        )
        return out_1HW[0]
    mask_tS = torch.ones(span.count, span.end, dtype=torch.bool, device=rows_SW.device).tril_(span.start)
    out_1HtW = functional.scaled_dot_product_attention(
        query_tHW.transpose(0, 1).unsqueeze(0),
        rows_SW.expand(1, heads, -1, -1),
        rows_SW.expand(1, heads, -1, -1),
        attn_mask=mask_tS,
        scale=scale,
    )
    return out_1HtW[0].transpose(0, 1)


def _attend_decode(
    query_BHW: Tensor, positions: Positions, cache: LatentCache, layer: int, scale: float
) -> Tensor:
    """One token of each sequence; slots are read up to the longest sequence and masked."""
    slots = [span.slot for span in positions.spans]
    longest = max(span.end for span in positions.spans)
    rows_CW = cache.layers[layer].view(cache.slots, cache.context, -1)
    if slots == list(range(slots[0], slots[0] + len(slots))):
        rows_BSW = rows_CW[slots[0] : slots[0] + len(slots), :longest]
    else:
        rows_BSW = rows_CW[:, :longest][slots]
    out_B1HW = functional.scaled_dot_product_attention(
        query_BHW.unsqueeze(1),
        rows_BSW.unsqueeze(1),
        rows_BSW.unsqueeze(1),
        attn_mask=positions.mask_BS,
        scale=scale,
    )
    return out_B1HW[:, 0]
