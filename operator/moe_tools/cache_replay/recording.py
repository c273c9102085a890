"""Reads traces of cache lookups.

    {"timestamp": 0, "input_length": 512, "output_length": 20, "hash_ids": [46, 47]}
                        one request a line; hash_ids name the blocks of its prompt, each with all before it
    17                  text: one key a line
    (binary)            keys of four bytes, big-endian

Plain or compressed (.gz, .xz).
"""

from __future__ import annotations

import gzip
import json
import lzma
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

from moe_tools.recorded import TraceError, shown

_MOST_BYTES: Final = 2 * 2**30
_KINDS: Final = (
    "a JSONL file with hash_ids (one request a line), a text file with one key a line, or a file of keys of "
    "four bytes, big-endian"
)
Key = int | str


@dataclass(frozen=True)
class Request:
    """The lookups of one request.

    keys: in order; blocks of a prompt, or one object.
    prompt_tokens, answer_tokens: 0 where the trace does not say.
    at_s: seconds since the start of the trace; 0 if unknown.
    """

    keys: tuple[Key, ...]
    prompt_tokens: int = 0
    answer_tokens: int = 0
    at_s: float = 0.0


@dataclass(frozen=True)
class KeyTrace:
    """A trace; `blocks` says whether keys are blocks of prompts; otherwise each key is an object."""

    name: str
    requests: list[Request]
    blocks: bool


def read(path: Path) -> KeyTrace:
    """Reads a trace of any of the kinds above.

    Raises:
        TraceError: it is none of them, is damaged, is empty, or has more than 2 GiB.
    """
    content = _content(path)
    if content.lstrip()[:1] == b"{":
        requests = [
            _request(path, number, line)
            for number, line in enumerate(content.splitlines(), start=1)
            if line.strip()
        ]
        return KeyTrace(path.name, requests, blocks=True)
    keys = _text_keys(content) or _binary_keys(content)
    if not keys:
        raise TraceError(f"{path}: the trace has no keys; a trace of a cache is {_KINDS}")
    return KeyTrace(path.name, [Request((key,)) for key in keys], blocks=False)


def _content(path: Path) -> bytes:
    try:
        with _opened(path) as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"{path}: {reason}") from error
    if len(content) > _MOST_BYTES:
        raise TraceError(f"{path}: the trace has more than {_MOST_BYTES} bytes; split it")
    return content


def _opened(path: Path) -> IO[bytes]:
    """The file, decompressed by its suffix."""
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    return cast("IO[bytes]", lzma.open(path)) if path.suffix == ".xz" else path.open("rb")


def _text_keys(content: bytes) -> list[Key]:
    """Keys of a text; none if it is not text."""
    if not content[:4096].isascii() or b"\0" in content[:4096]:
        return []
    try:
        return [line.strip() for line in content.decode("ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        return []


def _binary_keys(content: bytes) -> list[Key]:
    if len(content) % 4:
        return []
    return list(struct.unpack(f">{len(content) // 4}i", content))


def _request(path: Path, number: int, line: bytes) -> Request:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(keys := record.get("hash_ids"), list):
        raise TraceError(f"{path}:{number}: hash_ids is missing; write a list of block ids")
    if not all(isinstance(key, int | str) for key in keys):
        raise TraceError(f"{path}:{number}: hash_ids contains a value that is neither a number nor a text")
    milliseconds = _number(path, number, record, "timestamp")
    return Request(
        tuple(keys),
        int(_number(path, number, record, "input_length")),
        int(_number(path, number, record, "output_length")),
        milliseconds / 1e3 if "timestamp" in record else _number(path, number, record, "timestamp_us") / 1e6,
    )


def _number(path: Path, number: int, record: dict[str, Any], name: str) -> float:
    value = record.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
        raise TraceError(f"{path}:{number}: {name} is {shown(value)}; write a number of 0 or more")
    return value
