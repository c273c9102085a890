"""Chooses the replica for a request, and decides whether a failed request is retried. Pure.

The least loaded replica comes first; its load is the number of requests that are in flight on it, those of
other frontends as the replica last reported them. A replica that just failed comes last, for a time that
doubles with every consecutive failure: an EndpointSlice lists a dead pod until its readiness probe fails, and
until then the pod seems to be idle.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from moe_api.backoff import Backoff

MAX_ATTEMPTS: Final = 3
SUSPICION: Final = Backoff(first_s=0.5, longest_s=10.0)
"""How long a failed replica comes last."""
RETRY: Final = Backoff(first_s=0.02, longest_s=1.0)
"""Between two attempts of one request."""
RETRY_AFTER_S: Final = 1.0
# How long a stream that lost its replica waits for another one of its revision: a killed worker with a small
# model is ready again within seconds, and a rollout or a scale-up may start others.
PATIENCE_S: Final = 30.0
# A replica that broke the protocol is the last choice for this long.
DISTRUST_S: Final = 30.0

WELL_TOKENS: Final = 16
"""After so many tokens the request is not considered the cause of a failed attempt."""
MOST_SILENT_DEATHS: Final = 2
MOST_DEATHS: Final = 3
MOST_CUTS: Final = 10
"""Consecutive attempts that end after fewer tokens than that."""


@dataclasses.dataclass(frozen=True)
class Load:
    """The state of a replica, as this frontend knows it.

    Attributes:
        name: of the replica's leader.
        in_flight: requests of this frontend in flight on it.
        last_chosen: number of the last request sent to it; the lowest number wins a tie.
        failures: consecutive failures.
        failed_at: time of the last failure, in seconds.
        revision: that it serves.
        distrusted_until: seconds; it broke the protocol and is suspect until then.
        elsewhere: requests of other frontends on it, as it last reported.
        work: prompts that it has to compute for this frontend's requests, in the unit of the policy.
        token_s: recent mean time between two tokens of its streams, in seconds; 0: not known.
    """

    name: str
    in_flight: int = 0
    last_chosen: int = 0
    failures: int = 0
    failed_at: float = 0.0
    revision: str = ""
    distrusted_until: float = 0.0
    elsewhere: int = 0
    work: float = 0.0
    token_s: float = 0.0

    @property
    def requests(self) -> int:
        """All requests on it, as far as they are known."""
        return self.in_flight + self.elsewhere


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
        candidates: number of replicas to choose from.
        reason: CamelCase, for machines.
        message: for people.
    """

    replica: str
    candidates: int
    reason: str
    message: str


def is_suspect(load: Load, now: float) -> bool:
    """Whether a replica failed so recently that others take precedence; `now` in seconds."""
    if now < load.distrusted_until:
        return True
    if load.failures == 0:
        return False
    return now - load.failed_at < SUSPICION.pause_s(load.failures)


@dataclasses.dataclass(frozen=True)
class Trials:
    """The attempts of one request since its client last received a message.

    A request may be what kills its replicas, so it is stopped after the second death of a replica without a
    token in between, or the third one with a few tokens in between. A stream that emitted WELL_TOKENS tokens
    in between may lose any number of replicas.

    Attributes:
        began: time of that message, or the start of the request, in seconds.
        attempts: failed attempts since then.
        tried: replicas of these attempts.
        patience_s: how long a started stream may wait for its next message.
        dead: replicas that died with the request in flight since its last WELL_TOKENS tokens, in order.
        silent: how many of the last of them died without a token in between.
        cut: attempts since then that ended after a few tokens.
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
        """Adds a failed attempt; one that emitted tokens restarts the count.

        died: whether the replica died. tokens: how many it emitted.
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
        """No replica is left to try, so all may be tried again after a pause."""
        return dataclasses.replace(self, tried=frozenset())

    @property
    def deadly(self) -> bool:
        """Whether the request is likely to kill replicas."""
        return self.silent >= MOST_SILENT_DEATHS or len(self.dead) >= MOST_DEATHS

    def left_s(self, now: float) -> float:
        """Seconds that a started stream may still wait; at least 0."""
        return max(0.0, self.began + self.patience_s - now)


def choose(
    loads: Iterable[Load],
    tried: frozenset[str],
    now: float,
    revision: str | None = None,
    ranking: Ranking | None = None,
) -> Decision | None:
    """The replica for a request, or None if all were tried.

    Args:
        loads: of the ready replicas.
        tried: names of replicas where this request already failed.
        now: seconds, on the clock of `Load.failed_at`.
        revision: the required one; None: any.
        ranking: gives each candidate a cost; the cheapest one is chosen. None: the number of requests.
    """
    candidates = [load for load in loads if load.name not in tried and revision in (None, load.revision)]
    if not candidates:
        return None
    costs = [load.requests for load in candidates] if ranking is None else ranking.costs(candidates, now)
    _, best = min(
        zip(costs, candidates, strict=True),
        key=lambda pair: (is_suspect(pair[1], now), pair[0], pair[1].last_chosen),
    )
    reason, message = _why(best, candidates, now)
    if ranking is not None and reason == LEAST_LOADED:
        reason, message = ranking.reason, f"{best.name} has the lowest cost of {len(candidates)}"
    return Decision(best.name, len(candidates), reason, message)


def backoff_s(attempt: int, remaining_s: float | None, chance: float = 0.0) -> float | None:
    """Seconds to wait before attempt number `attempt` + 1, or None if there is no further attempt.

    Args:
        attempt: number of the failed attempt, from 1.
        remaining_s: seconds until the deadline of the request; None without one.
        chance: from [0, 1), for the jitter: many requests lose a replica at the same time.
    """
    wait = RETRY.pause_s(attempt, chance)
    if attempt >= MAX_ATTEMPTS or (remaining_s is not None and wait >= remaining_s):
        return None
    return wait


def replay_after_s(trials: Trials, now: float, chance: float = 0.0) -> float | None:
    """Seconds to wait before a stream that lost its replica is sent to another; None if it is given up.

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
        return "AllSuspect", f"all {len(candidates)} replicas failed recently; {best.name} has the least load"
    return LEAST_LOADED, f"{best.name} runs {best.requests} requests, the least of {len(candidates)}"
