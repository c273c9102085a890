"""What tenants may use: classes, and the limits of each tenant. Pure; time is an argument.

Requests and tokens per minute are token buckets: a tenant that was idle may use a minute's allowance at
once, then the allowance comes back evenly. A request is accepted as long as the bucket is not empty. It takes
the tokens of its prompt and of the longest text that it allows, and gives back what it did not use. The
bucket may go below zero, and the next request waits for that.
"""

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from moe_api.tenancy import PRIORITY_MOST, WEIGHT_MOST

OTHER: Final = "other"
"""Name in metrics of all tenants that are not configured."""
TENANTS_MOST: Final = 100
KNOWN_MOST: Final = 10_000
"""Tenants whose use is remembered."""
_MINUTE_S: Final = 60.0
_CONCURRENCY_RETRY_S: Final = 1.0


class TenantClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """What a tenant may use; None: no limit. Field names in JSON are those of the CRD."""

    name: str = ""
    weight: int = 1
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    priority: int = 0


class TenantsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """The tenants with a class of their own, and the class of each other tenant. Named in JSON as in
    spec.frontend.
    """

    tenants: tuple[TenantClass, ...] = ()
    default_tenant: TenantClass = TenantClass()


def parse(text: str) -> TenantsConfig:
    """The configuration from JSON: ``{"tenants": [...], "defaultTenant": {...}}``.

    Raises:
        ValueError: it is malformed; the message is a sentence.
    """
    if not text.strip():
        return TenantsConfig()
    try:
        config = msgspec.json.decode(text, type=TenantsConfig)
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"tenants are malformed: {error}; give a JSON object with tenants and defaultTenant, as "
            "spec.frontend has them"
        ) from None
    if len(config.tenants) > TENANTS_MOST:
        raise ValueError(f"there are {len(config.tenants)} tenants; configure at most {TENANTS_MOST}")
    names = Counter(tenant.name for tenant in config.tenants)
    for name, count in names.items():
        if not name or count > 1:
            raise ValueError(f"tenant {name!r} occurs {count} times; give each tenant one name")
    for tenant in (*config.tenants, config.default_tenant):
        _check(tenant)
    return config


def _check(tenant: TenantClass) -> None:
    bounds = {
        "weight": (tenant.weight, 1, WEIGHT_MOST),
        "priority": (tenant.priority, 0, PRIORITY_MOST),
        "requestsPerMinute": (tenant.requests_per_minute, 1, 10**9),
        "tokensPerMinute": (tenant.tokens_per_minute, 1, 10**12),
        "concurrency": (tenant.concurrency, 1, 10**6),
    }
    for field_, (value, least, most) in bounds.items():
        if value is not None and not least <= value <= most:
            raise ValueError(
                f"{field_} of tenant {tenant.name or 'defaultTenant'!r} is {value}; use {least} to {most}"
            )


@dataclass
class Bucket:
    """A token bucket of one minute's allowance. level: what is left; below 0 it is owed."""

    per_minute: float
    level: float
    at: float

    def wait_s(self, now: float, needed: float = 1.0) -> float:
        """Seconds until `needed` are there; 0 if they are."""
        self._fill(now)
        return max(0.0, (needed - self.level) * _MINUTE_S / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Takes an amount, whether it is there or not."""
        self._fill(now)
        self.level = min(self.per_minute, self.level - amount)

    def _fill(self, now: float) -> None:
        elapsed_s = max(0.0, now - self.at)
        self.at = max(self.at, now)
        self.level = min(self.per_minute, self.level + elapsed_s * self.per_minute / _MINUTE_S)


@dataclass(frozen=True)
class Refusal:
    """Why a request is refused. limit: field of the class. retry_s: when to send it again."""

    limit: str
    sentence: str
    retry_s: float


@dataclass
class Use:
    """What one tenant uses."""

    allowed: TenantClass
    tenant: str
    requests: Bucket | None
    tokens: Bucket | None
    in_flight: int = 0

    @property
    def label(self) -> str:
        """The tenant's name in metrics: of bounded number."""
        return self.allowed.name or OTHER

    def enter(self, now: float, tokens: int = 0) -> Refusal | None:
        """Counts a request of up to so many tokens, or says why it may not run now."""
        refusal = self._refusal(now)
        if refusal is None:
            self.in_flight += 1
            if self.requests is not None:
                self.requests.take(1, now)
            self.spend(tokens, now)
        return refusal

    def leave(self) -> None:
        """A request has ended."""
        self.in_flight -= 1

    def spend(self, tokens: int, now: float) -> None:
        """Counts tokens; a negative number gives some back."""
        if self.tokens is not None and tokens:
            self.tokens.take(tokens, now)

    def idle(self, now: float) -> bool:
        """Whether forgetting this tenant changes nothing."""
        full = [b for b in (self.requests, self.tokens) if b is not None and b.wait_s(now, b.per_minute) > 0]
        return not self.in_flight and not full

    def _refusal(self, now: float) -> Refusal | None:
        most, who = self.allowed, f"tenant {self.tenant!r}"
        if most.concurrency is not None and self.in_flight >= most.concurrency:
            problem = f"{who} has {self.in_flight} requests in progress, its limit, and each text counts"
            sentence = f"{problem}; wait for one to end, or ask for fewer texts at once"
            return Refusal("concurrency", sentence, _CONCURRENCY_RETRY_S)
        if self.requests is not None and (wait_s := self.requests.wait_s(now)) > 0:
            limit = f"{most.requests_per_minute} requests per minute"
            return Refusal("requestsPerMinute", _over(who, limit, wait_s), wait_s)
        if self.tokens is not None and (wait_s := self.tokens.wait_s(now)) > 0:
            limit = f"{most.tokens_per_minute} tokens per minute"
            return Refusal("tokensPerMinute", _over(who, limit, wait_s), wait_s)
        return None


def _over(who: str, limit: str, wait_s: float) -> str:
    return f"{who} has reached its limit of {limit}; send the request again in {math.ceil(wait_s)} s"


@dataclass
class Directory:
    """The use of every tenant, bounded: those that use nothing are forgotten first."""

    config: TenantsConfig = field(default_factory=TenantsConfig)
    _uses: OrderedDict[str, Use] = field(default_factory=OrderedDict)
    _classes: Mapping[str, TenantClass] = field(init=False)

    def __post_init__(self) -> None:
        self._classes = {tenant.name: tenant for tenant in self.config.tenants}

    def __len__(self) -> int:
        return len(self._uses)

    def of(self, tenant: str, now: float) -> Use:
        """The use of a tenant."""
        use = self._uses.get(tenant)
        if use is None:
            self._forget(now)
            use = self._uses[tenant] = _new(
                self._classes.get(tenant, self.config.default_tenant), tenant, now
            )
        self._uses.move_to_end(tenant)
        return use

    def _forget(self, now: float) -> None:
        """Makes room for a tenant: forgets least recently used ones that use nothing, or else one of them."""
        if len(self._uses) < KNOWN_MOST:
            return
        oldest = list(itertools.islice(self._uses.items(), _TRIED))
        gone = [name for name, use in oldest if use.idle(now)]
        gone = gone or [name for name, use in oldest if not use.in_flight][:1]
        for name in gone:
            del self._uses[name]


_TRIED: Final = 16
"""Tenants that are tried for each new one, which bounds the work."""


def _new(allowed: TenantClass, tenant: str, now: float) -> Use:
    return Use(
        allowed,
        tenant,
        _bucket(allowed.requests_per_minute, now),
        _bucket(allowed.tokens_per_minute, now),
    )


def _bucket(per_minute: int | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(float(per_minute), float(per_minute), now)
