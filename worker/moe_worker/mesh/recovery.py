"""A mesh that has lost a rank meets again: without it, if the others have its experts, or with a new one.

All processes that are left keep their weights. `may_spare` decides, everything else acts.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence

from moe_worker.config.mesh import MeshShape
from moe_worker.mesh.channel import Channel
from moe_worker.mesh.errors import MeetAgainError, MeshError, RankAbsentError, RankMemoryError
from moe_worker.mesh.member import GRACE_S, Member
from moe_worker.mesh.messages import Allocate, Ready
from moe_worker.mesh.places import ExpertPlaces
from moe_worker.mesh.rank_stage import RankStage
from moe_worker.mesh.rebalance.hold import HeldExperts

log = logging.getLogger(__name__)
Waiting = Callable[[Channel], None]
# The replica ends where a lost rank does not come back within REFORM_S, or does not load and compile its part
# within LOAD_S after that, however often it dies meanwhile, or where ranks are lost more than MOST_REFORMS
# times in REFORM_WINDOW_S. A leader may count as hung while a rank is silent for LOAD_SILENT_S.
REFORM_S, REFORM_PAUSE_S = 120.0, 0.2
LOAD_S, LOAD_SILENT_S = 600.0, 60.0
MOST_REFORMS, REFORM_WINDOW_S = 5, 600.0


def agree_on_pages(
    member: Member,
    pages: int,
    waits: Waiting | None = None,
    trim: Callable[[int], int] | None = None,
    *,
    allocated: bool = False,
) -> int:
    """The pages that every rank has room for; returns when all ranks have come so far.

    The leader waits for one rank after the other, even if another is lost meanwhile: a rank that loads
    notices nothing before it has loaded, and could not meet the others again earlier. It logs for whom it
    waits.

    waits: called now and then while the leader waits for a rank. trim: how many of these the leader allots,
    unless a rank has allocated them; None: all. allocated: whether this rank has allocated `pages`.
    """
    if member.leads:
        named = _naming(waits)
        others: list[Ready] = [channel.receive(Ready, waits=named) for channel in member.channels]
        most = min([pages, *(other.pages for other in others)])
        if trim is not None and not any(other.allocated for other in others):
            most = trim(most)
        for channel in member.channels:
            channel.send(Allocate(most))
        return most
    member.channels[0].send(Ready(pages, allocated))
    allotted: int = member.channels[0].receive(Allocate).pages
    return allotted


def _naming(waits: Waiting | None) -> Waiting:
    """`waits`, which logs each rank when it is waited for."""
    named: set[int] = set()

    def wait(channel: Channel) -> None:
        if channel.rank not in named:
            named.add(channel.rank)
            log.info("the leader waits for rank %d to load and compile its part", channel.rank)
        if waits is not None:
            waits(channel)

    return wait


def start_together(member: Member, part: RankStage, pages: int, waits: Waiting | None = None) -> None:
    """Waits until all ranks have compiled their passes, which takes minutes where nothing is cached: nobody
    waits for that in an exchange, which has a limit. Then all prepare exchanges together; one that the others
    serve without prepares alone, before it is ready. Raises MeshError.
    """
    if member.group is None:
        part.resume()
    agree_on_pages(member, pages, waits)
    if member.group is not None:
        part.resume()


def whole_columns(shape: MeshShape, missing: frozenset[int]) -> list[int]:
    """Shards of which every stage has its rank: pure."""
    lost = {shape.column_of(rank) for rank in missing}
    return [column for column in range(shape.expert) if column not in lost]


def may_spare(
    shape: MeshShape, places: ExpertPlaces, stages: Sequence[range], missing: frozenset[int]
) -> bool:
    """Whether the other ranks have all layers and experts, and a shard that is whole: pure."""

    def present(stage: int) -> list[int]:
        return [shape.column_of(rank) for rank in shape.stage_ranks(stage) if rank not in missing]

    complete = all(places.complete(present(stage), layers) for stage, layers in enumerate(stages))
    return complete and bool(whole_columns(shape, missing))


class Recovery:
    """Of one rank. stages: the layers of each stage, for the leader. on_met: called when ranks have met; may
    raise MeshError.
    """

    def __init__(
        self, member: Member, part: RankStage, held: HeldExperts | None, pages: int,
        on_met: Callable[[], None], most: int = MOST_REFORMS,
    ) -> None:  # fmt: skip
        self._most = most
        self._member, self._part, self._held, self._pages, self._on_met = member, part, held, pages, on_met
        self.stages: Sequence[range] = ()
        self._begun: list[float] = []
        self._load_ends = math.inf

    def recover(self, error: MeshError) -> None:
        """Meets the other ranks again after `error`; all but lost ones keep their weights.

        Raises MeshError where a rank does not come within REFORM_S, or does not load within LOAD_S, or where
        the leader has lost ranks, or meeting has failed, `most` times in REFORM_WINDOW_S already.
        """
        begin, self._load_ends = time.monotonic(), math.inf
        # Steps become smaller each time that a rank has no memory for one, so that ends by itself. The others
        # come as often as their leader calls.
        counts = self._member.leads and not isinstance(error, MeetAgainError | RankMemoryError)
        while True:
            if counts:
                self._count(error)
            log.warning(
                "rank %d waits up to %g s until all ranks of the mesh meet again: %s",
                self._member.rank, REFORM_S, error,
            )  # fmt: skip
            try:
                self._meet()
            except RankAbsentError:
                raise
            except MeshError as again:
                error, counts = again, True
                time.sleep(min(REFORM_PAUSE_S * len(self._begun), REFORM_S))
            else:
                break
        member, took = self._member, time.monotonic() - begin
        if member.group is None:
            log.warning(
                "rank %d is ready after %.2f s; mesh %s serves without it, and takes it in between two steps",
                member.rank, took, member.shape,
            )  # fmt: skip
            return
        absent = sorted(member.absent)
        log.warning(
            "mesh %s has formed again (%d) in %.2f s%s", member.shape, member.formation, took,
            f"; it serves without ranks {absent}" if absent else "",
        )  # fmt: skip

    def _count(self, error: MeshError) -> None:
        """Raises `error` where this happens too often."""
        now = time.monotonic()
        self._begun = [*(each for each in self._begun if now - each < REFORM_WINDOW_S), now]
        if len(self._begun) > self._most:
            raise error

    def _meet(self) -> None:
        member, held = self._member, self._held
        if member.leads and held is not None:
            member.moved = held.places.moved
        self._part.release()
        member.reform(REFORM_S, self._may_lack)
        self._load_ends = min(self._load_ends, time.monotonic() + LOAD_S)
        # A rank that is new must have room for as many pages as the others have allocated.
        if agree_on_pages(member, self._pages, self._waits, allocated=True) != self._pages:
            raise MeshError(
                f"a new rank has no room for {self._pages} pages of KV cache; start all ranks again"
            )
        if member.group is None:
            # The leader's door waits for two answers: loaded and compiled. This rank did both before.
            agree_on_pages(member, self._pages)
            return
        self._part.rejoin(member.group)
        if held is not None:
            held.adopt(member.moved, self._part.stage.layers)
        start_together(member, self._part, self._pages, self._waits)
        member.arm()
        if member.leads:
            member.wait_for_absent(self._pages)
        self._on_met()

    def _waits(self, channel: Channel) -> None:
        """The leader waits for a rank that loads: it does not hang, unless that rank does."""
        now = time.monotonic()
        if now >= self._load_ends:
            raise RankAbsentError(
                f"rank {channel.rank} came back, but did not load and compile its part within {LOAD_S:g} s; "
                "see its log, and keep its model and TRITON_CACHE_DIR on a fast volume"
            )
        if now - channel.heard < LOAD_SILENT_S:
            self._member.on_wait()

    def _may_lack(self, missing: frozenset[int], waited_s: float) -> bool:
        if self._held is None or waited_s < GRACE_S:
            return False
        return may_spare(self._member.shape, self._held.places, self.stages, missing)
