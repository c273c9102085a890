"""Joining a mesh: who this process is in it, and which part of the model it holds."""

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.config.model import ModelConfig
from moe_worker.errors import SettingsError
from moe_worker.mesh.control import Channel, End, Identity, MeshError, gather_ranks, join_leader
from moe_worker.mesh.dispatch import AllToAllDispatch, PlaceTable
from moe_worker.mesh.layers import layer_ranges
from moe_worker.mesh.placement import Topology, placement
from moe_worker.mesh.pulse import Pulse
from moe_worker.models.safetensors import StoredTensor
from moe_worker.models.stage import Stage

SECRET = "MOE_WORKER_MESH_SECRET"  # noqa: S105 - the variable's name
# Ranks start when their pods do; a step's exchanges begin together.
JOIN_S, STEP_S = 600.0, 60.0
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*\.experts\.\d+\.)?")


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
    member = Member(identity, options.mesh_rank, _address(options.mesh_leader), device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    member.form(JOIN_S)
    return member


def part_of(
    config: ModelConfig,
    member: Member,
    stored: Mapping[str, StoredTensor],
    redundant: int,
    device: torch.device,
) -> Stage:
    """What this rank holds. Raises SettingsError where the model cannot be spread over the mesh."""
    layers = stage_ranges(config, member.shape, stored)[member.number]
    return stage_of(config, member, layers, redundant, device)


def stage_of(
    config: ModelConfig, member: Member, layers: range, redundant: int, device: torch.device
) -> Stage:
    """This rank's part of `layers`. Raises SettingsError where experts cannot be spread over the ranks."""
    ranks = member.shape.expert
    routed = [layer for layer in layers if layer not in config.dense_layers] if ranks > 1 else []
    even = [[1.0] * config.moe.routed] * len(routed)
    topology = Topology(ranks, groups=config.moe.routing.groups)
    places = dict(zip(routed, placement(even, topology, redundant), strict=True))
    each = (config.moe.routed + redundant) // ranks
    held = {layer: own[member.place * each : (member.place + 1) * each] for layer, own in places.items()}
    dispatches = {
        layer: AllToAllDispatch(
            PlaceTable(own, config.moe.routed, ranks, device), config.moe.routed, member.stage_group
        )
        for layer, own in places.items()
    }
    return Stage(layers.start, layers.stop, config.num_hidden_layers, held, dispatches)


def stage_ranges(config: ModelConfig, shape: MeshShape, stored: Mapping[str, StoredTensor]) -> list[range]:
    """Layers of each stage. Raises SettingsError where there are fewer layers than stages."""
    sizes, ends = _nbytes(config, stored, shape.expert)
    return layer_ranges(sizes, shape.pipeline, *ends)


def _nbytes(
    config: ModelConfig, stored: Mapping[str, StoredTensor], ranks: int
) -> tuple[list[int], tuple[int, int]]:
    """Bytes that a rank holds of each layer, and of the embedding and the head."""
    layers, ends = [0] * config.num_hidden_layers, [0, 0]
    for tensor in stored.values():
        match = _LAYER.match(tensor.name)
        if match is None:
            if "embed_tokens" in tensor.name:
                ends[0] += tensor.nbytes
            if tensor.name.startswith("lm_head") or (
                config.tie_word_embeddings and "embed_tokens" in tensor.name
            ):
                ends[1] += tensor.nbytes
        elif int(match[1]) < len(layers):
            layers[int(match[1])] += tensor.nbytes // (ranks if match[2] else 1)
    return layers, (ends[0], ends[1])


def _lead(identity: Identity, host: str, port: int, seconds: float) -> tuple[Sequence[Channel], TCPStore]:
    named = not _is_address(host)
    store = _store("localhost" if named else host, 0, identity.shape, leads=True)
    try:
        with contextlib.closing(_listener(host, port)) as listener:
            return gather_ranks(listener, identity, store.port, seconds), store
    except OSError as error:
        raise SettingsError(
            f"the mesh's leader cannot listen on {host}:{port} ({error}); give --mesh-leader an address of "
            "rank 0 with a free port"
        ) from error


def _listener(host: str, port: int) -> socket.socket:
    """Of a name: at all addresses of this machine. The name is for the others, and may not resolve here
    yet.
    """
    if _is_address(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise SettingsError(f"--mesh-leader {text[:60]!r} is no address; write HOST:PORT of rank 0")
    return host.strip("[]"), int(port)
