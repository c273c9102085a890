"""Attention over the paged cache, shared by the families: softmax of scores, weighted sums of cached values.

Legend: T tokens of the pass, t of one segment, B sequences, S cached positions, H query heads, G key heads,
K elements of a query or key, V of a value, W of a cache row.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.models.layers import LayerStep

# Cuts rows [B, S, W] into keys [B, G, S, K] and values [B, G, S, V], without copying.
Cut = Callable[[Tensor], tuple[Tensor, Tensor]]


def attend(query_THK: Tensor, cut: Cut, step: LayerStep, scale: float) -> Tensor:
    """Each token over its own sequence up to itself: [T, H, V]."""
    batch, cache = step.batch, step.cache
    outputs = []
    done = 0
    if batch.decodes > 1:
        outputs.append(_decodes(query_THK[: batch.decodes], cut, step, scale))
        done = batch.decodes
    first = done
    for segment in batch.segments[done:]:
        rows_1SW = cache.sequence(step.layer, segment.pages, segment.end).unsqueeze(0).to(query_THK.dtype)
        query_tHK = query_THK[first : first + segment.size]
        broken_S = None
        if segment.size > 1:
            broken_S = rows_1SW[0].isfinite().all(dim=-1).logical_not_()
            rows_1SW = rows_1SW.masked_fill(broken_S[None, :, None], 0)
        out_tHV = _segment(query_tHK, *cut(rows_1SW), segment.start, scale)
        outputs.append(out_tHV if broken_S is None else _break(out_tHV, broken_S, segment.start))
        first += segment.size
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _decodes(query_BHK: Tensor, cut: Cut, step: LayerStep, scale: float) -> Tensor:
    """One token of each sequence; all are read up to the longest and masked."""
    batch, cache = step.batch, step.cache
    ends = [segment.end for segment in batch.segments[: batch.decodes]]
    longest = max(ends)
    rows_BSW = cache.sequences(step.layer, batch.pages_BP[: batch.decodes], longest).to(query_BHK.dtype)
    mask_B11S = None
    if min(ends) < longest:
        positions_S = torch.arange(longest, device=query_BHK.device)
        inside_BS = positions_S < batch.lengths_B[: batch.decodes, None]
        # Rows behind an end are another sequence's, and NaN there stays NaN under a mask.
        rows_BSW = rows_BSW.masked_fill(inside_BS.logical_not().unsqueeze(-1), 0)
        mask_B11S = inside_BS[:, None, None]
    keys_BGSK, values_BGSV = cut(rows_BSW)
    return _one_token(query_BHK, keys_BGSK, values_BGSV, mask_B11S, scale)


def _break(out_tHV: Tensor, broken_S: Tensor, start: int) -> Tensor:
    """The outputs with NaN for tokens that see a row which is not finite; the row itself was taken as 0.

    Under a mask NaN stays NaN, so that it would reach the tokens before it too, whose pages others share.
    """
    seen_t11 = broken_S.cumsum(0)[start:].bool()[:, None, None]
    return out_tHV.masked_fill(seen_t11, torch.nan)


def _segment(query_tHK: Tensor, keys_1GSK: Tensor, values_1GSV: Tensor, start: int, scale: float) -> Tensor:
    count, length = query_tHK.shape[0], keys_1GSK.shape[2]
    if count == 1:
        return _one_token(query_tHK, keys_1GSK, values_1GSV, None, scale)
    mask_tS = torch.ones(count, length, dtype=torch.bool, device=query_tHK.device).tril_(start)
    heads, groups = query_tHK.shape[1], keys_1GSK.shape[1]
    out_1HtV = functional.scaled_dot_product_attention(
        query_tHK.transpose(0, 1).unsqueeze(0),
        _for_heads(keys_1GSK, heads // groups),
        _for_heads(values_1GSV, heads // groups),
        attn_mask=mask_tS,
        scale=scale,
    )
    return out_1HtV[0].transpose(0, 1)


def _for_heads(x_BGSK: Tensor, heads: int) -> Tensor:
    """Repeats each key head for its query heads; a single one without a copy."""
    if x_BGSK.shape[1] == 1:
        return x_BGSK.expand(-1, heads, -1, -1)
    return x_BGSK.repeat_interleave(heads, dim=1)


def _one_token(
    query_BHK: Tensor, keys_BGSK: Tensor, values_BGSV: Tensor, mask_B11S: Tensor | None, scale: float
) -> Tensor:
    """The query heads of a key head stand in for positions: one product for all of them."""
    groups = keys_BGSK.shape[1]
    out_BGhV = functional.scaled_dot_product_attention(
        query_BHK.reshape(query_BHK.shape[0], groups, -1, query_BHK.shape[2]),
        keys_BGSK,
        values_BGSV,
        attn_mask=mask_B11S,
        scale=scale,
    )
    return out_BGhV.flatten(1, 2)
