"""Makes authorities and certificates: ECDSA P-256, SHA-256, X.509 v3 (RFC 5280)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moe_api import mutual
from moe_api.tls import KeyPair

LIFE: Final = timedelta(days=90)
"""Of a certificate; renewed after two thirds, so an operator may be away for a month."""
AUTHORITY_LIFE: Final = timedelta(days=730)
EARLY: Final = timedelta(hours=1)
"""Certificates are valid from before they are made: clocks of nodes differ."""

_CLIENT: Final = ExtendedKeyUsageOID.CLIENT_AUTH
_SERVER: Final = ExtendedKeyUsageOID.SERVER_AUTH
_USES: Final = {
    mutual.WORKER: (_SERVER,),
    mutual.FRONTEND: (_CLIENT, _SERVER),
    mutual.OPERATOR: (_CLIENT,),
}
"""What each component may prove with its certificate: a worker is no client of other workers."""


@dataclass(frozen=True)
class Authority:
    """An authority with its private key, both as PEM.

    Raises ValueError when its certificate or its key is read and is not valid.
    """

    certificate: bytes
    key: bytes = field(repr=False)

    @cached_property
    def parsed(self) -> x509.Certificate:
        """The certificate."""
        return x509.load_pem_x509_certificate(self.certificate)

    @cached_property
    def signer(self) -> ec.EllipticCurvePrivateKey:
        """The key. Raises ValueError if it is not this certificate's."""
        key = serialization.load_pem_private_key(self.key, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self.parsed.public_key():
            raise ValueError("the key is not that of the certificate")
        return key


def new_authority(namespace: str, now: datetime) -> Authority:
    """An authority of its own for a namespace."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The time tells an authority from its successor, which has another key.
    name = _name(f"moe-operator {namespace} {now:%Y-%m-%dT%H:%M:%SZ}"[:64])
    public = key.public_key()
    builder = (
        _builder(name, name, public, now, AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    return Authority(_pem(builder.sign(key, hashes.SHA256())), _key_pem(key))


def issue(authority: Authority, component: str, authorities: bytes, now: datetime) -> KeyPair:
    """A certificate for a component, with a new key.

    Args:
        authority: that signs.
        component: its name in the certificate, one of `moe_api.mutual`.
        authorities: that the component trusts, as PEM.
        now: time of issue.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    public, signer = key.public_key(), authority.signer
    life = min(LIFE, authority.parsed.not_valid_after_utc - now)
    builder = (
        _builder(_name(component), authority.parsed.subject, public, now, life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USES[component]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(component)]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    return KeyPair(_pem(builder.sign(signer, hashes.SHA256())), _key_pem(key), authorities)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
