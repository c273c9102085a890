"""The capability matrix: which experts each domain's tokens go to, learned online and forgotten slowly.

Legend: L layers with experts, N domains, E routed experts of a layer.
"""

import torch
from torch import Tensor

# Tokens after which what was learned of a domain counts half.
HALF_LIFE = 1 << 20


class CapabilityMatrix:
    """Affinities of domains and experts, and how well the experts that they name are those chosen next.

    named: experts of a layer that a domain is said to need. The fit is prequential: each observation is
    compared with what the matrix named before it, so that all of it is about tokens not yet seen.
    """

    def __init__(
        self, layers: int, domains: int, experts: int, named: int, half_life: float = HALF_LIFE
    ) -> None:
        self._counts_LNE = torch.zeros(layers, domains, experts, dtype=torch.float64)
        self._named, self._half_life = named, half_life
        self.tokens_N = [0] * domains
        self._hits_LN = torch.zeros(layers, domains, dtype=torch.float64)
        self._seen_LN = torch.zeros(layers, domains, dtype=torch.float64)

    def observe(self, domain: int, counts_LE: Tensor, tokens: int, confidence: float = 1.0) -> None:
        """Takes in `tokens` tokens of a domain by how many of them each expert took.

        confidence: 0 to 1, what they are worth: the likelihood of what came out, or of the loss in training.
        """
        kept = 0.5 ** (tokens / self._half_life)
        self.tokens_N[domain] += tokens
        counts_LE = counts_LE.to(self._counts_LNE)
        if bool(self._counts_LNE[:, domain].any()):
            hits_L = counts_LE.gather(1, self.named()[:, domain]).sum(dim=1)
            self._hits_LN[:, domain] = self._hits_LN[:, domain] * kept + hits_L
            self._seen_LN[:, domain] = self._seen_LN[:, domain] * kept + counts_LE.sum(dim=1)
        self._counts_LNE[:, domain] = self._counts_LNE[:, domain] * kept + confidence * counts_LE

    def start_from(self, shares_LNE: Tensor) -> None:
        """Begins with affinities that were learned before, which count as much as a half-life of tokens."""
        self._counts_LNE = shares_LNE.to(self._counts_LNE) * self._half_life

    def affinity(self) -> Tensor:
        """The share of each expert in a domain's choices, float64 [L, N, E]; 0 where nothing was seen."""
        return self._counts_LNE / self._counts_LNE.sum(dim=-1, keepdim=True).clamp(min=1e-12)

    def named(self) -> Tensor:
        """The experts that each domain is said to need, int64 [L, N, named]."""
        return self._counts_LNE.topk(self._named, dim=-1).indices

    def fit(self) -> float | None:
        """The share of choices that went to named experts; None before anything was compared."""
        seen = float(self._seen_LN.sum())
        return float(self._hits_LN.sum()) / seen if seen else None

    def infer(self, counts_LE: Tensor) -> int:
        """The domain whose affinities explain these counts best (naive Bayes, one pseudo-count an expert)."""
        smooth_LNE = self._counts_LNE + 1
        logs_LNE = (smooth_LNE / smooth_LNE.sum(dim=-1, keepdim=True)).log()
        return int((logs_LNE * counts_LE.to(logs_LNE).unsqueeze(1)).sum(dim=(0, 2)).argmax())
