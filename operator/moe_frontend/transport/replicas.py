"""The ready replicas, with a channel to each and their requests in flight. Belongs to one event loop."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from moe_api.supervision import Supervisor
from moe_frontend.discovery.connecting import Connector
from moe_frontend.discovery.endpoints import Endpoint, Served
from moe_frontend.policy import routing
from moe_frontend.policy.balancing import Asked, Policy, question_of
from moe_frontend.transport.bounds import Limits
from moe_frontend.transport.loads import Reported, Target, recent_token_s

_CONNECTING: Final = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
_CONNECT_S: Final = 5.0
"""Longer than a channel tries by itself (transport.CLIENT_OPTIONS)."""


@dataclasses.dataclass
class _Replica:
    endpoint: Endpoint
    channel: grpc.aio.Channel
    load: routing.Load
    reported: Reported | None = None


@dataclasses.dataclass
class Lease:
    """A replica chosen for one request, with the reason. `work`: that its prompt is, as `Load.work`."""

    endpoint: Endpoint
    channel: grpc.aio.Channel
    decision: routing.Decision
    work: float
    _replica: _Replica

    def prompt_done(self) -> None:
        """The replica has computed the prompt: it sent a message. Idempotent."""
        if self.work:
            load = self._replica.load
            self._replica.load = replace(load, work=load.work - self.work)
            self.work = 0.0

    async def connected(self) -> bool:
        """Whether there is a connection, or one can be opened now.

        Checked before a request is sent: a replica that was not reached did not die of the request.
        """
        state = self.channel.get_state(try_to_connect=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CONNECT_S):
                while state in _CONNECTING:
                    await self.channel.wait_for_state_change(state)
                    state = self.channel.get_state(try_to_connect=True)
        return state is grpc.ChannelConnectivity.READY


class Replicas:
    """Keeps channels and counts; `routing` makes all choices.

    Args:
        clock: seconds, monotonic.
        supervisor: runs the closing of unused channels.
        policy: orders replicas; None: the fewest requests in flight first.
        connector: opens the channels.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        supervisor: Supervisor | None = None,
        policy: Policy | None = None,
        connector: Connector | None = None,
    ) -> None:
        self.connector = connector or Connector()
        self._policy = policy
        self._clock = clock
        self._supervisor = supervisor or Supervisor()
        self._ready: dict[str, _Replica] = {}
        self._leaving: list[_Replica] = []
        self._served = Served()
        self._requests = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._ready)

    def update(self, endpoints: frozenset[Endpoint]) -> None:
        """Replaces the ready endpoints; requests on removed ones run to their end."""
        wanted = {endpoint.name: endpoint for endpoint in endpoints}
        for name, replica in list(self._ready.items()):
            if wanted.get(name) != replica.endpoint:
                self._leaving.append(self._ready.pop(name))
        if self._policy is not None:
            self._policy.keep(frozenset(self._ready))
        for name, endpoint in wanted.items():
            if name not in self._ready:
                load = routing.Load(name, revision=endpoint.revision)
                self._ready[name] = _Replica(endpoint, self.connector.channel(endpoint), load)
        self._served = next((endpoint.served for endpoint in sorted(endpoints)), self._served)
        self._close_idle()
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener()

    def reconnect(self) -> None:
        """Opens the channels to replicas with TLS again: the certificate of this frontend was renewed.

        Requests on the old channels run to their end; until then the replica's own report counts them.
        """
        for name, old in list(self._ready.items()):
            if old.endpoint.secure:
                load = replace(old.load, in_flight=0, work=0.0)
                self._ready[name] = _Replica(
                    old.endpoint, self.connector.channel(old.endpoint), load, old.reported
                )
                self._leaving.append(old)
        for listener in self._listeners:
            listener()
        self._close_idle()

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after each `update`."""
        self._listeners.append(listener)

    def ask(self, request: Message, metadata: Iterable[Any] | None, tenant: str = "") -> Asked | None:
        """The policy's view of a request, for `lease`; None without a policy."""
        return None if self._policy is None else Asked(self._policy, question_of(request, metadata, tenant))

    async def change(self, most_s: float) -> None:
        """Waits until `update` is called, at most `most_s` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), most_s)

    @contextlib.contextmanager
    def lease(
        self, tried: frozenset[str], revision: str | None = None, asked: Asked | None = None
    ) -> Iterator[Lease | None]:
        """Counts a request on the best replica during the block; yields None if there is none.

        Args:
            tried: replicas that are not tried again.
            revision: the required one; None: any.
            asked: the result of `ask` for the request.
        """
        loads = (replica.load for replica in self._ready.values())
        decision = routing.choose(loads, tried, self._clock(), revision, asked)
        if decision is None:
            yield None
            return
        replica = self._ready[decision.replica]
        work = 0.0 if asked is None else asked.sent(decision.replica, self._clock())
        self._requests += 1
        load = replica.load
        replica.load = replace(
            load, in_flight=load.in_flight + 1, last_chosen=self._requests, work=load.work + work
        )
        lease = Lease(replica.endpoint, replica.channel, decision, work, replica)
        try:
            yield lease
        finally:
            lease.prompt_done()
            replica.load = replace(replica.load, in_flight=replica.load.in_flight - 1)
            self._close_idle()

    @property
    def limits(self) -> Limits:
        """The limits that a request must keep on at least one replica; a longer one is not sent."""
        known = self.endpoints()
        per_token = [endpoint.characters_per_token for endpoint in known]
        return Limits(
            max((endpoint.context_length for endpoint in known), default=0),
            max(per_token, default=0) if all(per_token) else 0,
        )

    @property
    def slots(self) -> int:
        """Requests that all ready replicas together accept; 0: not known."""
        most = [endpoint.max_requests for endpoint in self.endpoints()]
        return sum(most) if all(most) else 0

    @property
    def only_revision(self) -> str:
        """The revision of all replicas; "" if there are several, as in a rollout, or none."""
        revisions = {replica.endpoint.revision for replica in self._ready.values()}
        return revisions.pop() if len(revisions) == 1 else ""

    @property
    def served(self) -> Served:
        """The model of a ready replica, or of the last one that was ready."""
        return self._served

    def endpoints(self) -> list[Endpoint]:
        """The ready endpoints."""
        return [replica.endpoint for replica in self._ready.values()]

    def routes(self) -> list[tuple[Endpoint, int]]:
        """The ready endpoints, with the number of requests in flight on each."""
        return [(replica.endpoint, replica.load.in_flight) for replica in self._ready.values()]

    def targets(self) -> list[Target]:
        """The ready replicas, to be asked for their load."""
        return [
            Target(replica.endpoint, replica.channel, replica.load.in_flight)
            for replica in self._ready.values()
        ]

    def report_load(self, target: Target, reported: Reported | None) -> None:
        """Notes the load that a replica reported; None: it did not.

        Requests of this frontend are counted here, which is more recent. It may have sent or finished some
        since the replica was asked, so the larger of both counts is taken off the report.
        """
        replica = self._find(target.endpoint)
        if replica is not None:
            own = max(target.in_flight, replica.load.in_flight)
            elsewhere = 0 if reported is None else max(0, reported.requests - own)
            token_s = replica.load.token_s
            if reported is not None:
                token_s = recent_token_s(token_s, replica.reported, reported)
            replica.load = replace(replica.load, elsewhere=elsewhere, token_s=token_s)
            replica.reported = reported

    @property
    def reported(self) -> list[Reported]:
        """The last reports of the ready replicas."""
        there = list(self._ready.values())  # metrics read it in a thread
        return [replica.reported for replica in there if replica.reported is not None]

    def report_failure(self, endpoint: Endpoint) -> None:
        """Notes that the replica died with a request in flight, or was not reached."""
        replica = self._find(endpoint)
        if replica is not None:
            replica.load = replace(replica.load, failures=replica.load.failures + 1, failed_at=self._clock())

    def distrust(self, endpoint: Endpoint) -> None:
        """Notes that the replica broke the protocol."""
        replica = self._find(endpoint)
        if replica is not None:
            replica.load = replace(replica.load, distrusted_until=self._clock() + routing.DISTRUST_S)

    def report_success(self, endpoint: Endpoint) -> None:
        """Notes that the replica responded."""
        replica = self._find(endpoint)
        if replica is not None and replica.load.failures:
            replica.load = replace(replica.load, failures=0)

    async def close(self) -> None:
        """Closes all channels, which ends the requests on them."""
        replicas = [*self._ready.values(), *self._leaving]
        self._ready.clear()
        self._leaving.clear()
        await asyncio.gather(*(replica.channel.close() for replica in replicas), *self._closing)

    def _find(self, endpoint: Endpoint) -> _Replica | None:
        replica = self._ready.get(endpoint.name)
        return replica if replica is not None and replica.endpoint == endpoint else None

    def _close_idle(self) -> None:
        idle = [replica for replica in self._leaving if replica.load.in_flight == 0]
        self._leaving = [replica for replica in self._leaving if replica.load.in_flight > 0]
        for replica in idle:
            task = self._supervisor.start("close-channel", replica.channel.close, replica.endpoint.name)
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
