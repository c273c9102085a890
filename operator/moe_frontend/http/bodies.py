"""Reads the bodies of requests: within a size, within a time, and into what `schemas` declares."""

import asyncio
import contextlib
import functools
import json
import re
from collections.abc import Hashable, Iterator
from typing import Any, Final, TypeVar, cast

import msgspec
import msgspec.inspect
from starlette.requests import Request

from moe_api.receiving import InProgress, NotReceivedError, Place
from moe_frontend.http.errors import ApiError, invalid, of_status

BODY_MOST: Final = 16 * 2**20
"""Bytes, as of a gRPC message."""
BODY_LEAST: Final = 2**20
BYTES_A_TOKEN: Final = 64
"""Bytes of a body for each token of the context: a body may hold several prompts."""
BODY_S: Final = 30.0
DEPTH_MOST: Final = 64
_AT: Final = re.compile(r" - at (?P<key>`key` in )?`\$\.?(?P<path>[^`]*)`$")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>.*?)`(?: - at `[^`]*`)?$", re.DOTALL)
_UNSUPPORTED: Final = re.compile("expected null, got ")
_ENUM: Final = re.compile("invalid enum value ")
_STEP: Final = re.compile(r"\[[^\]]*\]|[^.\[\]]+")
_SHOWN: Final = 100
T = TypeVar("T")


def most_bytes(context_length: int) -> int:
    """Bytes of the largest body for a model with this context, in tokens; 0: not known."""
    return min(max(BYTES_A_TOKEN * context_length, BODY_LEAST), BODY_MOST) if context_length else BODY_MOST


class Bodies:
    """Reads bodies, so many bytes at a time as this process can hold.

    Args:
        limit_s: how long a client may take to send its body, in seconds.
        in_progress: counts the bytes of requests in progress, those of gRPC too.
    """

    def __init__(self, limit_s: float = BODY_S, in_progress: InProgress | None = None) -> None:
        self._limit_s = limit_s
        self._in_progress = in_progress or InProgress()

    @contextlib.contextmanager
    def place(self) -> Iterator["Counted"]:
        """Counts what a request holds for the time of the block."""
        with self._in_progress.place() as place:
            yield Counted(place)

    async def read(self, request: Request, most: int, counted: "Counted") -> bytes:
        """The body.

        Raises:
            ApiError: it is no JSON by its headers, larger than `most` bytes, took too long, or there is no
                room for it.
            ClientDisconnect: the client went away.
        """
        _check_headers(request, most)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limit_s):
                async for part in request.stream():
                    if len(body) + len(part) > most:
                        raise _too_large(most)
                    counted.grow(len(part))
                    body.extend(part)
                return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, f"the body of the request did not arrive within {self._limit_s:g} s; send it again"
            ) from None


class Counted:
    """What one request holds."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def grow(self, by: int) -> None:
        """Counts `by` more bytes.

        Raises:
            ApiError: there is no room for them.
        """
        try:
            self._place.grow(by)
        except NotReceivedError as error:
            raise of_status(error.status, {}) from None


def decode(body: bytes, kind: type[T]) -> T:
    """The request in a body.

    Raises:
        ApiError: it is no JSON, or not of this kind.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise of_validation(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = _lower(str(error).removeprefix("JSON is malformed: "))
        raise ApiError(400, f"the body is not valid JSON: {problem}; send one object") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply; send a flatter object") from None


def check_depth(param: str, value: object, most: int = DEPTH_MOST) -> None:
    """Refuses a value whose lists and objects are nested more than `most` deep.

    Raises:
        ApiError: it is.
    """
    level = [value]
    for _ in range(most):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise invalid(param, f"is nested more than {most} deep; send a flatter value")


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _check_headers(request: Request, most: int) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"Content-Type {kind[:_SHOWN]!r} is not supported; send JSON as application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Encoding is not supported; send the body as it is")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > len(str(most)) or int(length) > most):
        raise _too_large(most)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body is too large: {most} bytes are allowed for this model; shorten the prompt, or send several"
        " requests",
    )


def of_validation(text: str, kind: type[Any]) -> ApiError:
    """What is wrong with a request of some kind.

    text: of msgspec, such as "Expected `int`, got `str` - at `$.max_tokens`".
    """
    if unknown := _UNKNOWN.search(text):
        where = _path(text)
        param = (f"{where}.{unknown['name']}" if where else unknown["name"])[:_SHOWN]
        sentence = "is not a field of this request; see docs/openai-api.md for those that are"
        return ApiError(400, f"{_shown(param)} {sentence}", param=param)
    problem = _lower(_AT.sub("", text).replace("`", ""))
    param = _path(text)
    if not param:
        return ApiError(400, f"the body is not such a request: {problem}; send one JSON object")
    if _UNSUPPORTED.match(problem):
        return invalid(param[:_SHOWN], "is not supported; leave it out")
    values = ", ".join(_values(kind, param)) if _ENUM.match(problem) else ""
    found = _AT.search(text)
    what = "has a key that is" if found is not None and found["key"] else "is"
    return invalid(param[:_SHOWN], f"{what} not valid: {problem}" + (f"; use {values}" if values else ""))


def _values(kind: type[Any], path: str) -> list[str]:
    """The words that a field may have, by its path in a request, such as `messages[0].role`."""
    kinds = _members(_inspected(cast("Hashable", kind)))
    for step in _STEP.findall(path):
        kinds = [one for outer in kinds for inner in _within(outer, step) for one in _members(inner)]
    return [str(word) for one in kinds if isinstance(one, msgspec.inspect.LiteralType) for word in one.values]


@functools.cache
def _inspected(kind: Hashable) -> msgspec.inspect.Type:
    return msgspec.inspect.type_info(kind)


def _members(kind: msgspec.inspect.Type) -> list[msgspec.inspect.Type]:
    return list(kind.types) if isinstance(kind, msgspec.inspect.UnionType) else [kind]


def _within(kind: msgspec.inspect.Type, step: str) -> list[msgspec.inspect.Type]:
    """The type of a field of an object, or of the items of a list (a step in brackets)."""
    if isinstance(kind, msgspec.inspect.ListType) and step.startswith("["):
        return [kind.item_type]
    if isinstance(kind, msgspec.inspect.StructType):
        return [field.type for field in kind.fields if field.encode_name == step]
    return []


def _shown(name: str) -> str:
    """A field's name as a word of a sentence."""
    return name if re.fullmatch(r"\S+", name) else json.dumps(name, ensure_ascii=False)


def _path(text: str) -> str:
    found = _AT.search(text)
    return found["path"] if found else ""


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
