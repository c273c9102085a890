"""When authorities and certificates are renewed, and which authority signs.

A new authority comes after two thirds of the life of the last one. For a day all components only learn to
trust it; then it signs, and every certificate is issued again. The old one is trusted until it expires, so at
no time does a component meet a certificate that it cannot check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from moe_api import mutual, tls
from moe_operator.certificates.issuing import EARLY, Authority, new_authority

OVERLAP: Final = timedelta(days=1)
"""How long an authority is trusted before it signs: pods have a changed Secret within two minutes."""
_CERTIFICATE, _KEY = ".crt", ".key"


def read(files: Mapping[str, bytes]) -> tuple[Authority, ...]:
    """The authorities in a Secret, the oldest first; those that cannot be read are left out."""
    found = []
    for name in sorted(files):
        stem = name.removesuffix(_CERTIFICATE)
        authority = Authority(files[name], files.get(stem + _KEY, b""))
        if stem != name and _is_sound(authority):
            found.append(authority)
    return tuple(sorted(found, key=lambda one: one.parsed.not_valid_before_utc))


def _is_sound(authority: Authority) -> bool:
    try:
        return authority.signer is not None
    except (ValueError, TypeError):  # TypeError: the key is encrypted
        return False


def written(authorities: Sequence[Authority]) -> dict[str, bytes]:
    """The content of the Secret with these authorities, which `read` reads."""
    files = {}
    for number, authority in enumerate(authorities):
        files[f"{number}{_CERTIFICATE}"] = authority.certificate
        files[f"{number}{_KEY}"] = authority.key
    return files


def renewed(known: Sequence[Authority], namespace: str, now: datetime) -> tuple[Authority, ...]:
    """The authorities of a namespace from now on; the known ones if nothing is due.

    One that is not valid yet is not kept: a wrong clock has made it, and components refuse it.
    """
    valid = tuple(one for one in known if _is_valid(one.parsed, now))
    if valid and not _is_old(valid[-1].parsed, now):
        return valid
    return (*valid, new_authority(namespace, now))


def signing(known: Sequence[Authority], now: datetime) -> Authority:
    """The authority that signs: the newest one that components have had the time to learn of."""
    learned = [one for one in known if one.parsed.not_valid_before_utc + EARLY + OVERLAP <= now]
    return learned[-1] if learned else known[0]


def bundle(known: Sequence[Authority]) -> bytes:
    """The certificates of the authorities, as components get them."""
    return b"".join(one.certificate for one in known)


def due(files: Mapping[str, bytes], component: str, known: Sequence[Authority], now: datetime) -> str:
    """Why a component's certificate has to be issued again; empty if it has not.

    Args:
        files: of its Secret.
        component: its name in the certificate.
        known: the authorities, as `renewed` returns them.
        now: the current time.
    """
    try:
        pair = mutual.parse(files)
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        name = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        return f"its content is not valid: {error}"
    if name.get_values_for_type(x509.DNSName) != [component]:
        return f"{tls.CERTIFICATE} is not for {component}"
    if pair.authorities != bundle(known):
        return "other authorities are trusted now"
    if not _is_from(certificate, signing(known, now)):
        return "another authority signs now"
    if not _is_valid(certificate, now) or _is_old(certificate, now):
        return f"{tls.CERTIFICATE} is due for renewal"
    return ""


def _is_from(certificate: x509.Certificate, authority: Authority) -> bool:
    try:
        certificate.verify_directly_issued_by(authority.parsed)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _is_valid(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


def _is_old(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether two thirds of its life are over."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begin + (end - begin) * 2 / 3
