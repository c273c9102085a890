"""Why the ranks of a mesh cannot work together."""

from moe_worker.errors import WorkerError


class MeshError(WorkerError):
    """The ranks of a mesh cannot work together, or no longer do; another start may help."""

    retryable = True


class MeetAgainError(MeshError):
    """No rank is lost: the leader wants all to meet again, since one has come back."""


class RankLostError(MeshError):
    """Another rank ended or is silent. The exit code tells whoever starts this one that the cause is
    elsewhere.
    """

    exit_code = 3
