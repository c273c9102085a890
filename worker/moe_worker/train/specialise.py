"""What makes experts specialists: losses of the router, and balance of each of its levels.

Labels of documents (their sources, say) are a hint for training only: what is served knows none of them.

Legend: B sequences, T tokens of a sequence, E routed experts, G groups of the coarsest level, K experts of a
token, N domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_worker.config.moe import Level

EPSILON = 1e-20


def groups_of_domains(sizes: list[int], groups: int, keep: int = 1) -> list[tuple[int, ...]]:
    """The groups of experts that each domain is led to, so that groups get about equal shares of the text.

    A domain has at least `keep` groups, as many as a token's experts come from: with fewer, the others of a
    token would be anywhere. Where that is more groups than there are, the largest domains come first, each to
    the groups with the least text so far; otherwise the groups that are left over go, one by one, to the
    domain with the most text a group (D'Hondt).
    """
    order = sorted(range(len(sizes)), key=lambda domain: -sizes[domain])
    if len(sizes) * keep > groups:
        loads = [0] * groups
        found: list[tuple[int, ...]] = [()] * len(sizes)
        for domain in order:
            found[domain] = tuple(sorted(sorted(range(groups), key=loads.__getitem__)[:keep]))
            for group in found[domain]:
                loads[group] += sizes[domain]
        return found
    counts = [keep] * len(sizes)
    for _ in range(groups - len(sizes) * keep):
        counts[max(order, key=lambda domain: sizes[domain] / (counts[domain] + 1))] += 1
    ends = [sum(counts[: domain + 1]) for domain in range(len(sizes))]
    return [tuple(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]


def domain_loss(scores_BTE: Tensor, groups_NG: Tensor, domains_BT: Tensor) -> Tensor:
    """How little of a token's scores its domain's groups have: the mean of -log of their share.

    groups_NG: bool. domains_BT: int64, -1 for tokens without a label, which do not count.
    """
    groups = groups_NG.shape[1]
    shares_BTG = scores_BTE.unflatten(-1, (groups, -1)).sum(dim=-1)
    own_BTG = groups_NG[domains_BT.clamp(min=0)].to(shares_BTG.dtype)
    own_BT = (shares_BTG * own_BTG).sum(dim=-1) / (shares_BTG.sum(dim=-1) + EPSILON)
    known_BT = (domains_BT >= 0).to(own_BT.dtype)
    loss: Tensor = -((own_BT + EPSILON).log() * known_BT).sum() / known_BT.sum().clamp(min=1)
    return loss


def cost(scores_BTE: Tensor, top_k: int) -> Tensor:
    """How evenly a token's `top_k` best experts share their scores: the mean entropy, 1 where all are equal.

    A token of low entropy reaches its mass with few experts; the number of them itself has no gradient
    (the dynamic loss of arXiv:2403.07652, equation 5).
    """
    if top_k == 1:
        return scores_BTE.new_zeros(())
    top_BTK = scores_BTE.topk(top_k, dim=-1).values
    shares_BTK = top_BTK / (top_BTK.sum(dim=-1, keepdim=True) + EPSILON)
    entropy_BT = -(shares_BTK * (shares_BTK + EPSILON).log()).sum(dim=-1)
    return entropy_BT.mean() / torch.tensor(float(top_k)).log()


def cut_at(step: int, steps: int, after: float) -> float:
    """How much of the cut by mass a step trains with, 0 (all experts) to 1 (the mass of config.json).

    It begins after a share `after` of the steps, and rises evenly over half of the rest.
    """
    begin = after * steps
    return 1.0 if after == 0 else min(1.0, max(0.0, 2 * (step - begin) / max(1.0, steps - begin)))


def bias_step(load_E: Tensor, levels: tuple[Level, ...]) -> Tensor:
    """The direction in which each expert's bias moves: towards an even load of experts, and of the groups of
    every level (each group's experts move together).

    Source: Wang et al., "Auxiliary-loss-free load balancing", arXiv:2408.15664.
    """
    step_E = torch.sign(load_E.mean() - load_E)
    for level in levels:
        load_G = load_E.view(level.groups, -1).sum(dim=1)
        step_E = step_E + torch.sign(load_G.mean() - load_G).repeat_interleave(
            load_E.shape[0] // level.groups
        )
    return step_E
