"""Encrypts the connections between the leader and the other ranks, with the certificate of workers (--tls).

The leader proves that it is a worker of the namespace; a rank proves afterwards, inside, that it knows the
mesh's secret (`joining`). Certificates of workers are for servers only, so a rank has none to show.
"""

import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Final

NAME: Final = "worker.moe-operator.internal"
"""As certificates of workers have it (moe_api.mutual)."""
_READ: Final = 1 << 16


class SecureConnection:
    """Has the methods of a socket that channels use. One thread may receive while others send.

    `ssl.SSLSocket` does not allow that: the thread that waits for data would keep the others from sending.
    """

    def __init__(self, plain: socket.socket, context: ssl.SSLContext, name: str | None) -> None:
        self._plain = plain
        self._received, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._received, self._outgoing, server_side=name is None, server_hostname=name
        )
        self._using = threading.Lock()
        self._sending = threading.Lock()

    def shake_hands(self, seconds: float) -> None:
        """Raises OSError (ssl.SSLError, TimeoutError)."""
        ends = time.monotonic() + seconds
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                finished = False
            else:
                finished = True
            finally:  # also what tells the other end why not
                self._plain.sendall(self._outgoing.read())
            if finished:
                return
            left = ends - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the handshake took longer than {seconds:g} s")
            self._plain.settimeout(left)
            if not self._fill():
                raise ConnectionError("the other end has closed the connection")

    def recv(self, most: int, flags: int = 0) -> bytes:
        """Raises OSError. flags: to peek at bytes that are still encrypted."""
        if flags:
            return self._plain.recv(most, flags)
        while True:
            try:
                with self._using:
                    return self._tls.read(most)
            except ssl.SSLWantReadError:
                if not self._fill():
                    return b""
            except ssl.SSLZeroReturnError:
                return b""

    def sendall(self, data: bytes) -> None:
        """Raises OSError."""
        with self._sending:
            with self._using:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._tls.write(rest) :]
                encrypted = self._outgoing.read()
            self._plain.sendall(encrypted)

    def settimeout(self, seconds: float | None) -> None:
        """Of each read and write."""
        self._plain.settimeout(seconds)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """Of the socket."""
        self._plain.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        """Ends both directions; whoever receives wakes up."""
        self._plain.shutdown(how)

    def fileno(self) -> int:
        """The socket's."""
        return self._plain.fileno()

    def close(self) -> None:
        """Closes the socket."""
        self._plain.close()

    def _fill(self) -> bool:
        """Waits for encrypted bytes; whether some came."""
        data = self._plain.recv(_READ)
        with self._using:
            self._received.write(data)
        return bool(data)


def secured(plain: socket.socket, folder: str, seconds: float, *, leads: bool) -> SecureConnection:
    """The connection after a handshake. The files are read each time, because they are renewed.

    folder: with tls.crt, tls.key and ca.crt.

    Raises:
        OSError: a file is not valid, the handshake failed (ssl.SSLError) or took too long (TimeoutError).
    """
    files = Path(folder)
    if leads:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files / "tls.crt", files / "tls.key")
        context.num_tickets = 0  # nobody resumes
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(files / "ca.crt")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    connection = SecureConnection(plain, context, None if leads else NAME)
    connection.shake_hands(seconds)
    return connection
