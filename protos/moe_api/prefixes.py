"""Names of blocks of prompts, which frontends and workers compute in the same way. Pure.

A block is a part of a prompt together with everything before it. Its name is a chained hash that starts with
the salt of the client's prefixes, so clients with different salts share no names. A name tells nothing about
the text to those who do not know the salt and all of the text.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final

from moe_api.inference.v1 import inference_pb2

BLOCK_BYTES: Final = 512
BLOCK_TOKENS: Final = 128
BLOCKS_MOST: Final = 512
"""Maximum blocks of one prompt; the rest is ignored."""
HELD_MOST: Final = 65_536
"""Maximum blocks that one replica names; 8 million tokens in blocks of 128."""
CHANGE_MOST: Final = 4096
"""Maximum blocks in one message of WatchCache."""


def names_of(request: inference_pb2.GenerateRequest, salt: str) -> tuple[int, ...]:
    """Names of the complete blocks of a prompt, in order; numbers of 64 bits.

    salt: of `moe_api.tenancy`.
    """
    names, name = [], hashlib.blake2b(f"{_kind(request)} {salt}".encode(), digest_size=8).digest()
    for piece in _pieces(request):
        name = hashlib.blake2b(piece, digest_size=8, key=name).digest()
        names.append(int.from_bytes(name, "big"))
    return tuple(names)


def ends_of(
    request: inference_pb2.GenerateRequest, tokens: Sequence[int], piece: Callable[[int], bytes]
) -> tuple[int, ...]:
    """The number of tokens up to the end of each complete block of a prompt, in order.

    Args:
        request: whose prompt it is.
        tokens: its token ids.
        piece: the text of a token. Where a tokenizer changes the text, an end is a few tokens off.
    """
    if request.prompt_tokens.ids:
        return tuple(range(BLOCK_TOKENS, _complete(len(tokens), BLOCK_TOKENS) + 1, BLOCK_TOKENS))
    sizes = list(accumulate(map(len, map(piece, tokens))))
    complete = _complete(len(request.prompt.encode()), BLOCK_BYTES)
    bounds = range(BLOCK_BYTES, complete + 1, BLOCK_BYTES)
    return tuple(min(bisect_left(sizes, bound) + 1, len(tokens)) for bound in bounds)


def _kind(request: inference_pb2.GenerateRequest) -> str:
    """Equal texts have other tokens without the special ones, and share no cache then."""
    if request.prompt_tokens.ids:
        return "tokens"
    return "plain" if request.without_special_tokens else "text"


def _pieces(request: inference_pb2.GenerateRequest) -> Iterator[bytes]:
    if ids := request.prompt_tokens.ids:
        for start in range(0, _complete(len(ids), BLOCK_TOKENS), BLOCK_TOKENS):
            yield b"".join(token.to_bytes(4, "big") for token in ids[start : start + BLOCK_TOKENS])
        return
    text = request.prompt.encode()
    for start in range(0, _complete(len(text), BLOCK_BYTES), BLOCK_BYTES):
        yield text[start : start + BLOCK_BYTES]


def _complete(length: int, block: int) -> int:
    """The part of a prompt of this length that is in complete blocks."""
    return min(length // block, BLOCKS_MOST) * block
