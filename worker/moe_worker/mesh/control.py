"""What the leader of a mesh tells the other ranks: frames of `moe_worker.framing` over a TCP connection each.

A rank that joins proves that it knows the mesh's secret (HMAC-SHA256 of a fresh challenge and its claim) and
says who it is; the leader sends what it needs to connect to the others, or refuses it with a sentence. Then
come steps. Tensors never travel here.
"""

import contextlib
import hashlib
import hmac
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast, get_args

from moe_worker.config.mesh import MeshShape
from moe_worker.errors import WorkerError
from moe_worker.framing import LENGTH_BYTES, Codec, MalformedMessageError

log = logging.getLogger(__name__)
LARGEST_CLAIM: Final = 4096
LARGEST_FRAME: Final = 1 << 28
GREETING_S: Final = 5.0
# A headless Service's names appear some seconds after its pods; resolvers remember absent ones for up to 30
# s.
RESOLVE_S: Final = 60.0


class MeshError(WorkerError):
    """The ranks of a mesh cannot work together, or no longer do; another start may help."""

    retryable = True


class RankLostError(MeshError):
    """Another rank ended or is silent. The exit code tells whoever starts this one that the cause is
    elsewhere.
    """

    exit_code = 3


@dataclass(frozen=True)
class Claim:
    """Rank to leader: who it is. digest: of what all ranks must have in common."""

    rank: int
    shape: str
    epoch: int
    digest: str


@dataclass(frozen=True)
class Welcome:
    """Leader to rank: it has joined; where torch.distributed's store listens."""

    store_port: int


@dataclass(frozen=True)
class Refusal:
    """Leader to rank: why it may not join."""

    sentence: str


@dataclass(frozen=True)
class Ready:
    """Rank to leader: its weights are loaded, and it has room for `pages` pages of KV cache."""

    pages: int


@dataclass(frozen=True)
class Allocate:
    """Leader to rank: the KV cache gets `pages` pages."""

    pages: int


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence, as models.batch.Segment. selected: those whose logits are wanted."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    shard: int
    selected: tuple[int, ...]
    source: int = -1


@dataclass(frozen=True)
class Compute:
    """Leader to rank: the next pass. scratch: pages of a cache for this pass alone; 0: the engine's cache.

    feeds: whether the leader sends the tokens that it samples, to the ranks of the first stage.
    """

    pieces: tuple[Piece, ...]
    scratch: int = 0
    feeds: bool = False


@dataclass(frozen=True)
class AskCounts:
    """Leader to rank: answer with Counts."""


@dataclass(frozen=True)
class Counts:
    """Rank to leader: passes, and by layer its number, the tokens of each expert, and experts with tokens."""

    passes: int
    layers: tuple[tuple[int, tuple[int, ...], int], ...]


@dataclass(frozen=True)
class Beat:
    """Either way: this process runs."""


@dataclass(frozen=True)
class End:
    """Leader to rank: there are no more passes."""


Message = Claim | Welcome | Refusal | Ready | Allocate | Compute | AskCounts | Counts | Beat | End
_CODEC: Final = Codec[Message](get_args(Message))


