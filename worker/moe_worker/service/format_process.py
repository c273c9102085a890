"""Compiles output formats that clients send, in a process of its own (`moe_api.child`)."""

from typing import Final

import msgspec

from moe_api import child
from moe_worker.sampling.grammar import Verdict, check
from moe_worker.sampling.output_format import OutputFormat

MEMORY_MOST: Final = 2**30
_DECODER: Final = msgspec.json.Decoder(OutputFormat)


def answer(question: bytes) -> bytes:
    """The verdict on a format."""
    return msgspec.json.encode(_verdict(_DECODER.decode(question)))


def _verdict(output_format: OutputFormat) -> Verdict:
    try:
        return check(output_format)
    except MemoryError:
        return Verdict("takes too much memory to compile; simplify it")


if __name__ == "__main__":
    child.serve(answer, MEMORY_MOST)
