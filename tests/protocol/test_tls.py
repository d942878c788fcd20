"""TLS: stock clients over it, who is let in to what, and what is refused without it.

Covers nbdinfo, nbdcopy and libnbd (GnuTLS), qemu-img and qemu-io with `tls-creds-x509`, Python's
`ssl` for TLS 1.2 and 1.3 and for what the tools do not do: plain commands where TLS is required, a
second STARTTLS, plain bytes behind STARTTLS, a handshake that stalls, certificates that are
replaced under a connection.
"""

import contextlib
import random
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography import x509

from tests.certificates import Authority
from tests.devcluster import POOL, DevCluster
from tests.protocol.raw_client import ABORT, DISCONNECT, GO, LIST, PATIENCE_S, STARTTLS, Client
from tests.protocol.settings import GATEWAY, Setting, gateway_with
from tests.waiting import until

MIB = 1 << 20
UNSUPPORTED = 0x80000001
TLS_REQUIRED = 0x80000005
INVALID = 0x80000003
POLICY = 0x80000002
READ_ONLY = 2

Run = Callable[..., str]


class Site:
    """A cluster whose gateway asks TCP clients for TLS, and clients with certificates."""

    def __init__(self, cluster: DevCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.authority = Authority("site")
        self.server = self.authority.server(folder / "server")
        self.owner = self.authority.client(folder / "owner", "owner-1")
        self.backup = self.authority.client(
            folder / "backup", "nobody", x509.DNSName("backup.example.org")
        )
        config = tomllib.loads(cluster.config.read_text())
        self.address = config["gateway"][GATEWAY]["nbd_listen"]

    def settings(self, **more: Setting) -> dict[str, Setting]:
        return {
            "certificate": str(self.server / "server-cert.pem"),
            "key": str(self.server / "server-key.pem"),
            "client_ca": str(self.server / "ca-cert.pem"),
            "access": [
                {"clients": ["CN=owner-*"], "images": [f"{POOL}/own*"]},
                {
                    "clients": ["DNS:backup.example.org"],
                    "images": [f"{POOL}/*"],
                    "read_only": True,
                },
            ],
            **more,
        }

    def uri(self, image: str, credentials: Path) -> str:
        name = quote(f"{POOL}/{image}")
        return f"nbds://{self.address}/{name}?tls-certificates={credentials}"

    def plain_uri(self, image: str) -> str:
        return f"nbd://{self.address}/{quote(f'{POOL}/{image}')}"

    def qemu(self, image: str, credentials: Path) -> tuple[str, ...]:
        host, port = self.address.split(":")
        return (
            *("--object", f"tls-creds-x509,id=tls,endpoint=client,dir={credentials}"),
            "--image-opts",
            f"driver=nbd,server.type=inet,server.host={host},server.port={port},"
            f"export={POOL}/{image},tls-creds=tls",
        )


def context(credentials: Path | None, authority: Path) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=authority / "ca-cert.pem")
    if credentials is not None:
        made.load_cert_chain(credentials / "client-cert.pem", credentials / "client-key.pem")
    return made