class Channel:
    """One connection; `rank` is at its other end. One thread sends and receives; beats come from others.

    heard: when something came last, once the channel listens.
    """

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self._connection, self.rank = connection, rank
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Message | MeshError] | None = None
        self.heard = time.monotonic()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def listen(self, lost: Callable[["Channel", str], None]) -> None:
        """Reads in a thread from now on, which calls `lost` with a sentence when the connection ends."""
        self._inbox = queue.SimpleQueue()
        threading.Thread(
            target=self._listen, args=(self._inbox, lost), name=f"mesh rank {self.rank}", daemon=True
        ).start()

    def beat(self) -> None:
        """Says that this process runs, unless something else is being sent."""
        if self._sending.acquire(blocking=False):
            try:
                self._connection.sendall(_CODEC.encode(Beat()))
            except OSError as error:  # the thread that reads finds out, too
                log.debug("no beat to rank %d: %s", self.rank, error)
            finally:
                self._sending.release()

    def send(self, message: Message) -> None:
        """Raises MeshError."""
        frame = _CODEC.encode(message)
        with self._lost(), self._sending:
            self._connection.sendall(frame)

    def receive(self, *kinds: type[Any], most: int = LARGEST_FRAME) -> Any:
        """The next message, which must be one of `kinds`. Raises MeshError."""
        message = self._read_message(most) if self._inbox is None else self._inbox.get()
        if isinstance(message, MeshError):
            self.end(str(message))
            raise message
        if not isinstance(message, kinds):
            raise MeshError(f"rank {self.rank} sent {type(message).__name__} out of turn")
        return message

    def end(self, sentence: str) -> None:
        """Whoever receives is told `sentence`, and whoever sends fails."""
        if self._inbox is not None:
            self._inbox.put(MeshError(sentence))
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def ended(self) -> bool:
        """Whether the other end has closed a channel that does not listen yet."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._connection.fileno()

    def _listen(
        self, inbox: "queue.SimpleQueue[Message | MeshError]", lost: Callable[["Channel", str], None]
    ) -> None:
        try:
            while True:
                message = self._read_message(LARGEST_FRAME)
                self.heard = time.monotonic()
                if not isinstance(message, Beat):
                    inbox.put(message)
                if isinstance(message, End):  # what comes next is no loss
                    return
        except MeshError as error:
            inbox.put(error)
            lost(self, str(error))

    def _read_message(self, most: int) -> Message:
        length = int.from_bytes(self._read(LENGTH_BYTES), "big")
        if not 1 <= length <= most:
            raise MeshError(f"rank {self.rank} sent a message of {length} bytes; {most} are allowed")
        try:
            return _CODEC.decode(self._read(length))
        except MalformedMessageError as error:
            raise MeshError(f"rank {self.rank} sent what is no message: {error}") from error

    def challenge(self) -> bytes:
        """Sends fresh random bytes for the other end to sign."""
        nonce = secrets.token_bytes(32)
        with self._lost():
            self._connection.sendall(nonce)
        return nonce

    def read_challenge(self) -> bytes:
        """The bytes to sign."""
        return self._read(32)

    def send_proof(self, proof: bytes) -> None:
        """The signature."""
        with self._lost():
            self._connection.sendall(proof)

    def read_proof(self) -> bytes:
        """The other end's signature."""
        return self._read(hashlib.sha256().digest_size)

    def timeout(self, seconds: float | None) -> None:
        """For each read and write; None: none."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):  # a thread that reads wakes up by this, not by closing
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        with self._lost():
            while len(data) < count:
                part = self._connection.recv(min(count - len(data), 1 << 20))
                if not part:
                    raise RankLostError(f"rank {self.rank} left the mesh: its connection is closed")
                data += part
        return bytes(data)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RankLostError(f"rank {self.rank} is out of reach: {error or 'it is silent'}") from error


@dataclass(frozen=True)
class Identity:
    """What the ranks of one mesh agree on. epoch: how often the mesh has formed. secret: theirs alone."""

    shape: MeshShape
    epoch: int
    digest: str
    secret: bytes

    def claim(self, rank: int) -> Claim:
        """What `rank` says of itself."""
        return Claim(rank, str(self.shape), self.epoch, self.digest)

    def sign(self, nonce: bytes, claim: Claim) -> bytes:
        """Proof that who makes `claim` knows the secret."""
        return hmac.new(self.secret, nonce + _CODEC.encode(claim), hashlib.sha256).digest()

    def objection(self, claim: Claim, joined: Sequence[int]) -> str | None:
        """Why a rank that makes `claim` may not join; None where it may. Pure."""
        who = f"rank {claim.rank} is refused"
        if claim.shape != str(self.shape):
            return f"{who}: its mesh is {claim.shape[:20]}, the leader's {self.shape}; use one shape"
        if not 1 <= claim.rank < self.shape.ranks:
            return f"{who}: a mesh {self.shape} has ranks 0 to {self.shape.ranks - 1}, and 0 leads"
        if claim.epoch != self.epoch:
            return f"{who}: its epoch is {claim.epoch}, the leader's is {self.epoch}; start it again"
        if claim.digest != self.digest:
            return (
                f"{who}: its checkpoint or options are not the leader's (digest {claim.digest[:12]}, not "
                f"{self.digest[:12]}); give all ranks the same"
            )
        if claim.rank in joined:
            return f"{who}: another process has joined as rank {claim.rank}; give each rank its own number"
        return None


def gather_ranks(
    listener: socket.socket, identity: Identity, store_port: int, seconds: float
) -> list[Channel]:
    """The leader's part of joining: a channel to each other rank, in order.

    Raises MeshError where some have not come after `seconds`.
    """
    joined: dict[int, Channel] = {}
    ends = time.monotonic() + seconds
    while len(joined) < identity.shape.ranks - 1:
        listener.settimeout(max(0.0, ends - time.monotonic()) or 1e-3)
        try:
            connection, address = listener.accept()
        except OSError:
            missing = sorted(set(range(1, identity.shape.ranks)) - set(joined))
            raise MeshError(
                f"mesh {identity.shape} is incomplete: ranks {missing} did not join within {seconds:g} s; "
                "start them with the same --mesh and --mesh-leader"
            ) from None
        try:
            joined = {rank: channel for rank, channel in joined.items() if not channel.ended()}
            channel = _admit(connection, identity, store_port, sorted(joined))
        except MeshError as error:
            log.warning("a connection from %s did not join: %s", address[0], error)
            connection.close()
        else:
            joined[channel.rank] = channel
    return [joined[rank] for rank in sorted(joined)]


def _admit(connection: socket.socket, identity: Identity, store_port: int, joined: Sequence[int]) -> Channel:
    channel = Channel(connection, -1)
    channel.timeout(GREETING_S)
    nonce = channel.challenge()
    claim = cast("Claim", channel.receive(Claim, most=LARGEST_CLAIM))
    genuine = hmac.compare_digest(channel.read_proof(), identity.sign(nonce, claim))
    wrong = "the mesh's secret is another one; set the same MOE_WORKER_MESH_SECRET on all ranks"
    objection = identity.objection(claim, joined) if genuine else f"rank {claim.rank} is refused: {wrong}"
    if objection is not None:
        channel.send(Refusal(objection))
        raise MeshError(objection)
    channel.rank = claim.rank
    channel.send(Welcome(store_port))
    channel.timeout(None)
    return channel


def join_leader(
    address: tuple[str, int], rank: int, identity: Identity, seconds: float
) -> tuple[Channel, Welcome]:
    """Another rank's part: a channel to the leader, tried for `seconds`. Raises MeshError."""
    host, port = address
    ends = time.monotonic() + seconds
    resolved_by = time.monotonic() + min(seconds, RESOLVE_S)
    while True:
        try:
            connection = socket.create_connection(address, timeout=GREETING_S)
            break
        except socket.gaierror as error:
            if time.monotonic() >= resolved_by:
                raise MeshError(
                    f"the name {host} of the mesh's leader does not resolve ({error}); check --mesh-leader, "
                    "the headless Service of the workers and the cluster's DNS"
                ) from error
            time.sleep(0.2)
        except OSError as error:
            if time.monotonic() >= ends:
                raise MeshError(
                    f"the leader at {host}:{port} is out of reach ({error}); check --mesh-leader, and that "
                    "rank 0 runs"
                ) from error
            time.sleep(0.2)
    channel = Channel(connection, 0)
    channel.timeout(seconds)
    nonce, claim = channel.read_challenge(), identity.claim(rank)
    channel.send(claim)
    channel.send_proof(identity.sign(nonce, claim))
    answer = channel.receive(Welcome, Refusal)
    if isinstance(answer, Refusal):
        channel.close()
        raise MeshError(answer.sentence)
    channel.timeout(None)
    return channel, answer
