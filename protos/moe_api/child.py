"""A process that answers questions one after the other and may not do much else.

It is for work that untrusted input can make endless or can make fill the memory: the parent
(`moe_api.child_pool`) bounds the time, and the kernel bounds the memory.

Questions arrive on standard input and answers leave on standard output, each in a frame: 4 bytes of length
(big endian), then the content.
"""

import resource
import sys
from collections.abc import Callable
from typing import BinaryIO, Final

LENGTH_BYTES: Final = 4


def serve(answer: Callable[[bytes], bytes], memory_bytes: int) -> None:
    """Answers the parent's questions until it closes the standard input.

    Args:
        answer: makes an answer of a question.
        memory_bytes: address space that the process may use.
    """
    _limit(memory_bytes)
    while question := _read_frame(sys.stdin.buffer):
        sys.stdout.buffer.write(frame(answer(question)))
        sys.stdout.buffer.flush()


def frame(content: bytes) -> bytes:
    """The content after its length."""
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


def _read_frame(file: BinaryIO) -> bytes:
    """The content of the next frame; empty at the end of the file."""
    head = file.read(LENGTH_BYTES)
    return file.read(int.from_bytes(head, "big")) if len(head) == LENGTH_BYTES else b""


def _limit(memory_bytes: int) -> None:
    """Forbids more memory, files and core dumps."""
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
