"""Who a client is by its certificate, what it may open, and certificates that are replaced."""

import ipaddress
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from engine import Gateway
from hci import tls
from hci.config import AccessRule, TlsConfig
from hci.errors import DaemonError
from tests.certificates import Authority
from vmstore.exports import Permission

RULES = (
    AccessRule(("CN=host*",), ("vms/*",), read_only=False),
    AccessRule(("DNS:backup.example.org", "anonymous"), ("vms/*", "iso/*"), read_only=True),
    AccessRule(("CN=host1",), ("iso/*",), read_only=False),
)


def test_identities_name_everything_that_the_certificate_says(tmp_path: Path) -> None:
    also = (
        x509.DNSName("host1.example.org"),
        x509.DNSName("host1"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.7")),
        x509.UniformResourceIdentifier("spiffe://site/host1"),
        x509.RFC822Name("ops@example.org"),
    )
    folder = Authority("site").client(tmp_path, "host1", *also)
    pem = (folder / "client-cert.pem").read_bytes()
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    assert tls.identities(der) == (
        "CN=host1",
        "DNS:host1.example.org",
        "DNS:host1",
        "IP:10.0.0.7",
        "URI:spiffe://site/host1",
        "email:ops@example.org",
    )


def test_identities_without_a_certificate_or_with_a_malformed_one() -> None:
    assert tls.identities(None) == ("anonymous",)
    assert tls.identities(b"no certificate") == ()


@pytest.mark.parametrize(
    ("names", "image", "allowed"),
    [
        (("CN=host7",), "vms/web", Permission.WRITE),
        (("CN=host7",), "iso/debian", Permission.NONE),
        (("CN=host1",), "iso/debian", Permission.WRITE),
        (("CN=x", "DNS:backup.example.org"), "vms/web", Permission.READ),
        (("CN=host1", "DNS:backup.example.org"), "vms/web", Permission.WRITE),
        (("anonymous",), "iso/debian", Permission.READ),
        (("DNS:host1",), "vms/web", Permission.NONE),
        ((), "vms/web", Permission.NONE),
    ],
)
def test_permission_is_the_most_that_a_rule_allows(
    names: tuple[str, ...], image: str, allowed: Permission
) -> None:
    assert tls.permission(names, image, RULES) is allowed


def test_permission_without_rules_is_everything() -> None:
    assert tls.permission(("CN=anyone",), "vms/web", ()) is Permission.WRITE


def credentials(folder: Path, now_s: list[float], engine: Gateway) -> tls.Credentials:
    config = TlsConfig(
        certificate=folder / "server-cert.pem",
        key=folder / "server-key.pem",
        client_ca=folder / "ca-cert.pem",
        tcp="required",
        socket="off",
        access=(),
    )
    return tls.Credentials(config, engine, lambda: now_s[0])


def test_credentials_that_do_not_fit_stop_the_start_and_keep_what_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, now_s = Authority("site").server(tmp_path / "server"), [0.0]
    engine = Gateway()
    try:
        served = credentials(folder, now_s, engine)
        served.load()
        other = Authority("other").server(tmp_path / "other")
        key = (folder / "server-key.pem").read_bytes()
        (folder / "server-key.pem").write_bytes((other / "server-key.pem").read_bytes())
        with pytest.raises(DaemonError, match="TLS cannot begin: key"):
            credentials(folder, now_s, engine).load()
        for _ in range(3):
            now_s[0] += 10
            served.look()
        assert capsys.readouterr().out.count("certificate_not_replaced") == 1
        (folder / "server-key.pem").write_bytes(key)
        now_s[0] += 10
        served.look()
        assert "certificate_replaced" in capsys.readouterr().out
        (folder / "ca-cert.pem").unlink()
        now_s[0] += 10
        served.look()
        assert "certificate_not_replaced" in capsys.readouterr().out
        with pytest.raises(DaemonError, match="ca-cert.pem"):
            credentials(folder, [time.monotonic()], engine).load()
    finally:
        engine.stop()
