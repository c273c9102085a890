"""Shared by all commands that call a model: the address, the text, and one-sentence errors."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import click
import grpc

from moe_api import mutual, rich_status, transport
from moe_api.address import check_address
from moe_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from moe_api.ranges import FiniteRange
from moe_client import errors
from moe_client.endpoint import Endpoint, access_options
from moe_client.errors import CommandError

_LONGEST_S: Final = 1e9
"""gRPC counts nanoseconds in 64 bits: a deadline in a thousand years has passed already."""
_Command = TypeVar("_Command", bound=Callable[..., Any])

EXIT_CODES: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.WRONG,
    grpc.StatusCode.NOT_FOUND: errors.WRONG,
    grpc.StatusCode.UNAUTHENTICATED: errors.WRONG,
    grpc.StatusCode.UNAVAILABLE: errors.ABSENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.BUSY,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.LATE,
}


class _Address(click.ParamType[str]):
    """``HOST:PORT``."""

    name = "HOST:PORT"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return check_address(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Text(click.ParamType[str]):
    """Text that UTF-8 can encode; ``-`` reads standard input."""

    name = "text"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        raw = sys.stdin.buffer.read() if value == "-" else str(value).encode(errors="surrogateescape")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}", param, ctx)


ADDRESS: Final = _Address()
TEXT: Final = _Text()


def model_options(command: _Command, timeout_s: float | None = None) -> _Command:
    """Adds --endpoint, --model, --timeout and those of `access_options`. timeout_s: its default."""
    command = access_options(command)
    for option in (
        click.option(
            "--timeout",
            type=FiniteRange(0, _LONGEST_S, min_open=True),
            default=timeout_s,
            show_default="no limit" if timeout_s is None else True,
            help="Seconds to wait at most.",
        ),
        click.option(
            "--model", default="", help="Served name of the model. Default: the one that is served."
        ),
        click.option(
            "--endpoint",
            type=ADDRESS,
            envvar="MOE_ENDPOINT",
            default="127.0.0.1:8000",
            show_default=True,
            show_envvar=True,
            help="Where the frontend (or a worker) listens.",
        ),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def calling(endpoint: Endpoint) -> Iterator[InferenceServiceStub]:
    """As `connected`, with a stub of InferenceService."""
    with connected(endpoint) as channel:
        yield InferenceServiceStub(channel)


@contextlib.contextmanager
def connected(endpoint: Endpoint) -> Iterator[grpc.Channel]:
    """A channel to the endpoint; gRPC errors inside the block become one-sentence errors.

    Raises:
        CommandError: the call failed.
    """
    with endpoint.channel(transport.CLIENT_OPTIONS) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise explain(error, endpoint) from error


def _of_workers(endpoint: Endpoint) -> str:
    """What a worker with mutual TLS asks for that is not given."""
    if endpoint.proof is None:
        return "A worker with mutual TLS needs --tls-folder."
    if endpoint.server_name is None:
        return f"A worker with mutual TLS needs --tls-server-name {mutual.WORKER}."
    return ""


def explain(error: grpc.RpcError, endpoint: Endpoint) -> CommandError:
    """The error of a failed call, for users."""
    status = rich_status.from_error(error)
    code = rich_status.status_code(status)
    sentence = status.message or code.name
    if code is grpc.StatusCode.UNAVAILABLE and "http1.x server" in status.message:
        sentence = f"{endpoint} serves HTTP, not gRPC; give the port of gRPC, which is 8000 by default"
    elif code is grpc.StatusCode.UNAVAILABLE and not status.details:
        sentence = (
            f"cannot connect to {endpoint} ({sentence}); is the frontend running and reachable from "
            "here, by `kubectl port-forward service/NAME-frontend 8000` for one, and does --ca-file or --tls "
            f"say whether it serves TLS? {_of_workers(endpoint)}"
        ).rstrip()
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        sentence = f"{endpoint} is a gRPC server, but serves no models"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        sentence = f"no complete response from {endpoint} within --timeout; the printed text is valid"
    delay = rich_status.retry_delay(status)
    hint = f" (retry after {delay:g} s)" if delay else ""
    return CommandError(sentence + hint, EXIT_CODES.get(code, errors.FAILED))
