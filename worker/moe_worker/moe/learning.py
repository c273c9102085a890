"""Learns from requests which experts each domain's tokens go to. Nothing that is served depends on it.

A request names no domain: it counts for the one whose affinities explain its experts best. The matrix begins
with what the checkpoint's routing.json has, which documents with labels gave.

Legend: L layers with experts, E routed experts, T tokens of a pass, K experts of a token.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moe_worker.config.routing_report import KnownDomains
from moe_worker.moe.capability import CapabilityMatrix


class RoutingLearner:
    """Adds up the experts of each request; at its end they move the matrix of its domain."""

    def __init__(self, known: KnownDomains, experts: int) -> None:
        self.names, self.layers = known.names, tuple(known.shares)
        self._experts, self._counts = experts, dict[int, Tensor]()
        self._tokens = dict[int, int]()
        self.matrix = CapabilityMatrix(len(self.layers), len(self.names), experts, known.named)
        self.matrix.start_from(torch.tensor(list(known.shares.values())))

    def take(self, choices: Sequence[Tensor], chunks: Iterable[tuple[int, int]]) -> None:
        """Takes in a pass: experts [T, K] of each layer, and request and tokens of each chunk in order."""
        # The first place takes the choices of no expert (-1).
        places_LTK = torch.stack(list(choices)).long() + 1
        start = 0
        for request, tokens in chunks:
            own_LM = places_LTK[:, start : start + tokens].flatten(1)
            counts = torch.zeros(len(own_LM), self._experts + 1, dtype=torch.int64)
            counts.scatter_add_(1, own_LM, torch.ones_like(own_LM))
            before = self._counts.get(request)
            self._counts[request] = counts[:, 1:] if before is None else before + counts[:, 1:]
            self._tokens[request] = self._tokens.get(request, 0) + tokens
            start += tokens

    def finish(self, request: int) -> None:
        """A request has ended: its experts count from now on."""
        counts_LE = self._counts.pop(request, None)
        if counts_LE is not None:
            tokens = self._tokens.pop(request)
            self.matrix.observe(self.matrix.infer(counts_LE), counts_LE, tokens)
