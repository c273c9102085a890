"""Dispatch: brings tokens to the ranks that hold their experts, and the experts' outputs back.

A layer is attention -> route -> dispatch -> experts -> combine. Where one process holds all experts there is
nothing to move; `moe_worker.mesh.dispatch` exchanges tokens between processes.

Legend: T tokens of this rank, K experts of a token, R tokens that this rank computes experts for, D hidden.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class Received(NamedTuple):
    """Tokens for this rank's experts.

    x_RD: hidden states. experts_RK: int64 places among the rank's own experts, -1 where an expert is
    another rank's, or none. weights_RK: float32.
    """

    x_RD: Tensor
    experts_RK: Tensor
    weights_RK: Tensor


class Dispatch(Protocol):
    """Moves the tokens of one layer; `gather` follows each `scatter` before the next one."""

    def scatter(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        """What the ranks send one another. experts_TK: int64, -1 for none; weights_TK: float32."""
        ...

    def gather(self, out_RD: Tensor) -> Tensor:
        """Sums for each own token what the ranks computed for it, [T, D]."""
        ...


class LocalDispatch:
    """All experts are in this process."""

    def scatter(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        """The tokens themselves."""
        return Received(x_TD, experts_TK, weights_TK)

    def gather(self, out_RD: Tensor) -> Tensor:
        """The outputs themselves."""
        return out_RD


LOCAL = LocalDispatch()
