"""The processes of one replica: pipeline stages, and ranks of a stage that share its layers' experts."""

import re
from dataclasses import dataclass

from moe_worker.errors import SettingsError

MOST_RANKS = 1024
_SHAPE = re.compile(r"([0-9]{1,4})x([0-9]{1,4})")


@dataclass(frozen=True)
class MeshShape:
    """`pipeline` stages of `expert` ranks each. Rank 0 leads; ranks count stage by stage."""

    pipeline: int = 1
    expert: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Of PIPELINExEXPERT, as 2x4. Raises SettingsError."""
        match = _SHAPE.fullmatch(text)
        shape = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= shape.ranks <= MOST_RANKS:
            raise SettingsError(
                f"mesh {text[:20]!r} is no shape; write PIPELINExEXPERT, as 2x4, of up to {MOST_RANKS} ranks"
            )
        return shape

    @property
    def ranks(self) -> int:
        """Processes of a replica."""
        return self.pipeline * self.expert

    def stage_of(self, rank: int) -> int:
        """The stage that `rank` belongs to."""
        return rank // self.expert

    def column_of(self, rank: int) -> int:
        """The number of `rank` in its stage: ranks of one column hold one shard of the sequences."""
        return rank % self.expert

    def stage_ranks(self, stage: int) -> list[int]:
        """The ranks of a stage, in order."""
        return list(range(stage * self.expert, (stage + 1) * self.expert))

    def __str__(self) -> str:
        return f"{self.pipeline}x{self.expert}"


@dataclass(frozen=True)
class MeshReport:
    """What a leader says of its mesh.

    stages: first layer and number of layers of each. ready_ranks: those that take part. redundant: copies of
    experts in each layer. rebalances: how often experts moved.
    """

    pipeline: int
    expert: int
    epoch: int
    stages: tuple[tuple[int, int], ...]
    ready_ranks: tuple[int, ...]
    redundant: int = 0
    rebalances: int = 0
