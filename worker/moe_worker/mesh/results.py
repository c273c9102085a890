"""What the last stage of a mesh makes of a pass: tokens that it draws, and logits for the leader to sample.

Legend: n wanted rows of a shard, N logits rows, D tokens drawn, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_worker.kernels.transfer import to_device
from moe_worker.mesh.messages import Piece
from moe_worker.sampling.drawer import Drawer
from moe_worker.sampling.remote import FAILED, Draw


class PassResult(NamedTuple):
    """logits_NV: of the wanted rows that are not drawn. tokens_D: int64, of all others, in their order."""

    logits_NV: Tensor
    tokens_D: Tensor


class Wanted(NamedTuple):
    """Wanted rows, counted over some pieces: those whose logits are kept, and those that are drawn."""

    kept: list[int]
    drawn: list[int]

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "Wanted":
        """A piece with a draw has it for the last of its rows."""
        found, row = cls([], []), 0
        for piece in pieces:
            count = len(piece.selected)
            found.kept.extend(range(row, row + count - (piece.draw is not None)))
            found.drawn.extend(range(row + count - 1, row + count) if piece.draw is not None else ())
            row += count
        return found


def drawn(logits_nV: Tensor, pieces: Sequence[Piece], drawer: Drawer) -> PassResult:
    """The result of a shard's pieces."""
    wanted, draws = Wanted.of(pieces), tuple(_draws(pieces))
    if not draws:
        return PassResult(logits_nV, torch.empty(0, dtype=torch.int64, device=logits_nV.device))
    tokens_D = drawer.tokens(_rows(logits_nV, wanted.drawn), draws)
    return PassResult(_rows(logits_nV, wanted.kept), tokens_D)


def checked(tokens_D: Tensor, vocabulary: int) -> Tensor:
    """`tokens_D`, FAILED where another rank has sent what is no token of the vocabulary."""
    return tokens_D.masked_fill((tokens_D < 0) | (tokens_D >= vocabulary), FAILED)


def _draws(pieces: Iterable[Piece]) -> Iterable[Draw]:
    return (piece.draw for piece in pieces if piece.draw is not None)


def _rows(logits_nV: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == logits_nV.shape[0]:
        return logits_nV
    return logits_nV.index_select(0, to_device(torch.tensor(rows, dtype=torch.int64), logits_nV.device))
