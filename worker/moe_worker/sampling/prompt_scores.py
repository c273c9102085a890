"""Log-probabilities of tokens that are given, not sampled.

Legend: L tokens, N the most likely tokens that any of them wants, V vocabulary.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from moe_worker.kernels.transfer import to_device
from moe_worker.sampling.sampler import Logprobs

_PART: Final = 32
"""Rows whose probabilities are in memory at a time: 17 MB in float32 with a vocabulary of 129,280."""


@torch.inference_mode()
def score(logits_LV: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> Logprobs:
    """The log-probability of each of `tokens` by its row of logits, before bias, penalties and temperature.

    counts: the most likely tokens to report for each; the host does not wait for the device.
    """
    tokens_L = to_device(torch.tensor(tokens, dtype=torch.int64), logits_LV.device)
    most = min(max(counts, default=0), logits_LV.shape[1])
    parts = [
        _part(part_lV, tokens_l, most)
        for part_lV, tokens_l in zip(logits_LV.split(_PART), tokens_L.split(_PART), strict=True)
    ]
    chosen_L, top_LN, tokens_LN = (torch.cat(found) for found in zip(*parts, strict=True))
    return Logprobs(tuple(range(len(tokens))), tuple(counts), chosen_L, top_LN, tokens_LN)


def _part(logits_lV: Tensor, tokens_l: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_lV = logits_lV.float().log_softmax(dim=-1)
    top_lN, tokens_lN = logprobs_lV.topk(most, dim=-1)
    return logprobs_lV.gather(1, tokens_l.unsqueeze(1)).squeeze(1), top_lN, tokens_lN
