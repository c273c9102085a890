"""Policies that order replicas for a request. Pure, except for a given source of randomness.

A policy gives each candidate a cost; `routing.choose` takes the cheapest one; suspect replicas come last.
"""

import hashlib
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from google.protobuf.message import Message

from moe_api.inference.v1 import inference_pb2
from moe_api.prefixes import names_of
from moe_frontend.policy.prefixes import PrefixIndex
from moe_frontend.policy.routing import Load
from moe_frontend.policy.salt import prefix_salt
from moe_frontend.policy.watched import WatchedIndex

SESSION_KEY: Final = "x-session-id"
"""Metadata (HTTP header) that names the session of a request."""
_SMOOTHING: Final = 0.02
"""Weight of the newest request in the mean cost of a request."""
_OWN: Final = 2.0
"""Weight of a block that this request brings: whoever comes behind it waits for it, too."""
_UNEQUAL_MOST: Final = 4.0
"""A replica counts at most so many times as fast, or as slow, as the median."""
_STREAM: Final = 0.5
"""Part of a mean prompt that a request counts as whose prompt is computed: its tokens take time as well."""


@dataclass(frozen=True)
class Question:
    """What a policy knows about a request.

    Attributes:
        blocks: names of the blocks of its prompt, in order.
        session: named by the client; "" for none.
    """

    blocks: tuple[int, ...] = ()
    session: str = ""


class Policy(Protocol):
    """Orders replicas."""

    reason: str
    """CamelCase, for machines."""

    def costs(self, question: Question, candidates: Sequence[Load], now: float) -> Sequence[float]:
        """The cost of each candidate; `now` in seconds."""

    def sent(self, question: Question, replica: str, now: float) -> float:
        """Notes that the request was sent to a replica; returns the work of its prompt, for `Load.work`."""

    def keep(self, replicas: frozenset[str]) -> None:
        """Forgets all replicas but these, which are ready."""


@dataclass(frozen=True)
class Asked:
    """A policy's view of one request: a `routing.Ranking`."""

    policy: Policy
    question: Question

    @property
    def reason(self) -> str:
        """Of the policy."""
        return self.policy.reason

    def costs(self, candidates: Sequence[Load], now: float) -> Sequence[float]:
        """As `Policy.costs`."""
        return self.policy.costs(self.question, candidates, now)

    def sent(self, replica: str, now: float) -> float:
        """As `Policy.sent`."""
        return self.policy.sent(self.question, replica, now)


def question_of(request: Message, metadata: Iterable[Any] | None, tenant: str = "") -> Question:
    """What a policy knows about a request; `metadata` has keys in lower case."""
    pairs = list(metadata or ())
    session = next((str(value) for key, value in pairs if key == SESSION_KEY), "")
    if not isinstance(request, inference_pb2.GenerateRequest):
        return Question(session=session)
    return Question(names_of(request, prefix_salt(pairs, tenant)), session)


class LeastLoaded:
    """The fewest requests, of all frontends as far as replicas reported them."""

    reason = "LeastLoaded"

    def costs(self, question: Question, candidates: Sequence[Load], now: float) -> Sequence[float]:  # noqa: ARG002
        """As `Policy.costs`."""
        return [load.requests for load in candidates]

    def sent(self, question: Question, replica: str, now: float) -> float:  # noqa: ARG002
        """As `Policy.sent`."""
        return 1.0

    def keep(self, replicas: frozenset[str]) -> None:
        """As `Policy.keep`."""


class RandomOfTwo(LeastLoaded):
    """The less loaded of two random replicas. Mitzenmacher, IEEE TPDS 2001."""

    reason = "RandomOfTwo"

    def __init__(self, chance: random.Random | None = None) -> None:
        self._chance = chance or random.Random()  # noqa: S311 - not for security

    def costs(self, question: Question, candidates: Sequence[Load], now: float) -> Sequence[float]:
        """As `Policy.costs`."""
        loads = super().costs(question, candidates, now)
        picked = self._chance.sample(range(len(candidates)), min(2, len(candidates)))
        return [load if index in picked else float("inf") for index, load in enumerate(loads)]


class Weighted(LeastLoaded):
    """Requests weighted by measured speed: the lowest product of requests, with this one, and time per token.

    Known as shortest expected delay. For replicas on unequal hardware: an idle slow one does not get as many
    requests as an idle fast one. One whose speed is not known counts as the median of the others.
    """

    reason = "Weighted"

    def costs(self, question: Question, candidates: Sequence[Load], now: float) -> Sequence[float]:  # noqa: ARG002
        """As `Policy.costs`."""
        known = [load.token_s for load in candidates if load.token_s]
        middle = statistics.median(known) if known else 1.0
        return [(load.requests + 1) * _weight(load.token_s or middle, middle) for load in candidates]


def _weight(token_s: float, middle: float) -> float:
    return min(max(token_s / middle, 1 / _UNEQUAL_MOST), _UNEQUAL_MOST)


class Session(LeastLoaded):
    """All requests of a session go to one replica, by rendezvous hashing; others to the least loaded."""

    reason = "Session"

    def costs(self, question: Question, candidates: Sequence[Load], now: float) -> Sequence[float]:
        """As `Policy.costs`."""
        if not question.session:
            return super().costs(question, candidates, now)
        return [
            int.from_bytes(
                hashlib.blake2b(f"{question.session}\0{load.name}".encode(), digest_size=6).digest()
            )
            for load in candidates
        ]


class PrefixAffinity:
    """The replica with the least prefill work: missing blocks of this prompt and of those that wait there.

    Requests of this frontend that have no token yet count with their own missing blocks. Those that have one,
    and those of other frontends, of which less is known, count as a part of the recent mean, so that a
    replica with a popular prefix does not get requests that another replica would serve sooner.
    """

    reason = "PrefixAffinity"

    def __init__(self, index: PrefixIndex | None = None) -> None:
        self._index = PrefixIndex() if index is None else index
        self._mean = 1.0

    def costs(self, question: Question, candidates: Sequence[Load], now: float) -> Sequence[float]:
        """As `Policy.costs`."""
        held = self._index.held(question.blocks, now)
        total, stream = len(question.blocks), _STREAM * self._mean
        return [
            _OWN * (total - held.get(load.name, 0)) + load.work + load.requests * stream
            for load in candidates
        ]

    def sent(self, question: Question, replica: str, now: float) -> float:
        """As `Policy.sent`; in blocks."""
        missing = len(question.blocks) - self._index.held(question.blocks, now).get(replica, 0)
        work = float(max(1, missing))
        self._mean += _SMOOTHING * (work - self._mean)
        self._index.note(replica, question.blocks, now)
        return work

    def keep(self, replicas: frozenset[str]) -> None:
        """As `Policy.keep`."""
        self._index.keep(replicas)


class ExactPrefixAffinity(PrefixAffinity):
    """The same, for replicas that tell which blocks they hold (`index` is told by a watch of each)."""

    reason = "PrefixAffinityExact"

    def __init__(self, index: WatchedIndex | None = None) -> None:
        self.index = WatchedIndex() if index is None else index
        super().__init__(self.index)


POLICIES: Final[dict[str, Callable[[], Policy]]] = {
    "least-loaded": LeastLoaded,
    "prefix-affinity": PrefixAffinity,
    "prefix-affinity-exact": ExactPrefixAffinity,
    "random-of-two": RandomOfTwo,
    "session": Session,
    "weighted": Weighted,
}
