"""Which replica takes the next request, and whether one that failed is tried again. Pure.

Least loaded first, where the load of a replica is what this frontend has running on it. Replicas that
just failed come last, for a time that doubles with every failure in a row: the EndpointSlice learns of a
dead pod only after its readiness probe failed, and until then it would look the least loaded of all.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from moe_api.backoff import Backoff

MAX_ATTEMPTS: Final = 3
SUSPICION: Final = Backoff(first_s=0.5, longest_s=10.0)
"""How long a replica that failed comes last."""
RETRY: Final = Backoff(first_s=0.02, longest_s=1.0)
"""Between two attempts to have one request answered."""
RETRY_AFTER_S: Final = 1.0
# A stream that lost its replica waits this long for another one of its revision: a worker that was killed is
# back within seconds where its model is small, and a rollout or a scale-up may be bringing others.
PATIENCE_S: Final = 30.0
# A replica that broke the protocol is the last choice for this long.
DISTRUST_S: Final = 30.0

WELL_TOKENS: Final = 16
"""An attempt that brought so many tokens got on well: what ended it is not the request's doing."""
MOST_SILENT_DEATHS: Final = 2
MOST_DEATHS: Final = 3
MOST_CUTS: Final = 10
"""Attempts that end after fewer tokens than that, one after the other."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What is known of a replica.

    Attributes:
        name: of the replica's leader.
        in_flight: requests of this frontend that run on it.
        last_chosen: number of the request that went there last; ties go to the lowest.
        failures: in a row.
        failed_at: time of the last of them, in seconds.
        revision: of what it serves.
        distrusted_until: seconds; it broke the protocol, and is suspect until then whatever it does.
    """

    name: str
    in_flight: int = 0
    last_chosen: int = 0
    failures: int = 0
    failed_at: float = 0.0
    revision: str = ""
    distrusted_until: float = 0.0


LEAST_LOADED: Final = "LeastLoaded"


class Ranking(Protocol):
    """Orders the candidates for one request."""

    @property
    def reason(self) -> str:
        """CamelCase, for machines."""

    def costs(self, candidates: Sequence[Load], now: float) -> Sequence[float]:
        """The cost of each candidate; the cheapest is chosen. `now` in seconds."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """Where a request goes and why.

    Attributes:
        replica: name of the chosen replica.
        candidates: how many there were to choose from.
        reason: CamelCase, for machines.
        message: for people.
    """

    replica: str
    candidates: int
    reason: str
    message: str


def is_suspect(load: Load, now: float) -> bool:
    """Whether a replica failed so lately that others are better; `now` in seconds."""
    if now < load.distrusted_until:
        return True
    if load.failures == 0:
        return False
    return now - load.failed_at < SUSPICION.pause_s(load.failures)


@dataclasses.dataclass(frozen=True)
class Trials:
    """What was tried for one request since its client last got something.

    A request may be what kills its replicas, so deaths under it are counted. It is stopped by the second one
    without a token in between, and by the third one with a few: it takes two or three replicas with it. A
    stream that got on well in between is not to blame, and may lose any number.

    Attributes:
        began: seconds; when that was.
        attempts: that brought nothing.
        tried: replicas where they failed.
        patience_s: how long a stream that has begun may go without anything.
        dead: replicas that died under the request since it last got on well, in order.
        silent: how many of the last ones there are without a token in between.
        cut: attempts that brought a few tokens, since then.
    """

    began: float
    attempts: int = 0
    tried: frozenset[str] = frozenset()
    patience_s: float = PATIENCE_S
    dead: tuple[str, ...] = ()
    silent: int = 0
    cut: int = 0

    def after(
        self, replica: str, *, progressed: bool, now: float, died: bool = False, tokens: int = 0
    ) -> "Trials":
        """Takes in an attempt that failed; one that brought something begins the count anew.

        died: whether the replica died under it. tokens: how many it brought.
        """
        earlier = dataclasses.replace(self, dead=(), cut=0) if tokens >= WELL_TOKENS else self
        silent = (0 if progressed else self.silent) + died
        counted = dataclasses.replace(
            earlier, dead=(*earlier.dead, replica) if died else earlier.dead, silent=silent
        )
        if progressed:
            return dataclasses.replace(
                counted, began=now, attempts=1, tried=frozenset({replica}), cut=counted.cut + 1
            )
        return dataclasses.replace(counted, attempts=self.attempts + 1, tried=self.tried | {replica})

    def all_over(self) -> "Trials":
        """Nobody is left to try: from the first one again, after a pause."""
        return dataclasses.replace(self, tried=frozenset())

    @property
    def deadly(self) -> bool:
        """Whether the request is likely to be what replicas die of."""
        return self.silent >= MOST_SILENT_DEATHS or len(self.dead) >= MOST_DEATHS

    def left_s(self, now: float) -> float:
        """Seconds that a stream which has begun may still wait; 0 at least."""
        return max(0.0, self.began + self.patience_s - now)


def choose(
    loads: Iterable[Load],
    tried: frozenset[str],
    now: float,
    revision: str | None = None,
    ranking: Ranking | None = None,
) -> Decision | None:
    """The replica for a request, or None when there is none left that was not tried.

    Args:
        loads: of the replicas that are ready.
        tried: names of replicas where this request failed before.
        now: seconds, on the clock of `Load.failed_at`.
        revision: the only one that will do; None: any.
        ranking: gives each candidate a cost, and says why the cheapest one is chosen; None: the fewest
            requests in flight.
    """
    candidates = [load for load in loads if load.name not in tried and revision in (None, load.revision)]
    if not candidates:
        return None
    costs = [load.in_flight for load in candidates] if ranking is None else ranking.costs(candidates, now)
    _, best = min(
        zip(costs, candidates, strict=True),
        key=lambda pair: (is_suspect(pair[1], now), pair[0], pair[1].last_chosen),
    )
    reason, message = _why(best, candidates, now)
    if ranking is not None and reason == LEAST_LOADED:
        reason, message = ranking.reason, f"{best.name} has the lowest cost of {len(candidates)}"
    return Decision(best.name, len(candidates), reason, message)


def backoff_s(attempt: int, remaining_s: float | None, chance: float = 0.0) -> float | None:
    """Seconds to wait before attempt number `attempt` + 1, or None when there is to be none.

    Args:
        attempt: number of the attempt that failed, from 1.
        remaining_s: until the deadline of the request; None without one.
        chance: from [0, 1), for the jitter: many requests lose one replica at the same moment.
    """
    wait = RETRY.pause_s(attempt, chance)
    if attempt >= MAX_ATTEMPTS or (remaining_s is not None and wait >= remaining_s):
        return None
    return wait


def replay_after_s(trials: Trials, now: float, chance: float = 0.0) -> float | None:
    """Seconds to wait before a stream that lost its replica asks another; None where that is of no use.

    chance: from [0, 1), for the jitter.
    """
    if trials.cut >= MOST_CUTS:
        return None
    wait = RETRY.pause_s(trials.attempts, chance)
    return wait if wait < trials.left_s(now) else None


def _why(best: Load, candidates: list[Load], now: float) -> tuple[str, str]:
    if len(candidates) == 1:
        return "OnlyReplica", f"{best.name} is the only replica to choose"
    if is_suspect(best, now):
        return "AllSuspect", f"all {len(candidates)} replicas failed lately; {best.name} has the least load"
    return LEAST_LOADED, f"{best.name} runs {best.in_flight} requests, the least of {len(candidates)}"
