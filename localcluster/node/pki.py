"""Keys, certificates and kubeconfigs of a cluster, made anew by every `up`.

Identities follow the conventions that Kubernetes' default RBAC roles and the Node authorizer expect
(kubernetes.io/docs/setup/best-practices/certificates).
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from localcluster.layout import (
    API_ADDRESS,
    API_SERVICE_ADDRESS,
    CLUSTER_DOMAIN,
    NODE_ADDRESS,
    NODE_NAME,
    Layout,
)

_LIFETIME = timedelta(days=365)
# A virtual machine's clock may jump back a little after the certificates are made.
_CLOCK_TOLERANCE = timedelta(hours=1)

CLIENTS = {
    "admin": ("kubernetes-admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", None),
    "scheduler": ("system:kube-scheduler", None),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
    "network-agent": ("system:kube-proxy", None),  # bound to the role system:node-proxier by default
    "apiserver-kubelet": ("kube-apiserver-kubelet-client", "system:masters"),
}
_API_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    f"kubernetes.default.svc.{CLUSTER_DOMAIN}",
    "localhost",
)


@dataclass(frozen=True)
class Authority:
    """A certificate authority, held in memory only: its private key is never written."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    now: datetime

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(self, name: str, organization: str | None, names: tuple[str, ...] = ()) -> tuple[bytes, bytes]:
        """A new key and its certificate, as PEM (key, certificate); for a server when it has `names` (DNS or
        IP).
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = _builder(_subject(name, organization), self.certificate.subject, key.public_key(), self.now)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False
            )
        return _key_pem(key), builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _subject(name: str, organization: str | None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if organization:
        attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(attributes)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _CLOCK_TOLERANCE).not_valid_after(now + _LIFETIME)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_authority(now: datetime) -> Authority:
    """A new self-signed authority. `now` is an aware time."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject("localcluster-ca", None)
    builder = _builder(name, name, key.public_key(), now)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return Authority(key, builder.sign(key, hashes.SHA256()), now)


def kubeconfig(server: str, authority_pem: bytes, key_pem: bytes, certificate_pem: bytes) -> str:
    """A kubeconfig with everything inlined. JSON, which is YAML too."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "local",
                "cluster": {"server": server, "certificate-authority-data": _base64(authority_pem)},
            }
        ],
        "users": [
            {
                "name": "local",
                "user": {
                    "client-key-data": _base64(key_pem),
                    "client-certificate-data": _base64(certificate_pem),
                },
            }
        ],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": "local"}}],
        "current-context": "local",
    }
    return json.dumps(content, indent=1)


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def write_all(layout: Layout, api_port: int, now: datetime) -> None:
    """Writes every key, certificate and kubeconfig of a new cluster.

    Args:
        layout: where to.
        api_port: the API server's port on the host's 127.0.0.1, for the administrator's kubeconfig.
        now: an aware time; certificates are valid for a year from it.
    """
    authority = new_authority(now)
    _write(layout.pki / "ca.crt", authority.pem)
    addresses = tuple(str(a) for a in (NODE_ADDRESS, API_SERVICE_ADDRESS, IPv4Address("127.0.0.1")))
    for server, names in {
        "apiserver": _API_NAMES + addresses,
        "kubelet-server": (NODE_NAME, str(NODE_ADDRESS)),
    }.items():
        _write_pair(layout, server, *authority.issue(server, None, names))
    for identity, (name, organization) in CLIENTS.items():
        key, certificate = authority.issue(name, organization)
        _write_pair(layout, identity, key, certificate)
        config = kubeconfig(f"https://{API_ADDRESS}", authority.pem, key, certificate)
        _write(layout.node_kubeconfig(identity), config.encode())
        if identity == "admin":
            config = kubeconfig(f"https://127.0.0.1:{api_port}", authority.pem, key, certificate)
            _write(layout.kubeconfig, config.encode())
    service_account = ec.generate_private_key(ec.SECP256R1())
    _write(layout.pki / "service-account.key", _key_pem(service_account))
    public = service_account.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write(layout.pki / "service-account.pub", public)


def _write_pair(layout: Layout, name: str, key: bytes, certificate: bytes) -> None:
    _write(layout.pki / f"{name}.key", key)
    _write(layout.pki / f"{name}.crt", certificate)
