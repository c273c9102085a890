"""How ranks meet: each proves to the leader that it knows the mesh's secret, and says who it is.

The proof is an HMAC-SHA256 of a fresh challenge and the claim. The leader admits the rank, or refuses it with
a sentence. With --tls all of it, and what follows, is encrypted, and the leader proves to be a worker.
"""

import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from moe_worker.config.mesh import MeshShape
from moe_worker.errors import SettingsError
from moe_worker.mesh.channel import Channel
from moe_worker.mesh.errors import MeshError, RankAbsentError, RankLostError
from moe_worker.mesh.identity import worker_version
from moe_worker.mesh.messages import CODEC, Claim, Refusal, Welcome
from moe_worker.mesh.secure import SecureConnection, secured

LARGEST_CLAIM: Final = 4096
GREETING_S: Final = 5.0
POLL_S: Final = 0.05
RETRY_S: Final = 0.1
# A headless Service's names appear some seconds after its pods; resolvers remember absent ones for up to 30
# s.
RESOLVE_S: Final = 60.0


@dataclass(frozen=True)
class Identity:
    """What the ranks of one mesh agree on. epoch: how often the mesh has formed. secret: theirs alone.

    process: of this process alone. version: of the worker. tls: folder with the certificate; empty:
    plaintext.
    """

    shape: MeshShape
    epoch: int
    digest: str
    secret: bytes
    process: str = field(default_factory=lambda: secrets.token_hex(8))
    version: str = field(default_factory=worker_version)
    tls: str = ""

    def claim(self, rank: int) -> Claim:
        """What `rank` says of itself."""
        return Claim(rank, str(self.shape), self.epoch, self.digest, self.process, self.version)

    def sign(self, nonce: bytes, claim: Claim) -> bytes:
        """Proof that who makes `claim` knows the secret."""
        return hmac.new(self.secret, nonce + CODEC.encode(claim), hashlib.sha256).digest()

    def objection(self, claim: Claim, joined: Sequence[int]) -> str | None:
        """Why a rank that makes `claim` may not join; None where it may. Pure."""
        ranks, version = self.shape.ranks, claim.version[:40] or "an older one"
        objections = (
            (
                claim.version != self.version,
                f"its worker version is {version}, the leader's {self.version}; use one image on all ranks",
            ),
            (
                claim.shape != str(self.shape),
                f"its mesh is {claim.shape[:20]}, the leader's {self.shape}; use one shape",
            ),
            (
                not 1 <= claim.rank < ranks,
                f"a mesh {self.shape} has ranks 0 to {ranks - 1}, and 0 leads",
            ),
            (
                claim.epoch != self.epoch,
                f"its epoch is {claim.epoch}, the leader's is {self.epoch}; start it again",
            ),
            (
                claim.digest != self.digest,
                f"its checkpoint or options are not the leader's (digest {claim.digest[:12]}, not "
                f"{self.digest[:12]}); give all ranks the same",
            ),
            (
                claim.rank in joined,
                f"another process has joined as rank {claim.rank}; give each rank its own number",
            ),
        )
        found = next((sentence for applies, sentence in objections if applies), None)
        return None if found is None else f"rank {claim.rank} is refused: {found}"


def all_needed(missing: frozenset[int], waited_s: float) -> bool:
    """A mesh forms only when all ranks have come."""
    del missing, waited_s
    return False


@dataclass
class Guest:
    """Who has connected to the leader and made a claim. genuine: whether it knows the secret."""

    channel: Channel
    came_from: str
    claim: Claim
    genuine: bool


def greet(connection: socket.socket, came_from: str, identity: Identity) -> Guest:
    """The leader's part up to the proof, within twice GREETING_S. Raises MeshError."""
    channel = Channel(_over_tls(connection, identity, -1), -1)
    channel.end_within(GREETING_S)
    nonce = channel.challenge()
    claim = cast("Claim", channel.receive(Claim, most=LARGEST_CLAIM))
    genuine = hmac.compare_digest(channel.read_proof(), identity.sign(nonce, claim))
    return Guest(channel, came_from, claim, genuine)


