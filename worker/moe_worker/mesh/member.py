"""This process in its mesh: its connections to the other ranks."""

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.errors import SettingsError
from moe_worker.mesh.channel import Channel
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.joining import (
    Identity,
    gather_ranks,
    is_address,
    join_leader,
    listener_at,
    parse_address,
)
from moe_worker.mesh.messages import End
from moe_worker.mesh.pulse import Pulse

SECRET = "MOE_WORKER_MESH_SECRET"  # noqa: S105 - the variable's name
# Ranks start when their pods do; a step's exchanges begin together.
JOIN_S, STEP_S = 600.0, 60.0


class Member:
    """This process in its mesh. channels: to all other ranks in order (the leader's), or to the leader.

    stage_group: the ranks of its stage. formation: how often it has met the others, from 0. Where a rank is
    lost, `reform` meets them, and another process in its place, again.
    """

    stage_group: dist.ProcessGroup

    def __init__(self, identity: Identity, rank: int, address: tuple[str, int], device: torch.device) -> None:
        self.shape, self.rank = identity.shape, rank
        self.channels: Sequence[Channel] = []
        self.formation = 0
        self._identity, self._address, self._device = identity, address, device
        self._pulse: Pulse | None = None

    @property
    def leads(self) -> bool:
        """Whether it schedules, samples and answers."""
        return self.rank == 0

    @property
    def place(self) -> int:
        """Its number in its stage."""
        return self.shape.place_of(self.rank)

    @property
    def number(self) -> int:
        """The number of its stage."""
        return self.shape.stage_of(self.rank)

    def arm(self) -> None:
        """All ranks have loaded: from now on one that is silent counts as lost."""
        if self._pulse is not None:
            self._pulse.arm()

    def reform(self, seconds: float) -> None:
        """Leaves, and meets the other ranks again within `seconds`. Raises MeshError, SettingsError."""
        self.leave()
        self.formation += 1
        self.form(seconds)

    def close(self) -> None:
        """Leaves the mesh for good; where it leads, the other ranks end."""
        self.quiet()
        self.farewell()
        self.leave()

    def farewell(self) -> None:
        """Where it leads, tells the other ranks that there are no more passes. For another thread than its
        own.
        """
        for channel in self.channels if self.leads else ():
            with contextlib.suppress(MeshError):
                channel.send(End())

    def quiet(self) -> None:
        """From now on it is no loss where another rank leaves."""
        if self._pulse is not None:
            self._pulse.stop()
            self._pulse = None

    def leave(self) -> None:
        """Ends all connections; the other ranks notice."""
        self.quiet()
        for channel in self.channels:
            channel.close()
        self.channels = []
        if dist.is_initialized():
            dist.destroy_process_group()

    def form(self, seconds: float) -> None:
        """Meets the other ranks within `seconds`. Raises MeshError, SettingsError."""
        identity, (host, port), shape = self._identity, self._address, self.shape
        if self.leads:
            self.channels, store = _lead(identity, host, port, seconds)
        else:
            channel, welcome = join_leader((host, port), self.rank, identity, seconds)
            self.channels = [channel]
            store = _store(host, welcome.store_port, shape, leads=False)
        self._pulse = Pulse(self.channels, self._device.type == "cuda")
        try:
            dist.init_process_group(
                "nccl" if self._device.type == "cuda" else "gloo",
                store=PrefixStore(f"epoch {identity.epoch}", store),
                rank=self.rank,
                world_size=shape.ranks,
                timeout=timedelta(seconds=STEP_S),
            )
            groups = [dist.new_group(shape.stage_ranks(stage)) for stage in range(shape.pipeline)]
        except (RuntimeError, dist.DistError) as error:
            self.leave()
            raise MeshError(f"mesh {shape} cannot be connected: {error}; start all ranks again") from error
        self.stage_group = groups[self.number]


def join(options: EngineOptions, digest: str, device: torch.device) -> Member:
    """Meets the other ranks of `options.mesh`. Raises MeshError, SettingsError."""
    secret = os.environ.get(SECRET, "").encode()
    identity = Identity(options.mesh_shape, options.mesh_epoch, digest, secret)
    member = Member(identity, options.mesh_rank, parse_address(options.mesh_leader), device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    member.form(JOIN_S)
    return member


def _lead(identity: Identity, host: str, port: int, seconds: float) -> tuple[Sequence[Channel], TCPStore]:
    named = not is_address(host)
    store = _store("localhost" if named else host, 0, identity.shape, leads=True)
    try:
        with contextlib.closing(listener_at(host, port)) as listener:
            return gather_ranks(listener, identity, store.port, seconds), store
    except OSError as error:
        raise SettingsError(
            f"the mesh's leader cannot listen on {host}:{port} ({error}); give --mesh-leader an address of "
            "rank 0 with a free port"
        ) from error


def _store(host: str, port: int, shape: MeshShape, leads: bool) -> TCPStore:
    try:
        return TCPStore(
            host,
            port,
            shape.ranks,
            is_master=leads,
            timeout=timedelta(seconds=JOIN_S),
            wait_for_workers=False,
        )
    except (RuntimeError, dist.DistError) as error:
        raise MeshError(f"the mesh's store at {host}:{port} is out of reach: {error}") from error
