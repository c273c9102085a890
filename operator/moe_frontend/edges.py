"""What guards the ports of a frontend: TLS, and who is let in. Made from the command line."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
from opentelemetry import metrics

from moe_api import expiry, mutual, tls
from moe_api.mounted import Mounted, MountedError
from moe_api.supervision import Supervisor
from moe_frontend.identity import keys
from moe_frontend.identity.audit import NO_LOG, AuditLog
from moe_frontend.identity.credentials import NOBODY_ASKED, Authenticator
from moe_frontend.identity.lines import LineWriter
from moe_operator.errors import InstallationError

T = TypeVar("T")


@dataclass(frozen=True)
class Guards:
    """What the command line says about it.

    tls: folder with tls.crt and tls.key; None: plaintext.
    internal_tls: folder with tls.crt, tls.key and ca.crt, for workers and the operator; None: plaintext.
    api_keys: folder with an entry for each tenant (identity.keys); None: there are no keys.
    jwks: URL of a key set, or folder with jwks.json; None: tokens are not accepted.
    jwt_issuer, jwt_audience: that tokens must name.
    jwt_tenant_claim: the claim of a token that names the tenant.
    audit_log: whether requests are logged to standard output (identity.audit).
    """

    tls: Path | None = None
    internal_tls: Path | None = None
    api_keys: Path | None = None
    jwks: str | None = None
    jwt_issuer: str = ""
    jwt_audience: str = ""
    jwt_tenant_claim: str = "sub"
    audit_log: bool = False


def _authenticator(guards: Guards, supervisor: Supervisor) -> Authenticator:
    """Knows the callers; follows the keys as they change. Raises InstallationError."""
    known = None
    if guards.api_keys is not None:
        known = _mounted(guards.api_keys, keys.parse, supervisor)
    tokens = None
    if guards.jwks is not None:
        # A fifth of a second, which frontends that verify no tokens need not wait.
        from moe_frontend.identity import provider  # noqa: PLC0415
        from moe_frontend.identity.tokens import TokenVerifier, Trust  # noqa: PLC0415

        source: provider.Source
        if guards.jwks.startswith(("https:", "http:")):
            source = fetched = provider.UrlSource(guards.jwks)
            supervisor.start("jwks", fetched.run)
        else:
            published = _mounted(Path(guards.jwks), provider.parse_file, supervisor)
            source = provider.FileSource(lambda: published.value)
        tokens = TokenVerifier(Trust(guards.jwt_issuer, guards.jwt_audience, guards.jwt_tenant_claim), source)
    if known is None and tokens is None:
        return NOBODY_ASKED
    return Authenticator(None if known is None else lambda: known.value, tokens)


@dataclass(frozen=True)
class Tls:
    """TLS of both client ports."""

    grpc: grpc.ServerCredentials
    http: ssl.SSLContext
    pair: Callable[[], tls.KeyPair]
    """The certificate as it is now."""


class Internal:
    """Mutual TLS with workers and the operator, which takes renewed certificates.

    Raises:
        InstallationError: the folder is not valid.
    """

    def __init__(self, folder: Path, supervisor: Supervisor) -> None:
        self._renewed: Callable[[], None] = lambda: None
        self._pair = _mounted(folder, mutual.parse, supervisor, lambda _: self._renewed())

    def pair(self) -> tls.KeyPair:
        """The certificate of this frontend as it is now."""
        return self._pair.value

    def on_renewal(self, renewed: Callable[[], None]) -> None:
        """Calls `renewed` after each change."""
        self._renewed = renewed

    def server_credentials(self) -> grpc.ServerCredentials:
        """For the operator's port: clients need a certificate of the same authority."""
        return tls.server_credentials(self.pair, mutual=True)


@dataclass(frozen=True)
class Edge:
    """What guards the ports.

    tls: of clients; None: plaintext. log: of their requests. lines: its writer. internal: of workers and the
    operator; None: plaintext.
    """

    authenticator: Authenticator
    tls: Tls | None
    log: AuditLog
    lines: LineWriter | None = None
    internal: Internal | None = None

    def measure(self, meter: metrics.Meter) -> None:
        """Creates the instruments."""
        if self.lines is not None:
            self.lines.measure(meter)
        used = {} if self.tls is None else {expiry.CLIENT: self.tls.pair}
        if self.internal is not None:
            used[expiry.INTERNAL] = self.internal.pair
        expiry.measure(meter, used)

    async def close(self) -> None:
        """Writes the last lines of the log."""
        if self.lines is not None:
            await asyncio.to_thread(self.lines.close)


def edge_of(guards: Guards, supervisor: Supervisor) -> Edge:
    """The guards of a running frontend.

    Raises:
        InstallationError: a folder is not valid.
    """
    authenticator, encryption = _authenticator(guards, supervisor), _tls(guards, supervisor)
    internal = None if guards.internal_tls is None else Internal(guards.internal_tls, supervisor)
    if not guards.audit_log:
        return Edge(authenticator, encryption, NO_LOG, internal=internal)
    # Standard output is for the audit log alone; everything else is logged to standard error.
    lines = LineWriter(supervisor)
    return Edge(authenticator, encryption, AuditLog(lines.put), lines, internal)


def _tls(guards: Guards, supervisor: Supervisor) -> Tls | None:
    """The server side of TLS, which takes renewed certificates; None: plaintext. Raises InstallationError."""
    if guards.tls is None:
        return None
    context: list[ssl.SSLContext] = []
    pair = _mounted(guards.tls, tls.parse, supervisor, lambda renewed: tls.load(context[0], renewed))
    context.append(tls.server_context(pair.value))
    return Tls(tls.server_credentials(lambda: pair.value), context[0], lambda: pair.value)


def _mounted(
    folder: Path,
    parse: Callable[[Mapping[str, bytes]], T],
    supervisor: Supervisor,
    changed: Callable[[T], None] | None = None,
) -> Mounted[T]:
    try:
        mounted = Mounted(folder, parse, changed)
    except MountedError as error:
        raise InstallationError(str(error)) from error
    supervisor.start("mounted", mounted.watch, str(folder))
    return mounted
