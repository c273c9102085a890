"""What TLS and authentication add to the frontend's pods: Secrets, variables and ports of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moe_operator.render.internal_tls import HEALTH_PORT
from moe_operator.render.objects import Manifest
from moe_operator.resources import names
from moe_operator.resources.access_spec import Jwt
from moe_operator.resources.frontend_spec import Frontend

_FOLDER: Final = "/etc/moe"
TLS_FOLDER: Final = f"{_FOLDER}/tls"
KEYS_FOLDER: Final = f"{_FOLDER}/api-keys"
JWKS_FOLDER: Final = f"{_FOLDER}/jwks"
_METRICS: Final[Manifest] = {
    "name": names.METRICS_PORT_NAME,
    "containerPort": names.METRICS_PORT,
    "protocol": "TCP",
}


def ports(settings: Frontend, *, mutual: bool = False) -> list[Manifest]:
    """Ports in addition to those for clients. mutual: the operator's serves mutual TLS (spec.transport)."""
    name = names.SECURE_ADMIN_PORT_NAME if mutual else names.ADMIN_PORT_NAME
    admin = {"name": name, "containerPort": names.ADMIN_PORT, "protocol": "TCP"}
    return [
        *([admin] if mutual or settings.guarded else []),
        *([HEALTH_PORT] if mutual else []),
        *([_METRICS] if settings.guarded else []),
    ]


def probed_port(settings: Frontend, *, mutual: bool) -> int:
    """The port of health probes, which know neither TLS nor credentials."""
    if mutual:
        return names.HEALTH_PORT
    return names.ADMIN_PORT if settings.guarded else names.GRPC_PORT


def variables(settings: Frontend) -> dict[str, str]:
    """The options of `moe-frontend`."""
    log = {} if settings.audit_log == "Off" else {"MOE_AUDIT_LOG": "1"}
    if not settings.guarded:
        return log
    auth = settings.auth
    return {
        **log,
        "MOE_ADMIN": f"0.0.0.0:{names.ADMIN_PORT}",
        "MOE_METRICS_PORT": str(names.METRICS_PORT),
        **({"MOE_TLS": TLS_FOLDER} if settings.tls is not None else {}),
        **({"MOE_API_KEYS": KEYS_FOLDER} if auth is not None and auth.api_keys_secret is not None else {}),
        **(_of_tokens(auth.jwt) if auth is not None and auth.jwt is not None else {}),
    }


def _of_tokens(jwt: Jwt) -> dict[str, str]:
    return {
        "MOE_JWKS": JWKS_FOLDER if jwt.jwks_uri is None else jwt.jwks_uri,
        "MOE_JWT_ISSUER": jwt.issuer,
        "MOE_JWT_AUDIENCE": jwt.audience,
        "MOE_JWT_TENANT_CLAIM": jwt.tenant_claim,
    }


def volumes(settings: Frontend) -> list[Manifest]:
    """The Secrets."""
    return [{"name": name, "secret": {"secretName": secret}} for name, secret, _ in _mounted(settings)]


def mounts(settings: Frontend) -> list[Manifest]:
    """Where the container finds them. Whole folders: only those follow a change of the Secret."""
    return [{"name": name, "mountPath": folder, "readOnly": True} for name, _, folder in _mounted(settings)]


def _mounted(settings: Frontend) -> Iterator[tuple[str, str, str]]:
    """Volume, Secret and folder of each."""
    if settings.tls is not None:
        yield "moe-tls", settings.tls.secret_name, TLS_FOLDER
    auth = settings.auth
    if auth is None:
        return
    if auth.api_keys_secret is not None:
        yield "moe-api-keys", auth.api_keys_secret, KEYS_FOLDER
    if auth.jwt is not None and auth.jwt.jwks_secret is not None:
        yield "moe-jwks", auth.jwt.jwks_secret, JWKS_FOLDER