@pytest.fixture(scope="module")
def site(shared: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(shared, tmp_path_factory.mktemp("tls"))
    for name in ("own", "own2", "other"):
        shared.create(name, "64M")
    with gateway_with(shared, tls=found.settings()):
        yield found


def test_nbdinfo_over_tls_sees_the_export(site: Site, run: Run) -> None:
    said = run("nbdinfo", site.uri("own", site.owner))
    assert "with TLS" in said
    assert "export-size: 67108864" in said
    assert "can_multi_conn: true" in said


def test_nbdcopy_over_tls_is_equal_both_ways(site: Site, run: Run, tmp_path: Path) -> None:
    content = random.Random(5).randbytes(40 * MIB) + bytes(24 * MIB)
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(content)
    uri = site.uri("own", site.owner)
    run("nbdcopy", "--connections=4", "--flush", source, uri)
    run("nbdcopy", "--connections=4", uri, back)
    assert back.read_bytes() == content
    # The unix socket of the same gateway has no TLS, and shows the same bytes.
    run("nbdcopy", site.cluster.url("own"), back)
    assert back.read_bytes() == content


def test_qemu_over_tls_writes_and_reads_back(site: Site, run: Run) -> None:
    options = site.qemu("own2", site.owner)
    commands = ("-c", "write -P 0x5a 1 3M", "-c", "flush", "-c", "read -P 0x5a 1 3M")
    run("qemu-io", *commands, *options)
    run("qemu-io", "-f", "raw", "-c", "read -P 0x5a 1 3M", site.cluster.url("own2"))
    info = run("qemu-img", "info", "--output=json", *options)
    assert '"virtual-size": 67108864' in info


def test_client_without_tls_is_told_that_it_is_required(site: Site, run: Run) -> None:
    run("nbdinfo", site.plain_uri("own"), fails=True)
    with Client(site.plain_uri("own")) as client:
        client.greet()
        for option in (LIST, GO, 8, 9, 11, 99):
            client.option(option)
            assert client.option_reply()[:2] == (option, TLS_REQUIRED)
        client.option(ABORT)
        assert client.option_reply() == (ABORT, 1, b"")
        assert client.ended()
    with Client(site.plain_uri("own")) as client, pytest.raises(EOFError):
        client.open()


def test_client_without_a_certificate_of_the_authority_is_refused(site: Site, run: Run) -> None:
    stranger = Authority("elsewhere").client(site.folder / "stranger", "owner-1")
    # It trusts the server, but is not trusted.
    (stranger / "ca-cert.pem").write_bytes((site.server / "ca-cert.pem").read_bytes())
    run("nbdinfo", site.uri("own", stranger), fails=True)

    def comes_in(credentials: Path | None) -> None:
        with Client(site.plain_uri("own")) as client:
            client.start_tls(context(credentials, site.server))
            # With TLS 1.3 a client hears of it only with the first answer.
            client.go()

    for credentials in (None, stranger):
        with pytest.raises((OSError, EOFError)):
            comes_in(credentials)
    log = Path(site.cluster.members()[GATEWAY]["log"])
    until("it is logged", lambda: "its TLS handshake failed" in log.read_text())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_every_version_that_may_be_used_carries_requests(
    site: Site, version: ssl.TLSVersion
) -> None:
    chosen = context(site.owner, site.server)
    chosen.minimum_version = chosen.maximum_version = version
    with Client(site.plain_uri("own")) as client:
        client.start_tls(chosen)
        assert client.go()[0] == 1
        data = random.Random(6).randbytes(5 * MIB)
        client.write(3, data)
        assert client.read(3, len(data)) == data
        client.request(DISCONNECT, 9)


def test_tls_that_has_begun_does_not_begin_again(site: Site) -> None:
    with Client(site.plain_uri("own")) as client:
        client.start_tls(context(site.owner, site.server))
        client.option(STARTTLS)
        assert client.option_reply()[:2] == (STARTTLS, INVALID)
        assert client.go()[0] == 1
        assert len(client.read(0, 100)) == 100


def test_plain_bytes_behind_starttls_are_never_taken_for_the_clients(site: Site) -> None:
    # Somebody between client and server could put options there that the client never sent.
    with Client(site.plain_uri("own")) as client:
        client.greet()
        header = b"IHAVEOPT" + STARTTLS.to_bytes(4, "big") + bytes(4)
        client.send(header + b"IHAVEOPT" + LIST.to_bytes(4, "big") + bytes(4))
        assert client.ended()


def test_garbage_instead_of_a_tls_handshake_disturbs_nobody(site: Site) -> None:
    chance = random.Random(8)
    for _ in range(20):
        with Client(site.plain_uri("own")) as client, contextlib.suppress(OSError):
            client.greet()
            client.option(STARTTLS)
            client.option_reply()
            client.send(chance.randbytes(chance.randrange(1, 20_000)))
            assert client.ended()
    with Client(site.plain_uri("own")) as client:
        assert client.start_tls(context(site.owner, site.server)).go()[0] == 1


def test_tls_handshake_that_stalls_is_ended(shared: DevCluster, site: Site) -> None:
    with gateway_with(shared, tls=site.settings(), handshake_timeout="4s"):
        for said in (b"", b"\x16\x03\x01\x02\x00\x01\x00"):
            with Client(site.plain_uri("own")) as client:
                client.greet()
                client.option(STARTTLS)
                assert client.option_reply() == (STARTTLS, 1, b"")
                # The beginning of a hello, at most, whose rest never comes.
                client.send(said)
                begun = time.monotonic()
                assert client.ended()
                assert 3 < time.monotonic() - begun < PATIENCE_S
        with Client(site.plain_uri("own")) as client:
            assert client.start_tls(context(site.owner, site.server)).go()[0] == 1


def test_clients_open_what_their_certificates_allow(site: Site) -> None:
    def opened(credentials: Path, image: str) -> tuple[int, int]:
        with Client(site.plain_uri(image)) as client:
            return client.start_tls(context(credentials, site.server)).go()

    kind, flags = opened(site.owner, "own")
    assert (kind, flags & READ_ONLY) == (1, 0)
    assert opened(site.owner, "other")[0] == POLICY
    assert opened(site.owner, "not-there")[0] == POLICY, "it does not learn what there is"
    for image in ("own", "other"):
        kind, flags = opened(site.backup, image)
        assert (kind, flags & READ_ONLY) == (1, READ_ONLY)


def test_list_shows_what_the_client_may_open(site: Site) -> None:
    def listed(credentials: Path) -> set[bytes]:
        with Client(site.plain_uri("own")) as client:
            client.start_tls(context(credentials, site.server))
            client.option(LIST)
            names = set()
            while (reply := client.option_reply())[1] == 2:
                names.add(reply[2][4:])
            return names

    assert listed(site.owner) == {b"vms/own", b"vms/own2"}
    assert listed(site.backup) == {b"vms/own", b"vms/own2", b"vms/other"}


def test_certificates_are_replaced_without_dropping_connections(site: Site) -> None:
    later = Authority("later")
    with Client(site.plain_uri("own")) as before:
        before.start_tls(context(site.owner, site.server))
        assert before.go()[0] == 1
        before.write(0, b"before")
        kept = {path: path.read_bytes() for path in site.server.iterdir()}
        later.server(site.server)
        newcomer = later.client(site.folder / "newcomer", "owner-2")

        def lets_in(credentials: Path, authority: Path) -> bool:
            try:
                with Client(site.plain_uri("own")) as client:
                    client.start_tls(context(credentials, authority))
                    return client.go()[0] == 1 and client.read(0, 6) == b"before"
            except (OSError, EOFError):
                return False

        try:
            deadline = time.monotonic() + PATIENCE_S
            while not lets_in(newcomer, site.server):
                assert time.monotonic() < deadline, "the new certificate is not used"
                time.sleep(0.2)
            assert not lets_in(site.owner, site.server), "its authority counts no longer"
            assert before.read(0, 6) == b"before"
            before.write(0, b"before")
        finally:
            for path, content in kept.items():
                path.write_bytes(content)
        deadline = time.monotonic() + PATIENCE_S
        while not lets_in(site.owner, site.server):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_optional_tls_knows_clients_without_it_as_anonymous(shared: DevCluster, site: Site) -> None:
    public = {"clients": ["anonymous"], "images": [f"{POOL}/other"], "read_only": True}
    rules = site.settings()["access"]
    assert isinstance(rules, list)
    with gateway_with(shared, tls=site.settings(tcp="optional", access=[*rules, public])):
        with Client(site.plain_uri("other")) as client:
            client.greet()
            kind, flags = client.go()
            assert (kind, flags & READ_ONLY) == (1, READ_ONLY)
        with Client(site.plain_uri("own")) as client:
            client.greet()
            assert client.go()[0] == POLICY
        with Client(site.plain_uri("own")) as client:
            assert client.start_tls(context(site.owner, site.server)).go()[0] == 1


def test_each_listener_has_a_mode_of_its_own(shared: DevCluster, site: Site, run: Run) -> None:
    with gateway_with(shared, tls=site.settings(tcp="off", socket="required")):
        run("nbdinfo", shared.url("own"), fails=True)
        with Client(shared.url("own")) as client:
            client.greet()
            assert client.go()[0] == TLS_REQUIRED
        with Client(shared.url("own")) as client:
            assert client.start_tls(context(site.owner, site.server)).go()[0] == 1
        with Client(shared.url("other")) as client:
            assert client.start_tls(context(site.owner, site.server)).go()[0] == POLICY
        # Nobody is asked who he is where there is no TLS.
        assert "export-size: 67108864" in run("nbdinfo", site.plain_uri("other"))
        with Client(site.plain_uri("other")) as client:
            client.greet()
            client.option(STARTTLS)
            assert client.option_reply()[1] == UNSUPPORTED
