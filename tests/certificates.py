"""Certificates for tests: authorities, and folders as libnbd and QEMU want them."""

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = dt.timedelta(days=1)


class Authority:
    """Signs certificates."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = self._signed(
            self._name,
            self._key,
            x509.BasicConstraints(ca=True, path_length=None),
            _usage(signs_certificates=True),
        )

    def _signed(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, folder: Path, kind: str, name: str, *extensions: x509.ExtensionType) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(
            subject, key, x509.BasicConstraints(ca=False, path_length=None), _usage(), *extensions
        )
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        for file, content in (
            ("ca-cert.pem", self._certificate.public_bytes(Encoding.PEM)),
            (f"{kind}-key.pem", secret),
            (f"{kind}-cert.pem", certificate.public_bytes(Encoding.PEM)),
        ):
            part = folder / f".{file}"
            part.write_bytes(content)
            part.replace(folder / file)
        return folder

    def server(self, folder: Path) -> Path:
        """Write `ca-cert.pem`, `server-cert.pem` and `server-key.pem` for 127.0.0.1."""
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        names = x509.SubjectAlternativeName([address, x509.DNSName("localhost")])
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        return self._write(folder, "server", "gateway", names, purpose)

    def client(self, folder: Path, name: str, *also: x509.GeneralName) -> Path:
        """Write `ca-cert.pem`, `client-cert.pem` and `client-key.pem` for a client."""
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        names = [x509.SubjectAlternativeName(also)] if also else []
        return self._write(folder, "client", name, purpose, *names)


def _usage(*, signs_certificates: bool = False) -> x509.KeyUsage:
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
