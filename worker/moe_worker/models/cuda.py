"""The GPU path: DeepSeek models over Triton kernels.

Legend: T tokens, N tokens whose logits are wanted, B sequences, D hidden, V vocabulary, P pages of a
sequence, W cache row, L layers, A experts, C tiles of tokens.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moe_worker.kernels.triton import compiling, few
from moe_worker.kernels.triton.attention import TokenTiles
from moe_worker.kernels.triton.expanded import Contexts, context_rows, expanded_tokens
from moe_worker.kernels.triton.linear import linear_packed
from moe_worker.kernels.triton.norm import Added
from moe_worker.kernels.triton.packed import PackedSparse14
from moe_worker.kernels.triton.wide import Weight
from moe_worker.models.batch import aligned_parts
from moe_worker.models.cuda_layer import CudaLayer, Pass, Products, norm

# Slices of the context that fill an H200's 132 multiprocessors twice where sequences are few.
WANTED_PROGRAMS = 264
MOST_SLICES = 16
# Tokens of a prefill that one attention program takes.
PREFILL_TOKENS = 4
# From this many tokens on, a step multiplies in bf16 by the library; packed weights are dequantized for that,
# which in four bits takes 0.6 ms a layer of DeepSeek-V2-Lite on an H100.
WIDE_TOKENS = 512
WIDE_TOKENS_PACKED = 8192
# On an H200 prefill makes 102,658 tokens per second in steps of 4,096 in e4m3, and 108,272 over the packed
# weights; in steps of 6,144 113,251 and 109,756.
WIDE_TOKENS_E4M3 = 5120
# From this many tokens on, sparse experts become dense int4 ones in each layer. On an H200 that takes 105 us,
# and their products 820 us at 2,048 tokens (dense ones 658) and 440 at 1,024 (dense ones 358).
DENSE_TOKENS = 2048
# Bytes of the keys and values that a pass may expand.
MOST_EXPANDED_BYTES = 1 << 30
# Nanoseconds of a layer on an H200, with 16 heads: what absorbed queries cost more for a token, and for a
# token and a position that it sees; what expanding costs for a position, and for its launches; what each of
# them takes for a position of the longest context, which one program reads, or, expanded, each KV split in
# part; and the launches for streams whose queries stay absorbed while prompts are expanded.
ABSORBED_TOKEN, ABSORBED_PAIR, EXPANDED_POSITION, EXPANDED_LAUNCHES = 40.0, 0.25, 11.0, 10_000.0
ABSORBED_LONGEST, EXPANDED_LONGEST, SINGLES_LAUNCHES = 120.0, 15.0, 15_000.0


@dataclass(frozen=True)
class Rows:
    """What a pass computes. positions_T, rows_T (of the cache): int64; pages_BP: int32."""

    positions_T: Tensor
    rows_T: Tensor
    pages_BP: Tensor


@dataclass(frozen=True)
class CudaModel:
    """Prepared weights of a stage. begin: the number of its first layer.

    counts_LA: int32 histogram of the experts that the newest pass used, padding left out. e4m3: whether
    passes of many tokens multiply in e4m3.
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
    e4m3: bool = False

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
        numbered = zip(self.layers, caches, strict=True)
        for layer, cache_SW in self._of_each_kind(numbered) if compiling.is_ahead() else numbered:
            attended_TD = layer.attention(x_TD, added, shared, cache_SW)
            added = layer.block(x_TD, attended_TD, shared)
        if added is None:
            raise ValueError("a model needs at least one layer")
        return x_TD, added

    def _of_each_kind(
        self, numbered: Iterable[tuple[CudaLayer, Tensor]]
    ) -> Iterator[tuple[CudaLayer, Tensor]]:
        """The first two layers of each kind: others launch the same kernels."""
        seen = Counter[Hashable]()
        for layer, cache_SW in numbered:
            seen[layer.kind] += 1
            if seen[layer.kind] <= 2:
                yield layer, cache_SW

    def settle(self, x_TD: Tensor, added: Added) -> None:
        """Adds to the residual in place, before it leaves the stage."""
        layer = self.layers[0]
        norm(x_TD, added, layer.attention_norm_D, self.eps, layer.input, Products.BF16)

    def logits(self, x_ND: Tensor, added: Added, out_NV: Tensor) -> None:
        """Writes scores of the next token to `out_NV`, float32 or bf16."""
        normed = norm(x_ND, added, self.norm_D, self.eps, self.head, Products.GROUPS)
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
        return self._pass(rows, tiles, 1 << (slices.bit_length() - 1), page, Products.GROUPS, valid)

    def prefill_pass(
        self, counts: Sequence[int], rows: Rows, page: int, lengths: Sequence[int] | None = None
    ) -> Pass:
        """A pass with `counts` tokens of each sequence.

        lengths: those of the sequences with them; None: attention expands no contexts.
        """
        if lengths is None or not self.expands(counts, lengths):
            return self.absorbed_pass(rows, _tiles(counts, PREFILL_TOKENS, self.device), page)
        [first_B] = aligned_parts([context_firsts(lengths)], self.device)
        rows_C = context_rows(rows.pages_BP, first_B, sum(lengths), page, 0)
        tiles = _tiles(counts, expanded_tokens(counts, lengths), self.device)
        return self.expanded_pass(rows, Contexts(rows_C, first_B, tiles), page)

    def absorbed_pass(self, rows: Rows, tiles: TokenTiles, page: int, valid: Tensor | None = None) -> Pass:
        """A pass of prompts whose queries are all absorbed; `tiles` are of PREFILL_TOKENS."""
        return self._pass(rows, tiles, 1, page, self.products(rows.positions_T.shape[0]), valid)

    def expanded_pass(
        self,
        rows: Rows,
        contexts: Contexts,
        page: int,
        valid: Tensor | None = None,
        singles: Pass | None = None,
    ) -> Pass:
        """A pass of prompts whose contexts are expanded, but for those of `singles`."""
        products = self.products(rows.positions_T.shape[0])
        shared = self._pass(rows, contexts.tiles, 1, page, products, valid)
        return replace(shared, contexts=contexts, singles=singles)

    def products(self, tokens: int) -> Products:
        """How a pass of so many tokens multiplies."""
        dense = all(isinstance(layer.gate_up, Tensor) for layer in self.layers)
        wide, least = Products.BF16, WIDE_TOKENS if dense else WIDE_TOKENS_PACKED
        if self.e4m3:
            wide, least = Products.E4M3, WIDE_TOKENS_E4M3
        if tokens >= least:
            return wide
        sparse = any(isinstance(layer.gate_up, PackedSparse14) for layer in self.layers)
        return Products.DENSE_GROUPS if sparse and tokens >= DENSE_TOKENS else Products.GROUPS

    def expands(self, counts: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether attention costs less with keys and values expanded than with queries absorbed."""
        return self.saved_by_expanding(counts, lengths) > 0

    def saved_by_expanding(
        self, counts: Sequence[int], lengths: Sequence[int], singles: Sequence[int] = ()
    ) -> float:
        """Nanoseconds of a pass that attention needs less with keys and values expanded.

        singles: lengths of streams with one token each, whose contexts would not be expanded.
        """
        if not counts:
            return 0.0
        latent, value = self.layers[0].latent, self.layers[0].value_HRV.shape[2]
        heads, plain, _ = latent.key_HNR.shape
        positions = sum(lengths)
        if positions * heads * (plain + value) * 2 > MOST_EXPANDED_BYTES:
            return 0.0
        pairs = sum(count * (length - count / 2) for count, length in zip(counts, lengths, strict=True))
        absorbed = ABSORBED_TOKEN * sum(counts) + ABSORBED_PAIR * pairs
        absorbed = max(absorbed, ABSORBED_LONGEST * max(*lengths, *singles, 0))
        expanded = EXPANDED_POSITION * positions + EXPANDED_LONGEST * max(lengths) + EXPANDED_LAUNCHES
        return len(self.layers) * (absorbed - expanded - (SINGLES_LAUNCHES if singles else 0))

    def _pass(
        self,
        rows: Rows,
        tiles: TokenTiles,
        slices: int,
        page: int,
        products: Products,
        valid: Tensor | None = None,
    ) -> Pass:
        return Pass(
            rows.positions_T, rows.rows_T, rows.pages_BP, tiles, slices, page, self.rotations_CP2, self.eps,
            self.scale, products, valid,
        )  # fmt: skip


def token_tiles(counts: Sequence[int], most: int, skipped: int = 0) -> NDArray[np.int32]:
    """Sequence, first token and number of tokens of tiles of up to `most` tokens: [3, C].

    skipped: sequences at the front that get none.
    """
    counts_B = np.array(counts, np.int32)
    tiles_B = -(-counts_B // most)
    tiles_B[:skipped] = 0
    sequence_C = np.repeat(np.arange(len(counts_B), dtype=np.int32), tiles_B)
    place_C = np.arange(len(sequence_C), dtype=np.int32) - (np.cumsum(tiles_B) - tiles_B)[sequence_C]
    first_C = (np.cumsum(counts_B) - counts_B)[sequence_C] + place_C * most
    count_C = np.minimum(most, counts_B[sequence_C] - place_C * most)
    return np.stack((sequence_C, first_C, count_C)).astype(np.int32)


def context_firsts(lengths: Sequence[int], skipped: int = 0) -> NDArray[np.int32]:
    """Where the context of each sequence begins if they lie one behind the other, and where they end.

    skipped: sequences at the front whose contexts are left out.
    """
    firsts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths[skipped:], out=firsts[skipped + 1 :])
    return firsts


def _tiles(counts: Sequence[int], most: int, device: torch.device) -> TokenTiles:
    sequence_C, first_C, count_C = aligned_parts(list(token_tiles(counts, most)), device)
    return TokenTiles(sequence_C, first_C, count_C, most)
