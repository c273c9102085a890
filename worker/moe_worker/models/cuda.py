"""The GPU path: DeepSeek models over Triton kernels.

Legend: T tokens, N tokens whose logits are wanted, B sequences, D hidden, V vocabulary, P pages of a
sequence, W cache row, L layers, A experts, C tiles of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.triton import few
from moe_worker.kernels.triton.attention import TokenTiles
from moe_worker.kernels.triton.linear import linear_packed
from moe_worker.kernels.triton.norm import Added
from moe_worker.kernels.triton.wide import Weight
from moe_worker.models.batch import aligned_parts
from moe_worker.models.cuda_layer import CudaLayer, Pass, norm

# Slices of the context that fill an H200's 132 multiprocessors twice where sequences are few.
WANTED_PROGRAMS = 264
MOST_SLICES = 16
# Tokens of a prefill that one attention program takes.
PREFILL_TOKENS = 4
# From this many tokens on, a step multiplies in bf16 by the library; packed weights are dequantized for that,
# which in four bits takes 0.6 ms a layer of DeepSeek-V2-Lite on an H100.
WIDE_TOKENS = 512
WIDE_TOKENS_PACKED = 8192


@dataclass(frozen=True)
class Rows:
    """What a pass computes. positions_T, rows_T (of the cache): int64; pages_BP: int32."""

    positions_T: Tensor
    rows_T: Tensor
    pages_BP: Tensor


@dataclass(frozen=True)
class CudaModel:
    """Prepared weights of a stage. begin: the number of its first layer.

    counts_LA: int32 histogram of the experts that the newest pass used, padding left out.
    """

    embedding_VD: Tensor
    layers: tuple[CudaLayer, ...]
    norm_D: Tensor
    head: Weight
    rotations_CP2: Tensor
    eps: float
    scale: float
    counts_LA: Tensor
    begin: int = 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding_VD.device

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.shape[0] if isinstance(self.head, Tensor) else self.head.outputs

    def forward(
        self, tokens_T: Tensor, shared: Pass, caches: Sequence[Tensor], x_TD: Tensor | None = None
    ) -> tuple[Tensor, Added]:
        """Writes each layer's cache [S, W]; the residual [T, D] and what is still to be added to it.

        x_TD: hidden states of the stage before, changed in place; the first stage makes them of the tokens.
        """
        self.counts_LA.zero_()
        if x_TD is None:
            x_TD = functional.embedding(tokens_T, self.embedding_VD)
        added: Added | None = None
        for layer, cache_SW in zip(self.layers, caches, strict=True):
            attended_TD = layer.attention(x_TD, added, shared, cache_SW)
            added = layer.block(x_TD, attended_TD, shared)
        if added is None:
            raise ValueError("a model needs at least one layer")
        return x_TD, added

    def settle(self, x_TD: Tensor, added: Added) -> None:
        """Adds to the residual in place, before it leaves the stage."""
        layer = self.layers[0]
        norm(x_TD, added, layer.attention_norm_D, self.eps, layer.input, wide=True)

    def logits(self, x_ND: Tensor, added: Added, out_NV: Tensor) -> None:
        """Writes scores of the next token to `out_NV`, float32 or bf16."""
        normed = norm(x_ND, added, self.norm_D, self.eps, self.head, wide=False)
        if isinstance(self.head, Tensor):
            torch.mm(normed.x_TD, self.head.t(), out=out_NV)
        else:
            multiply = few.linear_few if few.takes(self.head, normed) else linear_packed
            multiply(normed, self.head, out_NV)

    def empty_logits(self, tokens: int) -> Tensor:
        """Memory for the logits of `tokens` tokens: in the dtype in which they are computed."""
        dtype = torch.bfloat16 if isinstance(self.head, Tensor) else torch.float32
        return torch.empty(tokens, self.vocabulary, dtype=dtype, device=self.device)

    def decode_pass(self, rows: Rows, page: int, valid: Tensor | None = None) -> Pass:
        """A pass with one token of each sequence."""
        count = rows.positions_T.shape[0]
        numbers = torch.arange(count, dtype=torch.int32, device=self.device)
        tiles = TokenTiles(numbers, numbers, torch.ones_like(numbers), 1)
        slices = max(1, min(MOST_SLICES, WANTED_PROGRAMS // count))
        return self._pass(rows, tiles, 1 << (slices.bit_length() - 1), page, wide=False, valid=valid)

    def prefill_pass(self, counts: Sequence[int], rows: Rows, page: int) -> Pass:
        """A pass with `counts` tokens of each sequence."""
        tiles: list[tuple[int, int, int]] = []
        first = 0
        for sequence, count in enumerate(counts):
            cuts = range(0, count, PREFILL_TOKENS)
            tiles += [(sequence, first + cut, min(PREFILL_TOKENS, count - cut)) for cut in cuts]
            first += count
        sequence_C, first_C, count_C = aligned_parts(list(np.array(tiles, np.int32).T), self.device)
        token_tiles = TokenTiles(sequence_C, first_C, count_C, PREFILL_TOKENS)
        return self._pass(rows, token_tiles, 1, page, wide=self.is_wide(first))

    def is_wide(self, tokens: int) -> bool:
        """Whether a pass of so many tokens multiplies in bf16 by the library."""
        dense = all(isinstance(layer.gate_up, Tensor) for layer in self.layers)
        return tokens >= (WIDE_TOKENS if dense else WIDE_TOKENS_PACKED)

    def _pass(
        self, rows: Rows, tiles: TokenTiles, slices: int, page: int, wide: bool, valid: Tensor | None = None
    ) -> Pass:
        return Pass(
            rows.positions_T, rows.rows_T, rows.pages_BP, tiles, slices, page, self.rotations_CP2, self.eps,
            self.scale, wide, valid,
        )  # fmt: skip
