"""Renders chat templates, one job after the other, in a process that may not do much else.

Templates are programs of whoever made the checkpoint. The sandbox keeps them from Python's internals, but not
from endless loops or from texts that fill the memory: the parent bounds the time, and the kernel the memory.

Jobs arrive on standard input and results leave on standard output, each as JSON after its length in four
bytes. MessagePack has no integers beyond 64 bits, which schemas of tools may hold.
"""

import functools
import resource
import sys
from typing import Any, BinaryIO, Final

import jinja2
import msgspec

from moe_frontend.chat.environment import TemplateFailureError, compile_template, render

MEMORY_MOST: Final = 512 * 2**20
LENGTH_BYTES: Final = 4


class Job(msgspec.Struct, frozen=True):
    """What to render, and how many characters that may give."""

    template: str
    variables: dict[str, Any]
    most: int


class Result(msgspec.Struct, frozen=True):
    """A prompt, or why there is none."""

    prompt: str = ""
    error: str = ""


def main() -> None:
    """Serves the parent until it closes the standard input."""
    _limit()
    decoder = msgspec.json.Decoder(Job)
    while job := read_frame(sys.stdin.buffer):
        write_frame(sys.stdout.buffer, msgspec.json.encode(_result(decoder.decode(job))))


def read_frame(file: BinaryIO) -> bytes:
    """The next frame; empty at the end."""
    head = file.read(LENGTH_BYTES)
    return file.read(int.from_bytes(head, "big")) if len(head) == LENGTH_BYTES else b""


def write_frame(file: BinaryIO, payload: bytes) -> None:
    """Writes one frame."""
    file.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
    file.flush()


def _result(job: Job) -> Result:
    try:
        return Result(prompt=render(_compiled(job.template), job.variables, job.most))
    except TemplateFailureError as error:
        return Result(error=str(error))
    except MemoryError:
        return Result(error="the chat template takes too much memory on the conversation; shorten it")


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    return compile_template(template)


def _limit() -> None:
    """No memory beyond the bound, no files written, no processes."""
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY_MOST),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
