"""The experts of a layer in training, computed in two equivalent ways.

Grouped: one product for each expert over its tokens, all in one launch. At once: the experts are one wide
network whose inner channels are multiplied by the router's weight, zero for an expert that was not chosen.
Nothing is gathered, but the cost grows with the number of experts (docs/adr/0007).

Legend: T tokens, D hidden size, E routed experts, F expert channels, K experts of a token, M = T * K rows, B
sequences, S tokens of a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor

from moe_worker.compress.w4a8 import round_tokens
from moe_worker.kernels.reference import group_by_expert
from moe_worker.quant.int8 import piece_of

Weights = tuple[Tensor, Tensor, Tensor]
"""Gate [E, F, D], up [E, F, D] and down [E, D, F]."""
Choice = tuple[Tensor, Tensor]
"""Experts int64 [T, K], -1 for none, and their weights float32 [T, K]."""
# Gathering rows moves a token's hidden state K times there and back; from about this many experts for one
# that is chosen, computing all of them costs more. An estimate: benchmarks/train_speed.py measures both ways.
GROUPED_FROM = 8


def expert_outputs(x_TD: Tensor, weights: Weights, choice: Choice, rounded: bool) -> Tensor:
    """Weighted sum of each token's SwiGLU experts, [T, D], in the way with the lower estimated cost.

    `rounded`: whether rows are rounded to int8 before each product.
    """
    grouped = weights[0].shape[0] >= GROUPED_FROM * choice[0].shape[1]
    return (grouped_experts if grouped else experts_at_once)(x_TD, weights, choice, rounded)


def experts_at_once(x_TD: Tensor, weights: Weights, choice: Choice, rounded: bool) -> Tensor:
    """Every expert for every token, [T, D]."""
    gate_EFD, up_EFD, down_EDF = (weight.to(x_TD.dtype) for weight in weights)
    share_TE = _spread(*choice, gate_EFD.shape[0])
    x_TD = _rounded(x_TD) if rounded else x_TD
    gate, up = F.linear(x_TD, gate_EFD.flatten(0, 1)), F.linear(x_TD, up_EFD.flatten(0, 1))
    hidden_TEF = torch.unflatten(F.silu(gate) * up, -1, (gate_EFD.shape[0], -1))
    hidden_TEF = _rounded(hidden_TEF) if rounded else hidden_TEF
    weighted_TM = (hidden_TEF * share_TE.to(hidden_TEF.dtype).unsqueeze(-1)).flatten(-2)
    return F.linear(weighted_TM, down_EDF.transpose(0, 1).flatten(1))


def grouped_experts(x_TD: Tensor, weights: Weights, choice: Choice, rounded: bool) -> Tensor:
    """Only the chosen experts, [T, D].

    Rows are sorted by expert, so that the rows of each form one matrix, and restored by the inverse order.
    Both are permutations, so gradients need no atomic additions.
    """
    gate_EFD, up_EFD, down_EDF = weights
    chosen_TK, share_TK = choice
    tokens, per_token = chosen_TK.shape
    order_M, ends_E = group_by_expert(chosen_TK, gate_EFD.shape[0])
    place_M = order_M.argsort()
    # Products write no rows of no expert, neither forward nor backward.
    some_TK1 = (chosen_TK >= 0).unsqueeze(-1)
    x_TD = _rounded(x_TD) if rounded else x_TD
    rows_TKD = torch.where(some_TK1, x_TD.unsqueeze(1), 0)
    rows_MD = rows_TKD.reshape(-1, x_TD.shape[1])[order_M]
    hidden_MF = F.silu(_grouped(rows_MD, gate_EFD, ends_E)) * _grouped(rows_MD, up_EFD, ends_E)
    out_MD = _grouped(_rounded(hidden_MF) if rounded else hidden_MF, down_EDF, ends_E)
    out_TKD = torch.where(some_TK1, out_MD[place_M].view(tokens, per_token, -1), 0)
    return (out_TKD * share_TK.to(out_TKD.dtype).unsqueeze(-1)).sum(dim=1)


def _rounded(x: Tensor) -> Tensor:
    return round_tokens(x, piece_of(x.shape[-1]))


def chosen(scores_BSE: Tensor, chosen_BSK: Tensor) -> Tensor:
    """1 for each chosen expert of a token, else 0: [B, S, E] in the dtype of the scores."""
    ones_BSK = torch.ones(chosen_BSK.shape, dtype=scores_BSE.dtype, device=scores_BSE.device)
    return _spread(chosen_BSK, ones_BSK, scores_BSE.shape[-1])


def sequence_balance(scores_BSE: Tensor, chosen_BSK: Tensor) -> Tensor:
    """The sequence balance loss, 1 for an even load (arXiv 2412.19437, eq. 17 to 20)."""
    experts, per_token = scores_BSE.shape[-1], chosen_BSK.shape[-1]
    count_BE = chosen(scores_BSE, chosen_BSK).mean(dim=1)
    share_BE = (scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (count_BE * experts / per_token * share_BE).sum(dim=-1).mean()


def _spread(chosen_TK: Tensor, values_TK: Tensor, experts: int) -> Tensor:
    """The values at the indices of their experts, 0 elsewhere, [T, E]; those of no expert are dropped."""
    wide_TE = values_TK.new_zeros(*chosen_TK.shape[:-1], experts + 1)
    return wide_TE.scatter(-1, torch.where(chosen_TK < 0, experts, chosen_TK), values_TK)[..., :-1]


def _grouped(rows_MI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Row m times the matrix of its expert, in autocast's dtype if there is one: [M, O]."""
    device = rows_MI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_MI, weights_EOI = rows_MI.to(dtype), weights_EOI.to(dtype)
    return F.grouped_mm(rows_MI, weights_EOI.to(rows_MI.dtype).transpose(1, 2), offs=ends_E)
