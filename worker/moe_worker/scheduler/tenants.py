"""Fair shares of the machine for tenants that use it at the same time. Pure.

Three rules, none of which matters while one tenant has all requests:

1. Service is counted as in the virtual-token counter of Sheng et al., "Fairness in Serving Large Language
   Models" (OSDI 2024), with the estimated time of steps as the cost: a tenant pays for its part of each step,
   divided by its weight. A tenant that comes back from idleness starts at the least count of those that were
   there, so that idleness earns nothing.
2. No tenant is slowed down by more than its share: a step lasts at most W / w times as long as the tenant's
   own part would, where w is its weight and W the weight of all. So a tenant of two gets half of the machine.
   A step that costs no more for others' tokens (a GPU reads all weights anyway) holds them all. Within this
   limit, tokens are divided by weighted max-min fairness.
3. A tenant that arrives borrows from its own future, as in Duda and Cheriton, "Borrowed-Virtual-Time
   Scheduling" (SOSP 1999): for TURN_S of its service, and as much again for each level of its first request's
   priority, its steps hold little of the others. Where no step so small was measured lately, they hold
   nothing of the others, so that one is measured. Its count shows the debt, so it gains no service in the
   long run, but its short requests are done soon.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_worker.scheduler.budget import StepTime

TURN_S = 0.1
"""Seconds of service that a tenant which arrives may take at once."""
SLOWER = 1.1
"""How much longer others' tokens may make the steps of such a tenant."""
IDLE_MOST = 1024
"""Idle tenants whose counts are kept, the last ones."""
_ROUNDING = 1e-9


@dataclass(eq=False)
class Tenant:
    """A tenant's requests and service.

    weight: its share, relative to others. served: virtual time, seconds of service divided by weight.
    ahead_until: it has just arrived as long as `served` is below this. live, running: requests. carry: the
    part of a token that is due to it. mask_s: seconds of a mask of its texts, on average; None: not
    known yet. mask_credit_s: that it may spend on masks; negative: it has spent more (`mask_time`).
    """

    name: str
    weight: int = 1
    served: float = 0.0
    ahead_until: float = 0.0
    live: int = 0
    running: int = 0
    carry: float = 0.0
    mask_s: float | None = None
    mask_credit_s: float = 0.0

    @property
    def arriving(self) -> bool:
        """Whether it may still borrow."""
        return self.served < self.ahead_until

    def pay(self, seconds: float) -> None:
        """Counts seconds of service."""
        self.served += seconds / self.weight


class Tenants:
    """The tenants with requests, and the counts of those that were there lately."""

    def __init__(self) -> None:
        self.live: dict[str, Tenant] = {}
        self._idle: OrderedDict[str, Tenant] = OrderedDict()
        self._floor = 0.0

    @property
    def several(self) -> bool:
        """Whether more than one has requests."""
        return len(self.live) > 1

    def join(self, name: str, weight: int, priority: int = 0) -> Tenant:
        """The tenant of a new request. weight: the newest one counts. priority: lets it borrow more."""
        tenant = self.live.get(name)
        if tenant is None:
            tenant = self._idle.pop(name) if name in self._idle else Tenant(name)
            self.live[name] = tenant
            floor = min((other.served for other in self.live.values() if other is not tenant), default=None)
            self._floor = self._floor if floor is None else floor
            tenant.served = max(tenant.served, self._floor)
            tenant.ahead_until = self._floor + TURN_S * (1 + priority) / weight
        tenant.weight = weight
        tenant.live += 1
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """One of its requests has ended."""
        tenant.live -= 1
        if tenant.live:
            return
        del self.live[tenant.name]
        self._floor = max(self._floor, tenant.served) if not self.live else self._floor
        tenant.carry = 0.0
        self._idle[tenant.name] = tenant
        if len(self._idle) > IDLE_MOST:
            self._idle.popitem(last=False)

    def in_order(self) -> Sequence[Tenant]:
        """Those with requests, in the order in which they may start one.

        Who has the fewest running ones for its weight comes first, then who was served least.
        """
        return sorted(self.live.values(), key=lambda it: ((it.running + 1) / it.weight, it.served, it.name))

    def below_share(self, tenant: Tenant) -> bool:
        """Whether `tenant` has less than its share of the running requests, and another one more."""
        most = max(other.running / other.weight for other in self.live.values())
        return (tenant.running + 1) / tenant.weight < most

    def part(self, tenant: Tenant) -> float:
        """The tenant's share of everything, from 0 to 1."""
        return tenant.weight / sum(other.weight for other in self.live.values())


def charge(tokens: Mapping[Tenant, int], time: StepTime) -> None:
    """Counts a step; each tenant pays for its tokens."""
    total = sum(tokens.values())
    for tenant, count in tokens.items():
        tenant.pay(time.estimate(total) * count / max(total, 1))


def step_tokens(demands: Mapping[Tenant, int], time: StepTime) -> float:
    """Tokens of a step that lasts no longer than rules 2 and 3 allow.

    demands: tokens that each tenant could compute in it.
    """
    weight = float(sum(tenant.weight for tenant in demands))
    arriving = min(SLOWER * sum(tenant.weight for tenant in demands if tenant.arriving), weight)
    most_s = min(
        (arriving if tenant.arriving else weight) / tenant.weight * time.estimate(tokens)
        for tenant, tokens in demands.items()
    )
    # No tenant's own part is too long. Where a token costs next to nothing, `within` rounds to none at all.
    tokens = max(time.within(most_s), float(min(demands.values())))
    arrived = sum(count for tenant, count in demands.items() if tenant.arriving)
    # No step so small was measured lately, so its time is not known, and is less than the estimate.
    return min(tokens, float(arrived)) if 0 < arrived < time.least else tokens


def shares_of(tokens: float, demands: Mapping[Tenant, int]) -> dict[Tenant, int]:
    """Whole tokens for each tenant; who arrives comes first. Parts of tokens are carried to its next step."""
    arriving = {tenant: float(count) for tenant, count in demands.items() if tenant.arriving}
    others = {tenant: float(count) for tenant, count in demands.items() if not tenant.arriving}
    due = max_min(tokens, arriving)
    due |= max_min(tokens - sum(due.values()), others)
    shares = {}
    for tenant, part in due.items():
        due_now = part + tenant.carry + _ROUNDING
        shares[tenant] = min(int(due_now), demands[tenant])
        tenant.carry = 0.0 if shares[tenant] == demands[tenant] else min(1.0, due_now - shares[tenant])
    return shares


def max_min(amount: float, demands: Mapping[Tenant, float]) -> dict[Tenant, float]:
    """Weighted max-min fairness: small demands are met, and what they leave is divided by weight."""
    weight, parts = sum(tenant.weight for tenant in demands), {}
    for tenant in sorted(demands, key=lambda it: demands[it] / it.weight):
        parts[tenant] = max(0.0, min(demands[tenant], amount * tenant.weight / weight))
        amount -= parts[tenant]
        weight -= tenant.weight
    return parts
