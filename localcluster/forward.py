"""Reaching a service of the cluster from the host."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from localcluster.errors import ForwardError, NotRunningError
from localcluster.layout import Layout


@contextmanager
def connect_unix(path: Path) -> Iterator[socket.socket]:
    """A connection to a unix socket whose path may be longer than the 107 bytes an address holds."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
            yield connection
    finally:
        os.close(directory)


class Forward:
    """A port of 127.0.0.1 on the host that leads to the ready endpoints of a service, each connection to the
    next.

    The listening socket is made here, in the host's network, and handed to the cluster's network agent,
    which accepts from it until this object is closed; no thread or process stays on the host.
    """

    def __init__(
        self, directory: Path | str, namespace: str, service: str, port: int | str, local_port: int = 0
    ) -> None:
        """`port` is the service port's number or name; `local_port` 0 takes a free one.

        Raises:
            NotRunningError: no cluster runs in that state directory.
            ForwardError: there is no such service or port, or the local port is taken.
        """
        self._close = ExitStack()
        self._lines: IO[bytes]
        with ExitStack() as stack:
            control = _open_control(stack, Layout(Path(directory).absolute()))
            with socket.socket() as listener:
                self.address = _listen(listener, local_port)
                request = json.dumps({"namespace": namespace, "service": service, "port": str(port)}).encode()
                socket.send_fds(control, [request], [listener.fileno()])
                self._lines = stack.enter_context(control.makefile("rb"))
                answer = self._lines.readline()
            if not answer:
                raise ForwardError(
                    "the cluster's network agent ended; `python -m localcluster status` "
                    "shows whether it is back"
                )
            if error := json.loads(answer)["error"]:
                raise ForwardError(error)
            stack.callback(_say_goodbye, control, self._lines)
            self._close = stack.pop_all()

    def notices(self) -> Iterator[str]:
        """Waits for reasons why connections are reset; ends when the network agent ends."""
        for line in self._lines:
            yield json.loads(line)["notice"]

    def __enter__(self) -> Forward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the forward; open connections go on."""
        self._close.close()


def _say_goodbye(control: socket.socket, lines: IO[bytes]) -> None:
    """Ends the forward, and returns when the agent no longer listens."""
    with suppress(OSError):  # the agent, or all of the cluster, may be gone already
        control.shutdown(socket.SHUT_WR)
        lines.read()


def _open_control(stack: ExitStack, layout: Layout) -> socket.socket:
    try:
        return stack.enter_context(connect_unix(layout.network_socket))
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunningError(
            f"no cluster runs in {layout.root}; start one with `python -m localcluster up`"
        ) from None


def _listen(listener: socket.socket, port: int) -> str:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise ForwardError(
            f"127.0.0.1:{port} cannot be used ({error.strerror}); choose another port, or 0 for a free one"
        ) from None
    listener.listen(128)
    return f"127.0.0.1:{listener.getsockname()[1]}"
