"""What mutual TLS adds to pods (spec.transport): a Secret, and names of ports that tell callers."""

from __future__ import annotations

from typing import Final

from moe_operator.render.objects import Manifest
from moe_operator.resources import names
from moe_operator.resources.deployment import Deployment

FOLDER: Final = "/etc/moe/internal"
_VOLUME: Final = "moe-internal"
_SECRETS: Final = {
    names.ROLE_WORKER: names.WORKER_CERTIFICATE_SECRET,
    names.ROLE_FRONTEND: names.FRONTEND_CERTIFICATE_SECRET,
}
_HEALTH_ADDRESS: Final = f"0.0.0.0:{names.HEALTH_PORT}"
HEALTH_PORT: Final[Manifest] = {
    "name": names.HEALTH_PORT_NAME,
    "containerPort": names.HEALTH_PORT,
    "protocol": "TCP",
}


def worker_variables(deployment: Deployment) -> dict[str, str]:
    """Options of `moe-worker serve`; variables, because images of earlier versions do not know the flags."""
    if not deployment.spec.transport.mutual:
        return {}
    return {"MOE_WORKER_TLS": FOLDER, "MOE_WORKER_HEALTH": _HEALTH_ADDRESS}


def frontend_variables(deployment: Deployment) -> dict[str, str]:
    """Options of `moe-frontend`."""
    if not deployment.spec.transport.mutual:
        return {}
    admin = f"0.0.0.0:{names.ADMIN_PORT}"
    return {"MOE_INTERNAL_TLS": FOLDER, "MOE_ADMIN": admin, "MOE_HEALTH": _HEALTH_ADDRESS}


def volumes(deployment: Deployment, role: str) -> list[Manifest]:
    """The Secret with the certificate of a role; not the authority's key."""
    if not deployment.spec.transport.mutual:
        return []
    return [{"name": _VOLUME, "secret": {"secretName": _SECRETS[role]}}]


def mounts(deployment: Deployment) -> list[Manifest]:
    """Where the container finds it."""
    if not deployment.spec.transport.mutual:
        return []
    return [{"name": _VOLUME, "mountPath": FOLDER, "readOnly": True}]


def worker_ports(deployment: Deployment, plain: list[Manifest]) -> list[Manifest]:
    """The ports of a worker, with another name of that of gRPC where it serves mutual TLS."""
    if not deployment.spec.transport.mutual:
        return plain
    return [*({**port, "name": names.SECURE_GRPC_PORT_NAME} for port in plain), HEALTH_PORT]
