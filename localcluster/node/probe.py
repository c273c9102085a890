"""How the supervisor learns that a component, or the node, is ready."""

from __future__ import annotations

import json
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from localcluster.layout import API_ADDRESS, INSIDE, NODE_NAME

_TIMEOUT = 2.0  # seconds for one answer; a component that is starting is asked again anyway


def _context() -> ssl.SSLContext:
    """The administrator's identity. Servers are not verified: two of them sign their own certificates, and
    all are ours.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if (INSIDE.pki / "admin.crt").exists():
        context.load_cert_chain(INSIDE.pki / "admin.crt", INSIDE.pki / "admin.key")
    return context


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_TIMEOUT, context=_context()) as response:  # noqa: S310 - our own URLs
        body: bytes = response.read()
        return body


def is_ready(target: str | Path) -> bool:
    """Whether a URL returns 200, or a unix socket accepts."""
    try:
        if isinstance(target, str):
            _get(target)
            return True
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT)
            connection.connect(str(target))
            return True
    except (OSError, urllib.error.URLError):
        return False


def node_is_ready() -> bool:
    """Whether the API server shows the node as Ready, and pods can be made in the default namespace."""
    try:
        node = json.loads(_get(f"https://{API_ADDRESS}/api/v1/nodes/{NODE_NAME}"))
        _get(f"https://{API_ADDRESS}/api/v1/namespaces/default/serviceaccounts/default")
    except (OSError, urllib.error.URLError):
        return False
    return is_condition_true(node, "Ready")


def is_condition_true(resource: dict[str, Any], kind: str) -> bool:
    """Whether the object's status has that condition with status "True"."""
    conditions = resource.get("status", {}).get("conditions", [])
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)
