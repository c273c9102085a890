"""Multi-head latent attention (arXiv:2405.04434, 2.1) with the key and value expansions absorbed.

A query head's part without position is multiplied by its slice of W_UK once, after which scores and
weighted sums run over the cached latents themselves: no keys or values are ever expanded.

Legend: T tokens, B sequences, S cached positions, D hidden, H heads, N query elements without and P with
rotary position, R latent rank, W = R + P cache row, V value elements of a head, Q query rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.kernels.linear import Linear
from moe_worker.kernels.reference import rms_norm
from moe_worker.kvcache.paged import PagedCache
from moe_worker.models.attention import attend
from moe_worker.models.batch import Batch
from moe_worker.models.rope import rotate

# DeepSeek's code gives the two inner norms no eps, so that they keep the default of its norm.
INNER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class QueryExpansion:
    """The second half of a low-rank query projection, behind its norm."""

    norm_Q: Tensor
    linear: Linear

    def forward(self, x_TQ: Tensor) -> Tensor:
        """[T, Q] to [T, H * (N + P)]."""
        return self.linear.forward(rms_norm(x_TQ, self.norm_Q, INNER_NORM_EPS))


@dataclass(frozen=True)
class LatentAttention:
    """Weights of one layer's attention, prepared: the two projections of the input are one matrix."""

    input: Linear  # rows: Q query ranks (or H * (N + P) query elements), R latents, P rotary key elements
    query: QueryExpansion | None
    latent_norm_R: Tensor
    key_HNR: Tensor
    value_HRV: Tensor
    output: Linear
    rope_width: int
    scale: float

    def forward(
        self, x_TD: Tensor, rotations_TP: Tensor, batch: Batch, cache: PagedCache, layer: int
    ) -> Tensor:
        """Writes the tokens' latents to the cache, attends over it; [T, D]."""
        rank = self.latent_norm_R.shape[0]
        joint_TO = self.input.forward(x_TD)
        query_TO, latent_TR, key_TP = torch.split(
            joint_TO, [joint_TO.shape[1] - rank - self.rope_width, rank, self.rope_width], dim=1
        )
        rotated_T1P = rotate(key_TP.unsqueeze(1), rotations_TP)
        row_TW = torch.cat(
            (rms_norm(latent_TR, self.latent_norm_R, INNER_NORM_EPS), rotated_T1P[:, 0]), dim=1
        )
        cache.write(layer, batch.rows_T, row_TW)
        query_THW = self._absorbed_query(query_TO, rotations_TP)
        latent_THR = attend(query_THW, _same_rows, batch, cache, layer, self.scale)[..., :rank]
        value_HTV = torch.bmm(latent_THR.transpose(0, 1), self.value_HRV)
        return self.output.forward(value_HTV.transpose(0, 1).flatten(1))

    def _absorbed_query(self, query_TO: Tensor, rotations_TP: Tensor) -> Tensor:
        """Queries in the space of cache rows: [T, H, W]."""
        heads, plain, _ = self.key_HNR.shape
        if self.query is not None:
            query_TO = self.query.forward(query_TO)
        plain_THN, rope_THP = torch.split(
            query_TO.reshape(query_TO.shape[0], heads, -1), [plain, self.rope_width], dim=2
        )
        latent_HTR = torch.bmm(plain_THN.transpose(0, 1), self.key_HNR)
        return torch.cat((latent_HTR.transpose(0, 1), rotate(rope_THP, rotations_TP)), dim=2)


def _same_rows(rows_BSW: Tensor) -> tuple[Tensor, Tensor]:
    """A row is key and value of one head. The rotary elements of the sums mean nothing; the caller cuts
    them off, so that one fused operation does it all.
    """
    rows_B1SW = rows_BSW.unsqueeze(1)
    return rows_B1SW, rows_B1SW
