"""What the ranks of a mesh tell one another, in frames of `moe_worker.framing`. Tensors never travel here."""

from dataclasses import dataclass, field
from typing import Final, get_args

from moe_worker.framing import Codec
from moe_worker.sampling.remote import Draw


@dataclass(frozen=True)
class Claim:
    """Rank to leader: who it is. digest: of what all ranks must have in common. process: another one for each
    process. version: of the worker, and of what workers tell one another.
    """

    rank: int
    shape: str
    epoch: int
    digest: str
    process: str = ""
    version: str = ""


@dataclass(frozen=True)
class Welcome:
    """Leader to rank: it has joined. moved: by layer, the expert at each place, where that is not the
    placement for equal loads.
    """

    moved: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Meet:
    """Leader to rank: connect to `ranks`, itself among them, by torch.distributed's store at this port."""

    store_port: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Wait:
    """Leader to rank: the mesh serves without this rank; load, then `Again` will come."""


@dataclass(frozen=True)
class Again:
    """Leader to rank: all leave, and join again at once."""


@dataclass(frozen=True)
class Refusal:
    """Leader to rank: why it may not join."""

    sentence: str


@dataclass(frozen=True)
class Ready:
    """Rank to leader: its weights are loaded, and it has room for `pages` pages of KV cache.

    allocated: it has just these, and can have no other number.
    """

    pages: int
    allocated: bool = False


@dataclass(frozen=True)
class Allocate:
    """Leader to rank: the KV cache gets `pages` pages."""

    pages: int


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence, as models.batch.Segment. selected: those whose logits are wanted.

    source, behind: of Segment, among the steps whose tokens `Feed` has announced. draw: how the last stage
    draws the token behind the last of `selected`, whose logits then do not travel.
    """

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    shard: int
    selected: tuple[int, ...]
    source: int = -1
    behind: int = 1
    draw: Draw | None = None


@dataclass(frozen=True)
class Compute:
    """Leader to rank: the next pass. scratch: pages of a cache for this pass alone; 0: the engine's cache."""

    pieces: tuple[Piece, ...]
    scratch: int = 0


@dataclass(frozen=True)
class Feed:
    """Leader to the ranks of the first stage: `count` tokens come, which it has sampled."""

    count: int


@dataclass(frozen=True)
class AskCounts:
    """Leader to rank: answer with Counts."""


@dataclass(frozen=True)
class Counts:
    """Rank to leader: passes, and by layer its number, the tokens of each expert, and experts with tokens."""

    passes: int
    layers: tuple[tuple[int, tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Prepare:
    """Leader to the ranks of a stage: read the experts of `layer` that you hold once `places` hold.

    places: the expert at each place of all ranks.
    """

    number: int
    layer: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Switch:
    """Leader to the ranks of a stage: from the next pass on, move `number` holds; without `go`, forget it."""

    number: int
    go: bool = True


@dataclass(frozen=True)
class Beat:
    """Either way: this process runs. progress: the move that it has prepared, negative where that failed."""

    progress: int = 0


@dataclass(frozen=True)
class RankFailed:
    """Either way: why the sender ends. tokens: of a step for which a rank has no memory; it meets again."""

    sentence: str
    tokens: int = 0


@dataclass(frozen=True)
class End:
    """Leader to rank: there are no more passes."""


Message = (
    Claim
    | Welcome
    | Meet
    | Wait
    | Again
    | Refusal
    | Ready
    | Allocate
    | Compute
    | Feed
    | AskCounts
    | Counts
    | Prepare
    | Switch
    | Beat
    | RankFailed
    | End
)
CODEC: Final = Codec[Message](get_args(Message))
