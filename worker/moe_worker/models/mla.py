"""Multi-head latent attention (arXiv:2405.04434, 2.1) with the key and value expansions absorbed.

The part of a query head without position is multiplied by its slice of W_UK once. Scores and weighted sums
then run over the cached latents themselves: keys and values are never expanded.

Legend: T tokens, B sequences, S cached positions, D hidden, H heads, N query elements without and P with
rotary position, R latent rank, W = R + P cache row, V value elements of a head, Q query rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_worker.kernels.linear import Linear
from moe_worker.kernels.reference import rms_norm
from moe_worker.models.attention import attend
from moe_worker.models.layers import LayerStep, Projects
from moe_worker.models.rope import rotate

# DeepSeek's code gives the two inner norms no eps, so that they keep the default of its norm.
INNER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class QueryExpansion:
    """The second half of a low-rank query projection, with its norm."""

    norm_Q: Tensor
    linear: Linear

    def forward(self, x_TQ: Tensor) -> Tensor:
        """[T, Q] to [T, H * (N + P)]."""
        return self.linear.forward(rms_norm(x_TQ, self.norm_Q, INNER_NORM_EPS))


class AbsorbedAttention:
    """The order of the operations on a CPU; a backend supplies those on the cache and on heads.

    input: its outputs are Q query ranks (or H * (N + P) query elements), R latents, P rotary key elements.
    query: the second half of a low-rank query projection, with its norm.
    """

    input: Projects
    query: Projects | None
    latent_norm_R: Tensor
    output: Projects
    rope_width: int

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        """Writes the tokens' latents to the cache and attends over it; [T, D]."""
        if not step.batch.segments:  # of a mesh's rank: it computes experts for the tokens of others only
            return x_TD
        joint_TO = self.input.forward(x_TD)
        width = self.latent_norm_R.shape[0] + self.rope_width
        query_TO, latent_TW = joint_TO.tensor_split([joint_TO.shape[1] - width], dim=1)
        if self.query is not None:
            query_TO = self.query.forward(query_TO)
        self.write(latent_TW, step)
        latent_THR = self.attend(self.absorb(query_TO, step), step)
        return self.output.forward(self.expand(latent_THR).flatten(1))

    def write(self, latent_TW: Tensor, step: LayerStep) -> None:
        """Normalises the latents, rotates the rotary key, and writes both into the cache."""
        raise NotImplementedError

    def absorb(self, query_TO: Tensor, step: LayerStep) -> Tensor:
        """Queries in the space of cache rows: [T, H * (N + P)] to [T, H, W]."""
        raise NotImplementedError

    def attend(self, query_THW: Tensor, step: LayerStep) -> Tensor:
        """Weighted sums of latents: [T, H, R]."""
        raise NotImplementedError

    def expand(self, latent_THR: Tensor) -> Tensor:
        """Values of the heads: [T, H, V]."""
        raise NotImplementedError


@dataclass(frozen=True)
class LatentAttention(AbsorbedAttention):
    """In plain torch. round_inputs: those of W_UK and W_UV to bfloat16, whatever else is computed in."""

    input: Linear
    query: QueryExpansion | None
    latent_norm_R: Tensor
    key_HNR: Tensor
    value_HRV: Tensor
    output: Linear
    rope_width: int
    scale: float
    round_inputs: bool = False

    def write(self, latent_TW: Tensor, step: LayerStep) -> None:
        """See AbsorbedAttention."""
        latent_TR, key_TP = latent_TW.tensor_split([self.latent_norm_R.shape[0]], dim=1)
        key_TP = rotate(key_TP.unsqueeze(1), step.rotations_T1P)[:, 0]
        row_TW = torch.cat((rms_norm(latent_TR, self.latent_norm_R, INNER_NORM_EPS), key_TP), dim=1)
        step.cache.write(step.layer, step.batch.rows_T, row_TW)

    def absorb(self, query_TO: Tensor, step: LayerStep) -> Tensor:
        """See AbsorbedAttention."""
        heads, plain, _ = self.key_HNR.shape
        query_THQ = query_TO.view(query_TO.shape[0], heads, -1)
        plain_THN, rope_THP = query_THQ.tensor_split([plain], dim=2)
        latent_HTR = torch.bmm(self._rounded(plain_THN).transpose(0, 1), self.key_HNR)
        return torch.cat((latent_HTR.transpose(0, 1), rotate(rope_THP, step.rotations_T1P)), dim=2)

    def attend(self, query_THW: Tensor, step: LayerStep) -> Tensor:
        """See AbsorbedAttention."""
        return attend(query_THW, _same_rows, step, self.scale)[..., : self.latent_norm_R.shape[0]]

    def expand(self, latent_THR: Tensor) -> Tensor:
        """See AbsorbedAttention."""
        return torch.bmm(self._rounded(latent_THR).transpose(0, 1), self.value_HRV).transpose(0, 1)

    def _rounded(self, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype) if self.round_inputs else x


def _same_rows(rows_BSW: Tensor) -> tuple[Tensor, Tensor]:
    """A row is key and value of one head. The rotary elements of the sums mean nothing; the caller drops
    them, so that one fused operation computes everything.
    """
    rows_B1SW = rows_BSW.unsqueeze(1)
    return rows_B1SW, rows_B1SW
