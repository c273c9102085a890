"""What the ranks of a mesh tell one another, in frames of `moe_worker.framing`. Tensors never travel here."""

from dataclasses import dataclass
from typing import Final, get_args

from moe_worker.framing import Codec


@dataclass(frozen=True)
class Claim:
    """Rank to leader: who it is. digest: of what all ranks must have in common."""

    rank: int
    shape: str
    epoch: int
    digest: str


@dataclass(frozen=True)
class Welcome:
    """Leader to rank: it has joined; where torch.distributed's store listens."""

    store_port: int


@dataclass(frozen=True)
class Refusal:
    """Leader to rank: why it may not join."""

    sentence: str


@dataclass(frozen=True)
class Ready:
    """Rank to leader: its weights are loaded, and it has room for `pages` pages of KV cache."""

    pages: int


@dataclass(frozen=True)
class Allocate:
    """Leader to rank: the KV cache gets `pages` pages."""

    pages: int


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence, as models.batch.Segment. selected: those whose logits are wanted."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    shard: int
    selected: tuple[int, ...]
    source: int = -1


@dataclass(frozen=True)
class Compute:
    """Leader to rank: the next pass. scratch: pages of a cache for this pass alone; 0: the engine's cache.

    feeds: whether the leader sends the tokens that it samples, to the ranks of the first stage.
    """

    pieces: tuple[Piece, ...]
    scratch: int = 0
    feeds: bool = False


@dataclass(frozen=True)
class AskCounts:
    """Leader to rank: answer with Counts."""


@dataclass(frozen=True)
class Counts:
    """Rank to leader: passes, and by layer its number, the tokens of each expert, and experts with tokens."""

    passes: int
    layers: tuple[tuple[int, tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Beat:
    """Either way: this process runs."""


@dataclass(frozen=True)
class End:
    """Leader to rank: there are no more passes."""


Message = Claim | Welcome | Refusal | Ready | Allocate | Compute | AskCounts | Counts | Beat | End
CODEC: Final = Codec[Message](get_args(Message))
