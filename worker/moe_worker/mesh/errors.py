"""Why the ranks of a mesh cannot work together."""

from moe_worker.errors import WorkerError


class MeshError(WorkerError):
    """The ranks of a mesh cannot work together, or no longer do; another start may help."""

    retryable = True


class MeetAgainError(MeshError):
    """No rank is lost: the leader wants all to meet again, since one has come back."""


class RankAbsentError(MeshError):
    """Ranks have not come within the time that they had."""


class RankLostError(MeshError):
    """Another rank ended or is silent. The exit code tells whoever starts this one that the cause is
    elsewhere.
    """

    exit_code = 3


class RankFailedError(RankLostError):
    """Another rank has said why it ends."""


class RankMemoryError(MeshError):
    """A rank has no memory for its part of a step of `tokens` tokens; smaller steps may fit."""

    def __init__(self, rank: int, tokens: int) -> None:
        super().__init__(
            f"rank {rank} has no memory for a step of {tokens} tokens; lower --prefill-tokens (to "
            f"{max(1, tokens // 2)}) or the KV memory"
        )
        self.rank, self.tokens = rank, tokens
