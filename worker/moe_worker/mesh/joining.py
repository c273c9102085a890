"""How ranks meet: each proves to the leader that it knows the mesh's secret, and says who it is.

The proof is an HMAC-SHA256 of a fresh challenge and the claim. The leader admits the rank, or refuses it with
a sentence.
"""

import hashlib
import hmac
import ipaddress
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from moe_worker.config.mesh import MeshShape
from moe_worker.errors import SettingsError
from moe_worker.mesh.channel import Channel
from moe_worker.mesh.errors import MeshError
from moe_worker.mesh.messages import CODEC, Claim, Refusal, Welcome

log = logging.getLogger(__name__)
LARGEST_CLAIM: Final = 4096
GREETING_S: Final = 5.0
# A headless Service's names appear some seconds after its pods; resolvers remember absent ones for up to 30
# s.
RESOLVE_S: Final = 60.0


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
        return hmac.new(self.secret, nonce + CODEC.encode(claim), hashlib.sha256).digest()

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
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise SettingsError(f"--mesh-leader {text[:60]!r} is no address; write HOST:PORT of rank 0")
    return host.strip("[]"), int(port)
