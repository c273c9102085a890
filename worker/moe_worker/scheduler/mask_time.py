"""How tenants share the time of masks. Pure.

A mask takes 0.05 ms for most texts, and 1 to 4 ms for an expression that was made to be slow: 32 such texts
of one tenant add 60 ms to each step of all others. So the masks of a step take at most `slack`, plus W / w
times as long as those of any tenant alone, with its weight w and the weight W of all: who has no output
formats waits for `slack` at most. Tenants divide that time by weighted max-min fairness; streams beyond a
tenant's part pause, in turn. What masks took is paid afterwards, so estimates need not be right.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moe_worker.scheduler.job import Job, turn
from moe_worker.scheduler.tenants import Tenant, max_min

SLACK: Final = 0.1
"""Masks of other tenants may take this part of a step's target duration."""
LEAST_SLACK_S: Final = 0.001
"""Whatever the target is: no text waits for ever."""
FADING: Final = 0.2
"""Weight of the newest mask in the mean of a text or a tenant."""
MOST_DEBT: Final = 20
"""A tenant pauses for so many steps at most for what its masks have taken before."""
_ROUNDING = 1e-9


@dataclass
class MaskTime:
    """slack_s: seconds that masks may take in each step, whoever waits for them."""

    slack_s: float

    def note(self, job: Job, seconds: float, *, several: bool) -> None:
        """Counts what the mask of a text took. several: its tenant pays, since others waited for it."""
        tenant = job.tenant
        job.mask_s = _faded(tenant.mask_s if job.mask_s is None else job.mask_s, seconds)
        tenant.mask_s = _faded(tenant.mask_s, seconds)
        if several:
            tenant.mask_credit_s = max(tenant.mask_credit_s - seconds, -MOST_DEBT * self.slack_s)

    def divide(
        self, running: Iterable[Job], ready: Mapping[Tenant, Sequence[Job]], live: Iterable[Tenant]
    ) -> tuple[set[Job], dict[Tenant, float]]:
        """Streams that have to pause, and the seconds left to each tenant for requests that start.

        running: all streams. ready: those that could be in this step, by tenant. live: tenants with requests.
        """
        tenants = list(live)
        own = dict.fromkeys(tenants, 0.0)
        for job in running:
            if job.arrival.guided:
                own[job.tenant] += expected_s(job)
        weight = sum(tenant.weight for tenant in tenants)
        most = self.slack_s + min(weight / tenant.weight * own[tenant] for tenant in tenants)
        guided = {tenant: _in_turn(ready.get(tenant, ())) for tenant in tenants}
        wanted = {
            tenant: sum(map(expected_s, jobs)) - min(0.0, tenant.mask_credit_s)
            for tenant, jobs in guided.items()
        }
        parts = max_min(most, wanted)
        spare = max(0.0, most - sum(parts.values()))
        paused: set[Job] = set()
        left: dict[Tenant, float] = {}
        for tenant, jobs in guided.items():
            credit = tenant.mask_credit_s = min(tenant.mask_credit_s + parts[tenant], wanted[tenant])
            for job in jobs:
                if credit < -_ROUNDING:
                    paused.add(job)
                else:
                    credit -= expected_s(job)
            left[tenant] = credit + spare
        return paused, left


def expected_s(job: Job) -> float:
    """Seconds of a text's next mask, from its last ones, or those of its tenant's texts."""
    mean = job.tenant.mask_s if job.mask_s is None else job.mask_s
    return mean or 0.0


def _faded(mean: float | None, seconds: float) -> float:
    return seconds if mean is None else mean + FADING * (seconds - mean)


def _in_turn(jobs: Sequence[Job]) -> list[Job]:
    """Those with an output format; who has waited longest comes first."""
    return sorted((job for job in jobs if job.arrival.guided), key=turn)
