"""Where a model is called: the address, TLS and the caller's credential."""

from __future__ import annotations

import functools
import http.client
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import grpc

from moe_api import tls
from moe_client import errors

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)
Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Endpoint:
    """A port of a frontend (or worker).

    address: ``HOST:PORT``; empty: not given.
    token: an API key or a token; None: no credential is sent.
    tls: whether the connection is encrypted, and the server proves its name.
    ca_file: certificates of the authorities that may prove it, as PEM; None: the system's.
    server_name: the proved name, if it is not the host of the address.
    proof: folder with tls.crt and tls.key, by which the caller proves who it is; None: it does not.
    """

    address: str
    token: str | None = None
    tls: bool = False
    ca_file: Path | None = None
    server_name: str | None = None
    proof: Path | None = None

    def __str__(self) -> str:
        return self.address

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The credential, as metadata of a call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def channel(self, options: Options) -> grpc.Channel:
        """A gRPC channel. Raises CommandError if there is no certificate in --ca-file."""
        if not self.tls:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, self._credentials(), options=self._options(options))

    def aio_channel(self, options: Options) -> grpc.aio.Channel:
        """Like `channel`, for asyncio."""
        if not self.tls:
            return grpc.aio.insecure_channel(self.address, options=options)
        return grpc.aio.secure_channel(self.address, self._credentials(), options=self._options(options))

    def connection(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection for HTTP, not opened yet. Raises CommandError as `channel` does."""
        if not self.tls:
            return http.client.HTTPConnection(self.address, timeout=timeout_s)
        return _Https(self.address, timeout_s, self._context(), self.server_name)

    def _options(self, options: Options) -> Options:
        named = () if self.server_name is None else (("grpc.ssl_target_name_override", self.server_name),)
        return (*options, *named)

    def _credentials(self) -> grpc.ChannelCredentials:
        self._context()  # says what is wrong with the files; gRPC would only fail to connect
        authorities = None if self.ca_file is None else self.ca_file.read_bytes()
        if self.proof is None:
            return grpc.ssl_channel_credentials(authorities)
        key, certificate = (self.proof / name for name in (tls.KEY, tls.CERTIFICATE))
        return grpc.ssl_channel_credentials(authorities, key.read_bytes(), certificate.read_bytes())

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as error:
            sentence = f"{self.ca_file} has no certificate in PEM ({error}); give the ca.crt of the Secret"
            raise errors.CommandError(sentence, errors.WRONG) from error
        try:
            if self.proof is not None:
                context.load_cert_chain(self.proof / tls.CERTIFICATE, self.proof / tls.KEY, password="")
        except (OSError, ssl.SSLError) as error:
            sentence = f"{self.proof} has no tls.crt with its tls.key in PEM ({error})"
            raise errors.CommandError(f"{sentence}; give the files of the Secret", errors.WRONG) from error
        return context


class _Https(http.client.HTTPSConnection):
    """Expects another name than that of the address, where one is given."""

    def __init__(self, address: str, timeout_s: float, context: ssl.SSLContext, name: str | None) -> None:
        super().__init__(address, timeout=timeout_s, context=context)
        self._context_ = context
        self._name = name

    def connect(self) -> None:
        """Opens the connection."""
        http.client.HTTPConnection.connect(self)
        self.sock = self._context_.wrap_socket(self.sock, server_hostname=self._name or self.host)


def access_options(command: _Command) -> _Command:
    """Adds --token, --tls, --ca-file, --tls-server-name and --tls-folder.

    The command gets an `Endpoint` as `endpoint`; its own option --endpoint gives the address.
    """

    @functools.wraps(command)
    def called(*, endpoint: str | None, **given: Any) -> Any:
        token, ca_file = given.pop("token"), given.pop("ca_file")
        encrypted, server_name = given.pop("tls"), given.pop("tls_server_name")
        folder = given.pop("tls_folder")
        if token is not None and not (token and token.isascii() and token.isprintable()):
            raise click.UsageError("--token is no credential; use printable ASCII characters")
        if folder is not None and ca_file is None:
            ca_file = folder / tls.AUTHORITIES
        encrypted = encrypted or ca_file is not None or server_name is not None
        made = Endpoint(endpoint or "", token, encrypted, ca_file, server_name, folder)
        return command(endpoint=made, **given)

    for option in (
        click.option(
            "--tls-folder",
            type=_FOLDER,
            envvar="MOE_TLS_FOLDER",
            show_envvar=True,
            help="Proves who calls, with tls.crt and tls.key of this folder, and trusts its ca.crt: the "
            "files of a Secret, for workers with mutual TLS (docs/security.md). Default: no proof.",
        ),
        click.option(
            "--tls-server-name",
            envvar="MOE_TLS_SERVER_NAME",
            show_envvar=True,
            help="Name that the server's certificate must have, as through a port-forward. Default: the "
            "host of the address.",
        ),
        click.option(
            "--ca-file",
            type=_FILE,
            envvar="MOE_CA_FILE",
            show_envvar=True,
            help="Connects over TLS; the server's certificate comes from an authority in this file (PEM). "
            "Default: plaintext.",
        ),
        click.option("--tls", is_flag=True, help="Connects over TLS, with the authorities of this system."),
        click.option(
            "--token",
            envvar="MOE_API_KEY",
            show_envvar=True,
            help="API key or token, if the frontend asks for one. The variable hides it from process lists. "
            "Default: none.",
        ),
    ):
        called = option(called)
    return called  # type: ignore[return-value]
