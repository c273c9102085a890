"""Dispatch: sends tokens to the ranks of their experts, and the experts' outputs back.

A layer is attention -> route -> dispatch -> experts -> combine. In one process nothing moves;
`moe_worker.mesh.dispatch` exchanges tokens between processes.

Legend: T tokens of this rank, K experts of a token, R tokens that this rank computes experts for, D hidden.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class Received(NamedTuple):
    """Tokens for this rank's experts.

    x_RD: hidden states. experts_RK: places among this rank's experts, -1 for an expert of another rank and
    for none. weights_RK: float32.
    """

    x_RD: Tensor
    experts_RK: Tensor
    weights_RK: Tensor


class Dispatch(Protocol):
    """Moves the tokens of one layer; each `scatter` is followed by its `gather`."""

    def scatter(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        """Exchanges tokens between ranks. experts_TK: -1 for none; weights_TK: float32."""
        ...

    def gather(self, out_RD: Tensor) -> Tensor:
        """Sums the outputs of all ranks for each own token, [T, D]."""
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
