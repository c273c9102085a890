"""Certificates for tests: an authority, and key pairs that it signs, as in the Secrets of cert-manager."""

import asyncio
import datetime as dt
import ipaddress
import os

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def _name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class Authority:
    def __init__(self, name="test-ca"):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        signed = self._builder(self.name, self.key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.certificate = signed.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def _builder(self, subject, public):
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - dt.timedelta(minutes=5)).not_valid_after(
            now + dt.timedelta(days=1)
        )

    def pair(self, *names, common="server"):
        """The files of a Secret: tls.crt, tls.key, ca.crt."""
        key = ec.generate_private_key(ec.SECP256R1())
        given = [
            x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
            for name in names or ("127.0.0.1", "localhost")
        ]
        builder = self._builder(_name(common), key.public_key())
        builder = builder.add_extension(x509.SubjectAlternativeName(given), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)
        return {"tls.crt": certificate, "tls.key": _pem(key), "ca.crt": self.certificate}


async def refused_content(caplog):
    """Waits until a mounted folder's new content was refused; later calls wait for the next one."""
    async with asyncio.timeout(60):
        while "the last valid content stays in force" not in caplog.text:
            await asyncio.sleep(0.01)
    caplog.clear()


def mount(folder, files):
    """Writes files as the kubelet writes those of a Secret: links through ..data, which is replaced."""
    folder.mkdir(exist_ok=True)
    version = folder / f"..{os.urandom(4).hex()}"
    version.mkdir()
    for name, content in files.items():
        (version / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    link = folder / "..data.new"
    link.symlink_to(version.name)
    link.rename(folder / "..data")
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.name not in files:
            path.unlink()
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
