"""The GPU path: DeepSeek models over Triton kernels, decode under one CUDA graph for each batch size.

Legend: T tokens, B sequences, D hidden, V vocabulary, P pages of a sequence, W cache row, L layers, A
experts, C tiles of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.triton.attention import TokenTiles
from moe_worker.kernels.triton.linear import linear_w4a8
from moe_worker.kernels.triton.norm import Activation, residual_norm
from moe_worker.kernels.triton.tiles import PackedInt4
from moe_worker.models.cuda_layer import CudaLayer, Pass, Weight

# Slices of the context that fill an H200's 132 multiprocessors twice where sequences are few.
WANTED_PROGRAMS = 264
MOST_SLICES = 16
# Tokens of a prefill that one attention program takes.
PREFILL_TOKENS = 4


@dataclass(frozen=True)
class CudaModel:
    """Prepared weights, and the latent cache [pages * page, W] of each layer.

    counts_LA: int32 histogram of the experts that the last pass used.
    """

    embedding_VD: Tensor
    layers: tuple[CudaLayer, ...]
    norm_D: Tensor
    head: Weight
    rotations_CP2: Tensor
    eps: float
    scale: float
    page: int
    caches: tuple[Tensor, ...]
    counts_LA: Tensor

    def forward(self, tokens_T: Tensor, shared: Pass) -> tuple[Tensor, Tensor]:
        """Writes the cache; the residual [T, D] and the last experts' outputs, still to be added to it."""
        self.counts_LA.zero_()
        x_TD = functional.embedding(tokens_T, self.embedding_VD)
        added: Tensor | None = None
        for layer, cache_SW in zip(self.layers, self.caches, strict=True):
            attended_TD = layer.attention(x_TD, added, shared, cache_SW)
            added = layer.block(x_TD, attended_TD, shared)
        if added is None:
            raise ValueError("a model needs at least one layer")
        return x_TD, added

    def logits(self, x_TD: Tensor, added_MD: Tensor) -> Tensor:
        """Scores of the next token, float32 or bf16 [T, V]."""
        normed = Activation.empty(x_TD.shape[0], x_TD.shape[1], x_TD.device)
        residual_norm(x_TD, added_MD, self.norm_D, self.eps, normed, isinstance(self.head, PackedInt4))
        if isinstance(self.head, PackedInt4):
            return linear_w4a8(normed, self.head, torch.float32)
        return functional.linear(normed.x_TD, self.head)

    def decode_pass(self, positions_B: Tensor, rows_B: Tensor, pages_BP: Tensor) -> Pass:
        """A pass with one token of each sequence."""
        count = positions_B.shape[0]
        numbers = torch.arange(count, dtype=torch.int32, device=positions_B.device)
        tiles = TokenTiles(numbers, numbers, torch.ones_like(numbers), 1)
        slices = max(1, min(MOST_SLICES, WANTED_PROGRAMS // count))
        return self._pass(positions_B, rows_B, pages_BP, tiles, 1 << (slices.bit_length() - 1))

    def prefill_pass(self, starts: Sequence[int], counts: Sequence[int], pages_BP: Tensor) -> Pass:
        """A pass with `counts` tokens of each sequence, the first at position `starts`."""
        device = pages_BP.device
        tiles: list[tuple[int, int, int]] = []
        first = 0
        for sequence, count in enumerate(counts):
            cuts = range(0, count, PREFILL_TOKENS)
            tiles += [(sequence, first + cut, min(PREFILL_TOKENS, count - cut)) for cut in cuts]
            first += count
        tile_3C = torch.tensor(tiles, dtype=torch.int32, device=device).t().contiguous()
        positions_T = torch.cat(
            [torch.arange(s, s + c, device=device) for s, c in zip(starts, counts, strict=True)]
        )
        sequence_T = torch.repeat_interleave(torch.tensor(list(counts), device=device))
        rows_T = pages_BP[sequence_T, positions_T // self.page].long() * self.page + positions_T % self.page
        return self._pass(
            positions_T, rows_T, pages_BP, TokenTiles(tile_3C[0], tile_3C[1], tile_3C[2], PREFILL_TOKENS), 1
        )

    def _pass(
        self, positions_T: Tensor, rows_T: Tensor, pages_BP: Tensor, tiles: TokenTiles, slices: int
    ) -> Pass:
        return Pass(
            positions_T, rows_T, pages_BP, tiles, slices, self.page, self.rotations_CP2, self.eps, self.scale
        )


class DecodeGraph:
    """Greedy decoding of B sequences as one CUDA graph: tokens feed the next step on the device.

    The caller fills tokens_B, positions_B (of those tokens) and pages_BP; each step() then writes the next
    token and moves the position on.
    """

    def __init__(self, model: CudaModel, batch: int, pages: int) -> None:
        device = model.embedding_VD.device
        self._model = model
        self.tokens_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.pages_BP = torch.zeros(batch, pages, dtype=torch.int32, device=device)
        self.logits_BV = torch.empty(0)  # those of the newest step
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Compiles the kernels and records the step; tokens and positions stay as they are."""
        kept = self.tokens_B.clone(), self.positions_B.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # what the caller put into the buffers is in flight
        with torch.cuda.stream(side):
            self.run()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.run()
        self.tokens_B.copy_(kept[0])
        self.positions_B.copy_(kept[1])

    def step(self) -> None:
        """One token for every sequence, from the graph."""
        if self._graph is None:
            self.capture()
        if self._graph is not None:
            self._graph.replay()

    def steps(self, count: int) -> None:
        """`count` tokens for every sequence."""
        for _ in range(count):
            self.step()

    def run(self) -> None:
        """The step without a graph."""
        page = self._model.page
        own_B1 = self.pages_BP.gather(1, (self.positions_B // page).unsqueeze(1))
        rows_B = own_B1[:, 0].long() * page + self.positions_B % page
        shared = self._model.decode_pass(self.positions_B, rows_B, self.pages_BP)
        logits_BV = self._model.logits(*self._model.forward(self.tokens_B, shared))
        self.logits_BV = logits_BV
        self.tokens_B.copy_(logits_BV.argmax(dim=-1))
        self.positions_B.add_(1)
