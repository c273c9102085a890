"""Settings of the operator process. MoEDeployments describe what it serves."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from moe_operator.errors import InstallationError

ENVIRONMENT_PREFIX = "MOE_OPERATOR_"
_MOST_WHOLE: Final = 65_535
"""Threads and ports."""
_MOST_SECONDS: Final = 1_000_000_000
"""A lock waits for no more than 292 years."""
_NAMESPACE: Final = re.compile("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Settings:
    """Settings of one operator process; each can be set as MOE_OPERATOR_<NAME IN CAPITALS>."""

    peering: str = "moe-operator"
    """Name of the peering object through which operator processes find each other: a ClusterKopfPeering, or a
    KopfPeering in each of `watch_namespaces`.
    """

    peering_lifetime_seconds: float = 20.0
    """A killed process counts as alive for this long; kopf renews its record 5 to 10 s before it expires."""

    debounce_seconds: float = 0.25
    """A burst of changes of a deployment's objects causes one reconcile, this long after the first change.

    Edits of the deployment itself do not wait.
    """

    resync_seconds: float = 300.0
    """Resync interval: every deployment is reconciled this often, even without an event."""

    recheck_seconds: float = 5.0
    """Interval of reconciles while a plan awaits something that sends no event (a worker's response)."""

    routing_seconds: float = 0.5
    """Interval of asking whether the frontends route to a worker that accepts requests."""

    retry_first_seconds: float = 1.0
    """Pause after the first failed reconcile of a deployment; doubles with each further failure.

    This is the pause if the API server does not respond; other types of errors scale it.
    """

    retry_most_seconds: float = 60.0
    """The longest pause between two retries; scaled likewise."""

    reconcile_seconds: float = 30.0
    """A reconcile that takes longer continues in another one, so that other deployments are not delayed."""

    api_timeout_seconds: float = 15.0
    """Limit of one request to the API server."""

    rpc_timeout_seconds: float = 2.0
    """Limit of one call to a worker."""

    sample_seconds: float = 10.0
    """Interval of asking the replicas of a scaling deployment for their load."""

    history_seconds: float = 300.0
    """Interval of writing learned data to a ScalingHistory; a crash loses at most this much."""

    scaling_speed: float = 1.0
    """Speed of the scaling clock relative to the wall clock, for tests and demonstrations: at 60, a minute of
    load takes a second. `sample_seconds` and `history_seconds` are divided by it, too.
    """

    metrics_port: int = 0
    """Port of the Prometheus metrics (/metrics); 0 for none. OpenTelemetry collectors get them either way."""

    status_port: int = 0
    """Port of the status page, on the loopback interface for `kubectl port-forward`; 0 for none."""

    watch_namespaces: str = ""
    """Names of the namespaces whose deployments are served, separated by commas; by default all."""

    model_roots: str = ""
    """Directories of nodes that deployments may mount, with everything below them, separated by commas; none
    by default. Models and caches on nodes, and hostPath volumes of pod templates, need one.
    """

    namespace: str = ""
    """Namespace of the operator's own pod: NetworkPolicies let it in from there. Empty: from every one."""

    workers: int = 8
    """Deployments that are reconciled at the same time, each in a thread.

    Those whose last reconcile failed share a quarter of them: slow failures never hold up the others.
    In addition, edited deployments have a quarter as many threads for themselves.
    """

    @property
    def workers_for_edits(self) -> int:
        """Threads for edited deployments alone: a person waits for their effect."""
        return max(1, self.workers // 4)

    @property
    def namespaces(self) -> tuple[str, ...]:
        """`watch_namespaces`, one by one, each once; none stands for all."""
        names = (name.strip() for name in self.watch_namespaces.split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    def __post_init__(self) -> None:
        """Raises InstallationError where `watch_namespaces` is not names: kopf would take patterns, and
        nothing else here does.
        """
        given, names = self.watch_namespaces.strip(), self.namespaces
        wrong = [name for name in names if not _NAMESPACE.fullmatch(name)]
        if wrong or (given and not names):
            first = next(iter(wrong), given)[:64]
            raise InstallationError(
                f"{ENVIRONMENT_PREFIX}WATCH_NAMESPACES is {given[:200]!r}, and {first!r} is not the name of "
                "a namespace; separate names with commas, or leave it empty for all namespaces"
            )


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Reads the settings from environment variables; those not set keep their default.

    Raises InstallationError when a value is not a positive number where one is needed, or is too large; 0 is
    allowed where it is the default.
    """
    defaults = Settings()
    values: dict[str, Any] = {}
    for field in fields(Settings):
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        if variable in environment:
            values[field.name] = _parse(variable, environment[variable], getattr(defaults, field.name))
    return Settings(**values)


def _parse(variable: str, text: str, default: str | float) -> object:
    if isinstance(default, str):
        return text
    try:
        number = type(default)(text)
    except ValueError:
        number = math.nan
    whole = isinstance(default, int)
    most = _MOST_WHOLE if whole else _MOST_SECONDS
    if 0 < number <= most or number == default:
        return number
    least = f"a whole number of {1 if default else 0} or more" if whole else "a number above 0"
    raise InstallationError(f"{variable} is {text[:200]!r}; it must be {least}, {most} at most")