def admit(
    guest: Guest, identity: Identity, welcome: Welcome, joined: Sequence[int], later: Sequence[int] = ()
) -> Channel:
    """A channel to a rank that may join `joined`. Raises MeshError after it has told the rank why not.

    later: ranks that are told nothing, and so will try again.
    """
    channel, claim = guest.channel, guest.claim
    wrong = "the mesh's secret is another one; set the same MOE_WORKER_MESH_SECRET on all ranks"
    # Versions may sign different fields.
    if guest.genuine or claim.version != identity.version:
        objection = identity.objection(claim, joined)
    else:
        objection = f"rank {claim.rank} is refused: {wrong}"
    if objection is not None:
        channel.send(Refusal(objection))
        raise MeshError(objection)
    if claim.rank in later:
        raise MeshError(f"rank {claim.rank} still takes part; it may try again")
    channel.rank, channel.process = claim.rank, claim.process
    channel.send(welcome)
    channel.end_within(None)
    return channel


def join_leader(
    address: tuple[str, int], rank: int, identity: Identity, seconds: float
) -> tuple[Channel, Welcome]:
    """Another rank's part: a channel to the leader, tried for `seconds`. Raises MeshError."""
    ends = time.monotonic() + seconds
    while True:
        connection = _connected(address, seconds, ends)
        try:
            channel = Channel(_over_tls(connection, identity, 0), 0)
            channel.end_within(GREETING_S)
            answer = _introduced(channel, rank, identity)
        except RankLostError as error:  # the leader is not ready yet
            connection.close()
            if time.monotonic() >= ends:
                raise RankAbsentError(f"{error}; it did not admit this rank within {seconds:g} s") from error
            time.sleep(RETRY_S)
            continue
        if isinstance(answer, Refusal):
            channel.close()
            raise MeshError(answer.sentence)
        channel.end_within(None)
        return channel, answer


def _over_tls(connection: socket.socket, identity: Identity, rank: int) -> socket.socket | SecureConnection:
    """rank: of the other end; -1: it joins."""
    if not identity.tls:
        return connection
    try:
        return secured(connection, identity.tls, GREETING_S, leads=rank != 0)
    except OSError as error:
        other = "rank 0" if rank == 0 else "a rank that joins"
        raise RankLostError(
            f"{other}: no TLS connection with the files of {identity.tls}: {error}; give all ranks one "
            "image, and --tls with certificates of one authority"
        ) from error


def _connected(address: tuple[str, int], seconds: float, ends: float) -> socket.socket:
    host, port = address
    resolved_by = time.monotonic() + min(seconds, RESOLVE_S)
    while True:
        try:
            return socket.create_connection(address, timeout=GREETING_S)
        except socket.gaierror as error:
            if time.monotonic() >= resolved_by:
                raise RankAbsentError(
                    f"the name {host} of the mesh's leader does not resolve ({error}); check --mesh-leader, "
                    "the headless Service of the workers and the cluster's DNS"
                ) from error
        except OSError as error:
            if time.monotonic() >= ends:
                raise RankAbsentError(
                    f"the leader at {host}:{port} is out of reach ({error}); check --mesh-leader, and that "
                    "rank 0 runs"
                ) from error
        time.sleep(RETRY_S)


def _introduced(channel: Channel, rank: int, identity: Identity) -> Welcome | Refusal:
    nonce, claim = channel.read_challenge(), identity.claim(rank)
    channel.send(claim)
    channel.send_proof(identity.sign(nonce, claim))
    answer: Welcome | Refusal = channel.receive(Welcome, Refusal)
    return answer


def listener_at(host: str, port: int) -> socket.socket:
    """Of a name: at all addresses of this machine. The name is for the others, and may not resolve here
    yet.
    """
    if is_address(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
    )


def is_address(host: str) -> bool:
    """Whether it is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of the leader. Raises SettingsError."""
    from moe_api.address import check_address, split  # noqa: PLC0415 - the library works without it

    if not text:
        raise SettingsError("a mesh of several ranks needs --mesh-leader; write HOST:PORT of rank 0")
    try:
        host, port = split(check_address(text))
    except ValueError:
        port = 0
    if not port:
        raise SettingsError(f"--mesh-leader {text[:60]!r} is no address; write HOST:PORT of rank 0")
    return host, port
