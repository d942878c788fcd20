"""TLS of a gateway's NBD clients: its certificate, and what a client may open by its own.

What is configured stands in `hci.config`. A client is known by what its certificate says of it,
each name with its kind before it, as in `CN=host1`, `DNS:host1.example.org`, `IP:10.0.0.7`,
`URI:spiffe://site/backup` or `email:ops@example.org`. A client without a certificate is
`anonymous`. Whether a certificate is to be believed was checked by the engine, in the handshake.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

import structlog
from cryptography import x509
from cryptography.x509.oid import NameOID

from engine import Gateway
from hci.config import AccessRule, TlsConfig
from hci.errors import DaemonError
from vmstore.exports import Permission

log = structlog.get_logger()

ANONYMOUS = "anonymous"

LOOK_S = 2.0
"""How often the certificate's files are looked at, in case they were replaced."""

_KINDS: Mapping[type[x509.GeneralName], str] = {
    x509.DNSName: "DNS",
    x509.UniformResourceIdentifier: "URI",
    x509.IPAddress: "IP",
    x509.RFC822Name: "email",
}


@lru_cache(maxsize=256)
def identities(certificate: bytes | None) -> tuple[str, ...]:
    """Return what a client is called by its certificate, in DER; nothing where it is malformed."""
    if certificate is None:
        return (ANONYMOUS,)
    try:
        found = x509.load_der_x509_certificate(certificate)
        common = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        names = [f"CN={attribute.value!s}" for attribute in common]
        try:
            extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            return tuple(names)
        for name in extension.value:
            kind = _KINDS.get(type(name))
            names += [f"{kind}:{name.value!s}"] if kind is not None else []
        return tuple(names)
    except (ValueError, TypeError, x509.DuplicateExtension) as error:
        log.warning("client_certificate_malformed", why=str(error))
        return ()


def permission(names: Sequence[str], image: str, rules: Sequence[AccessRule]) -> Permission:
    """Return the most that any rule allows a client of these names with an image.

    Without rules every client that the TLS handshake has let in may do everything.
    """
    if not rules:
        return Permission.WRITE
    allowed = Permission.NONE
    for rule in rules:
        means_client = any(fnmatchcase(name, pattern) for name in names for pattern in rule.clients)
        if means_client and any(fnmatchcase(image, pattern) for pattern in rule.images):
            allowed = max(allowed, Permission.READ if rule.read_only else Permission.WRITE)
    return allowed


class Credentials:
    """Hands a gateway's certificate, key and authorities to its engine, anew when they change.

    Connections go on with what they began with. Files are to be replaced by renaming, the key
    before the certificate: what does not fit together is tried again, and the former ones serve.
    """

    def __init__(self, config: TlsConfig, engine: Gateway, clock: Callable[[], float]) -> None:
        self._config = config
        self._engine = engine
        self._clock = clock
        self._looked_s = clock()
        self._seen: object = None
        self._complaint = ""

    def load(self) -> None:
        """Read them for the first time. Raises DaemonError, which says which cannot be used."""
        try:
            self._take()
        except (OSError, ValueError) as error:
            raise DaemonError(f"TLS cannot begin: {error}") from error

    def look(self) -> None:
        """Read them again where they were replaced. Never raises; what is wrong is logged."""
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        try:
            if self._versions() != self._seen:
                self._take()
                log.info("certificate_replaced", path=str(self._config.certificate))
            self._complaint = ""
        except (OSError, ValueError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("certificate_not_replaced", why=self._complaint)

    def _take(self) -> None:
        config = self._config
        versions = self._versions()
        authorities = config.client_ca.read_bytes() if config.client_ca is not None else None
        self._engine.set_tls(
            certificate=config.certificate.read_bytes(),
            key=config.key.read_bytes(),
            client_authorities=authorities,
        )
        self._seen = versions

    def _versions(self) -> list[tuple[int, int, int]]:
        paths = [self._config.certificate, self._config.key]
        paths += [self._config.client_ca] if self._config.client_ca is not None else []
        found = [path.stat() for path in paths]
        return [(status.st_ino, status.st_mtime_ns, status.st_size) for status in found]
