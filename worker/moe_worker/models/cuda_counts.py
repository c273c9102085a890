"""Counts the experts that passes on the GPU use, on the device.

Legend: L layers, A experts.
"""

import torch

from moe_worker.kernels.triton.greedy import add_counts
from moe_worker.models.cuda import CudaModel


class Totals:
    """Sums of the histograms of all passes, on the device: int64 [L, A], and activated routed experts [L]."""

    def __init__(self, model: CudaModel) -> None:
        self._model = model
        self.tokens_LA = torch.zeros_like(model.counts_LA, dtype=torch.int64)
        self.active_L = torch.zeros(len(model.counts_LA), dtype=torch.int64, device=model.device)
        routers = [layer.router_ED for layer in model.layers if layer.router_ED is not None]
        self._routed = max((router_ED.shape[0] for router_ED in routers), default=0)

    def add(self) -> None:
        """Takes in the newest pass."""
        add_counts(self._model.counts_LA, self.tokens_LA, self.active_L, self._routed)


class CudaExpertCounter:
    """Tells which routed experts the passes since its start used."""

    def __init__(self, model: CudaModel, totals: Totals) -> None:
        self._model, self._totals, self._passes = model, totals, 0
        self._tokens_LA, self._active_L = totals.tokens_LA.clone(), totals.active_L.clone()

    def count(self, _tokens: int) -> None:
        """Takes in the pass that ran last."""
        self._passes += 1

    def read(self) -> tuple[int, list[tuple[int, list[int], int]]]:
        """Passes so far, and for each layer with a router its number, the tokens of each routed expert, and
        its active experts. Waits for the device.
        """
        tokens = (self._totals.tokens_LA - self._tokens_LA).tolist()
        active = (self._totals.active_L - self._active_L).tolist()
        rows = []
        for index, layer in enumerate(self._model.layers):
            if layer.router_ED is not None:
                routed = layer.router_ED.shape[0]
                rows.append((self._model.begin + index, tokens[index][:routed], active[index]))
        return self._passes, rows
