"""An approximate index of the prefix caches of replicas: which replica was sent which prefixes. Pure.

Replicas are not asked. A block is a part of a prompt together with everything before it, identified by a
chained hash that starts with the client's salt. A block that was not sent to a replica for TTL_S counts as
evicted.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from moe_api.inference.v1 import inference_pb2

BLOCK_BYTES: Final = 512
BLOCK_TOKENS: Final = 128
BLOCKS_MOST: Final = 512
"""Maximum blocks of one prompt; the rest is ignored."""
INDEX_MOST: Final = 50_000
"""Maximum blocks in the index; about 400 bytes each."""
TTL_S: Final = 600.0


def blocks_of(request: inference_pb2.GenerateRequest, salt: bytes) -> tuple[int, ...]:
    """Identifiers of the complete blocks of a prompt, in order."""
    names, name = [], salt
    for piece in _pieces(request):
        name = hashlib.blake2b(piece, digest_size=8, key=name).digest()
        names.append(int.from_bytes(name, "big"))
    return tuple(names)


def _pieces(request: inference_pb2.GenerateRequest) -> Iterator[bytes]:
    if ids := request.prompt_tokens.ids:
        for start in range(0, min(len(ids) // BLOCK_TOKENS, BLOCKS_MOST) * BLOCK_TOKENS, BLOCK_TOKENS):
            yield b"".join(token.to_bytes(4, "big") for token in ids[start : start + BLOCK_TOKENS])
        return
    text = request.prompt.encode()
    for start in range(0, min(len(text) // BLOCK_BYTES, BLOCKS_MOST) * BLOCK_BYTES, BLOCK_BYTES):
        yield text[start : start + BLOCK_BYTES]


class PrefixIndex:
    """The last time each block was sent to each replica. The least recently used blocks are dropped first."""

    def __init__(self, most: int = INDEX_MOST, ttl_s: float = TTL_S) -> None:
        self._most = most
        self._ttl_s = ttl_s
        self._sent: OrderedDict[int, dict[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def note(self, replica: str, blocks: Sequence[int], now: float) -> None:
        """Notes that a prompt of these blocks is sent to a replica; `now` in seconds."""
        for block in reversed(blocks):  # so that the start of a prompt outlives its end
            self._sent.setdefault(block, {})[replica] = now
            self._sent.move_to_end(block)
        while len(self._sent) > self._most:
            self._sent.popitem(last=False)

    def held(self, blocks: Sequence[int], now: float) -> dict[str, int]:
        """How many leading blocks each replica is likely to hold; replicas with none are absent."""
        counts: dict[str, int] = {}
        for index, block in enumerate(blocks):
            holders = [
                replica
                for replica, at in self._sent.get(block, {}).items()
                if now - at < self._ttl_s and counts.get(replica, 0) == index
            ]
            if not holders:
                break
            counts.update(dict.fromkeys(holders, index + 1))
        return counts

    def keep(self, replicas: frozenset[str]) -> None:
        """Drops all other replicas: one that returns has an empty cache."""
        for block, holders in list(self._sent.items()):
            kept = {replica: at for replica, at in holders.items() if replica in replicas}
            if not kept:
                del self._sent[block]
            elif len(kept) < len(holders):
                self._sent[block] = kept
