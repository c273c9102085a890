"""Renders chat templates, in a process of its own (`moe_api.child`).

Templates are programs of whoever made the checkpoint. The sandbox keeps them from Python's internals, but not
from endless loops or from texts that fill the memory.

Jobs and results are JSON: MessagePack has no integers beyond 64 bits, which schemas of tools may hold.
"""

import functools
from typing import Any, Final

import jinja2
import msgspec

from moe_api import child
from moe_frontend.chat.environment import TemplateFailureError, compile_template, render

MEMORY_MOST: Final = 512 * 2**20


class Job(msgspec.Struct, frozen=True):
    """What to render, and how many characters that may give."""

    template: str
    variables: dict[str, Any]
    most: int


class Result(msgspec.Struct, frozen=True):
    """A prompt, or why there is none."""

    prompt: str = ""
    error: str = ""


_DECODER: Final = msgspec.json.Decoder(Job)


def answer(question: bytes) -> bytes:
    """The result of a job."""
    return msgspec.json.encode(_result(_DECODER.decode(question)))


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


if __name__ == "__main__":
    child.serve(answer, MEMORY_MOST)
