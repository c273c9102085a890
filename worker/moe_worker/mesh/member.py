"""This process in its mesh: its connections to the other ranks."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.errors import SettingsError, WorkerError
from moe_worker.kernels.transfer import make_current
from moe_worker.mesh.abort import Abort, end_process
from moe_worker.mesh.channel import Channel
from moe_worker.mesh.door import Door
from moe_worker.mesh.errors import MeshError, RankMemoryError
from moe_worker.mesh.joining import (
    Identity,
    all_needed,
    is_address,
    join_leader,
    listener_at,
    parse_address,
)
from moe_worker.mesh.messages import Again, End, Meet, RankFailed, Wait, Welcome
from moe_worker.mesh.places import Moved
from moe_worker.mesh.pulse import Pulse
from moe_worker.mesh.reception import gather_ranks

log = logging.getLogger(__name__)
SECRET = "MOE_WORKER_MESH_SECRET"  # noqa: S105 - the variable's name
# Ranks start when their pods do; a step's exchanges begin together.
JOIN_S, STEP_S = 600.0, 60.0
# Ranks that a mesh can do without, and that are not known to be silent, have so long to meet it again.
GRACE_S = 0.5
MayLack = Callable[[frozenset[int], float], bool]


class Member:
    """This process in its mesh. channels: to the other ranks in order (the leader's), or to the leader.

    group: the present ranks of its stage; None while it waits to meet them. back: all present ranks, for what
    goes from the last stage to the leader; None where there is one stage. moved: where experts are, as the
    leader says: by layer, the expert at each place, where that is not the placement for equal loads. present:
    ranks that take part now. formation: how often they have met again. on_change: called when others take
    part; on_wake, by other threads, when there is something to do between two passes; on_wait now and then
    while the leader waits for ranks to come back or to load.
    """

    def __init__(self, identity: Identity, rank: int, address: tuple[str, int], device: torch.device) -> None:
        self.shape, self.rank = identity.shape, rank
        self.channels: Sequence[Channel] = []
        self.group: dist.ProcessGroup | None = None
        self.back: dist.ProcessGroup | None = None
        self.moved: Moved = {}
        self.present: tuple[int, ...] = (rank,)
        self.formation = 0
        self.on_change: Callable[[], None] = lambda: None
        self.on_wake: Callable[[], None] = lambda: None
        self.on_wait: Callable[[], None] = lambda: None
        self._identity, self._address, self._device = identity, address, device
        self._groups: list[dist.ProcessGroup] = []  # of GPUs
        self._abort: Abort | None = None
        self._aborting = threading.Lock()
        self._pulse: Pulse | None = None
        self._door: Door | None = None
        self._away: frozenset[int] = frozenset()

    @property
    def leads(self) -> bool:
        """Whether it schedules and answers."""
        return self.rank == 0

    @property
    def column(self) -> int:
        """Its number in its stage."""
        return self.shape.column_of(self.rank)

    @property
    def number(self) -> int:
        """The number of its stage."""
        return self.shape.stage_of(self.rank)

    @property
    def absent(self) -> frozenset[int]:
        """Ranks that the mesh serves without."""
        return frozenset(range(self.shape.ranks)) - frozenset(self.present)

    @property
    def lost(self) -> MeshError | None:
        """Why another rank is lost, until it has been met again."""
        return None if self._pulse is None else self._pulse.lost

    @property
    def returned(self) -> frozenset[int]:
        """Absent ranks that have loaded and wait."""
        return frozenset() if self._door is None else self._door.ready

    @property
    def processes(self) -> dict[int, str]:
        """Of the ranks that the leader is connected to."""
        return {channel.rank: channel.process for channel in self.channels}

    def index(self, rank: int) -> int:
        """The number of `rank` among those present, which torch.distributed knows it by."""
        return self.present.index(rank)

    def columns(self, stage: int) -> list[int]:
        """Those of the present ranks of a stage."""
        return [self.shape.column_of(rank) for rank in self.shape.stage_ranks(stage) if rank in self.present]

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What fails here because a rank has no memory for a step says so: the exchange only says that a
        connection is lost. Raises RankMemoryError.
        """
        try:
            yield
        except MeshError as error:
            if isinstance(self.lost, RankMemoryError):
                raise self.lost from error
            raise

    def arm(self) -> None:
        """All ranks have loaded: from now on one that is silent counts as lost."""
        if self._pulse is not None:
            self._pulse.arm()

    def reform(self, seconds: float, may_lack: MayLack = all_needed) -> None:
        """Leaves, and meets the other ranks again within `seconds`.

        may_lack: see gather_ranks; ranks that are known to be away are waited for no longer than it takes the
        others to come. Raises MeshError, SettingsError.
        """
        if self.group is not None and self._pulse is not None:
            self._away = self._pulse.silent | (self.absent - self.returned)
        away = self._away
        if self._door is not None:
            self._door.close()
            self._door.let_in()
        self.leave()
        self.formation += 1

        def lacks(missing: frozenset[int], waited: float) -> bool:
            self.on_wait()
            return may_lack(missing, GRACE_S if missing <= away else waited)

        self.form(seconds, lacks)

    def wait_for_absent(self, pages: int) -> None:
        """From now on absent ranks may come, load, and wait; they need room for `pages` pages."""
        if self._door is not None:
            self._door.open(Welcome(dict(self.moved)), self.present, pages)

    def close(self) -> None:
        """Leaves the mesh for good; where it leads, the other ranks end. Connections between GPUs end with
        this process: graphs may refer to them.
        """
        self.quiet()
        self.farewell()
        self._groups = []
        self.leave()
        self._end_door()

    def give_up(self, error: BaseException) -> None:
        """Tells the other ranks why this process ends before it has loaded, and leaves."""
        sentence = str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"
        # Names in a checkpoint may contain lone surrogates, which no message can contain.
        sentence = sentence.encode(errors="backslashreplace").decode()
        if not self.leads and self.channels:
            self.channels[0].fail(sentence)
        for channel in self.channels if self.leads else ():
            with contextlib.suppress(MeshError):
                channel.send(RankFailed(sentence))
        self.close()

    def farewell(self) -> None:
        """Where it leads, tells the other ranks that there are no more passes. For another thread than its
        own.
        """
        waiting = () if self._door is None else self._door.channels()
        for channel in (*self.channels, *waiting) if self.leads else ():
            with contextlib.suppress(MeshError):
                channel.send(End())

    def quiet(self) -> None:
        """From now on it is no loss where another rank leaves."""
        if self._pulse is not None:
            self._pulse.stop()
            self._pulse = None

    def leave(self) -> None:
        """Ends all connections; the other ranks notice. On a GPU no graph may refer to them any more."""
        self.quiet()
        for channel in self.channels:
            channel.close()
        self.channels, self.group, self.back = [], None, None
        if self._groups:
            self._end_groups()
        elif dist.is_initialized() and self._device.type == "cpu":
            dist.destroy_process_group()
        self._are_present((self.rank,))

    def _wake_from_exchanges(self) -> None:
        """Wakes what waits for other ranks' GPUs. Ends this process if that does not help."""
        self._begin_abort().guard()

    def _begin_abort(self) -> Abort:
        """Of the groups that there are; other threads may call it, too."""
        with self._aborting:
            if self._abort is None or self._abort.groups is not self._groups:
                self._abort = Abort(self._groups)
            return self._abort

    def _end_groups(self) -> None:
        if not self._begin_abort().wait():
            end_process("connections between GPUs did not end")
        self._groups = []
        dist.destroy_process_group()

    def call_together(self) -> None:
        """Tells the other ranks to meet again."""
        if self._door is not None:
            self._door.close()
        for channel in self.channels:
            channel.send(Again())

    def form(self, seconds: float, may_lack: MayLack = all_needed) -> None:
        """Meets the other ranks within `seconds`. Raises MeshError, SettingsError."""
        if self.leads:
            ranks, store = self._lead(seconds, may_lack)
        else:
            meeting = self._join(seconds)
            if isinstance(meeting, Wait):
                return
            ranks = meeting.ranks
            store = _store(self._address[0], meeting.store_port, self.shape, leads=False)
        self._connect(ranks, store)

    def _lead(self, seconds: float, may_lack: MayLack) -> tuple[tuple[int, ...], TCPStore]:
        host, port = self._address
        store = _store("localhost" if not is_address(host) else host, 0, self.shape, leads=True)
        if self._door is None:
            self._door = Door(_listen(host, port), self._identity, self._wake)
        try:
            welcome = Welcome(dict(self.moved))
            self.channels = gather_ranks(self._door.listener, self._identity, welcome, seconds, may_lack)
        except MeshError:
            self._end_door()
            raise
        ranks = (0, *(channel.rank for channel in self.channels))
        if len(ranks) == self.shape.ranks:
            self._end_door()
        for channel in self.channels:
            channel.send(Meet(store.port, ranks))
        self._watch()
        return ranks, store

    def _join(self, seconds: float) -> Meet | Wait:
        channel, welcome = join_leader(self._address, self.rank, self._identity, seconds)
        self.channels, self.moved = [channel], welcome.moved
        channel.end_within(seconds)
        meeting: Meet | Wait = channel.receive(Meet, Wait)
        channel.end_within(None)
        self._watch()
        return meeting

    def _end_door(self) -> None:
        if self._door is not None:
            self._door.end()
            self._door = None

    def _wake(self) -> None:
        self.on_wake()

    def _watch(self) -> None:
        def kept() -> list[Channel]:
            return [] if self._door is None else self._door.channels()

        abort = self._wake_from_exchanges if self._device.type == "cuda" else None
        self._pulse = Pulse(self.channels, abort, self._wake, kept)

    def _connect(self, ranks: tuple[int, ...], store: TCPStore) -> None:
        shape, gpu = self.shape, self._device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if gpu else "gloo",
                store=PrefixStore(f"epoch {self._identity.epoch}", store),
                rank=ranks.index(self.rank),
                world_size=len(ranks),
                timeout=timedelta(seconds=STEP_S),
            )
            self._groups = [dist.group.WORLD] if gpu and dist.group.WORLD is not None else []
            stages = [[rank for rank in ranks if shape.stage_of(rank) == s] for s in range(shape.pipeline)]
            groups = [dist.new_group([ranks.index(rank) for rank in stage]) for stage in stages]
            # NCCL runs what two ranks exchange in one group in the order in which each of them calls it.
            back = dist.new_group() if shape.pipeline > 1 else None
            if gpu:
                used = dist.group.WORLD, groups[self.number], back
                self._groups = [group for group in used if group is not None]
        except (RuntimeError, ValueError, dist.DistError) as error:
            self.leave()
            raise MeshError(f"mesh {shape} cannot be connected: {error}; start all ranks again") from error
        self.group, self.back = groups[self.number], back
        self._are_present(ranks)

    def _are_present(self, ranks: tuple[int, ...]) -> None:
        changed, self.present = ranks != self.present, ranks
        if changed:
            self.on_change()


def join(options: EngineOptions, digest: str, device: torch.device, moved: Moved | None = None) -> Member:
    """Meets the other ranks of `options.mesh`; they place experts by the leader's `moved`.

    Raises MeshError, SettingsError.
    """
    secret = os.environ.get(SECRET, "").encode()
    identity = Identity(options.mesh_shape, options.mesh_epoch, digest, secret, tls=options.mesh_tls)
    member = Member(identity, options.mesh_rank, parse_address(options.mesh_leader), device)
    member.moved = moved or {}
    make_current(device)
    _announce(options, secret)
    member.form(JOIN_S)
    return member


def _announce(options: EngineOptions, secret: bytes) -> None:
    """Before minutes of waiting."""
    shape, leader = options.mesh_shape, options.mesh_leader
    if options.mesh_rank:
        log.info("rank %d of mesh %s waits for its leader at %s", options.mesh_rank, shape, leader)
        return
    log.info("mesh %s: waiting at %s up to %g s for %d more ranks", shape, leader, JOIN_S, shape.ranks - 1)
    if not secret:
        log.warning("%s is empty: any process that reaches %s may join; set it on all ranks", SECRET, leader)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listener_at(host, port)
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
