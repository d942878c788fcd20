"""`.ci/bundle.py`: the same wheels make the same bundle, and what hosts cannot load is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "bundle.py"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for a `dist` of its own."""
    spec = importlib.util.spec_from_file_location("bundle", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DIST", tmp_path)
    return module


def wheel(folder: Path, name: str, content: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def test_same_wheels_make_the_same_bundle_whenever_and_by_whomever(
    bundle: ModuleType, tmp_path: Path
) -> None:
    packed = []
    for name, mode, moment in (("a", 0o600, 1), ("b", 0o755, 10**9)):
        folder = tmp_path / name
        found = [wheel(folder, "one-1.0-py3-none-any.whl", b"1"), wheel(folder, "t_o-2-x.whl")]
        for path in found:
            path.chmod(mode)
            os.utime(path, (moment, moment))
        bundle.pack(found, folder / "hci-vmstore-0.tar.gz")
        packed.append((folder / "hci-vmstore-0.tar.gz").read_bytes())
    assert packed[0] == packed[1]


def test_bundle_names_each_wheel_by_version_and_checksum(
    bundle: ModuleType, tmp_path: Path
) -> None:
    found = [wheel(tmp_path, "one-1.0-py3-none-any.whl", b"1")]
    bundle.pack(found, tmp_path / "hci-vmstore-0.tar.gz")
    with tarfile.open(tmp_path / "hci-vmstore-0.tar.gz") as archive:
        top = "hci-vmstore-0"
        assert archive.getnames() == [f"{top}/requirements.txt", f"{top}/{found[0].name}"]
        requirements = archive.extractfile(f"{top}/requirements.txt")
        assert requirements is not None
        digest = hashlib.sha256(b"1").hexdigest()
        assert requirements.read().decode() == f"one==1.0 --hash=sha256:{digest}\n"


def test_newest_wheel_of_the_version_is_taken(bundle: ModuleType, tmp_path: Path) -> None:
    older = wheel(tmp_path, "hci_vmstore-0.1.0-cp311-abi3-manylinux_2_36_x86_64.whl")
    newer = wheel(tmp_path, "hci_vmstore-0.1.0-cp311-abi3-manylinux_2_34_x86_64.whl")
    wheel(tmp_path, "hci_vmstore-0.2.0-cp311-abi3-manylinux_2_34_x86_64.whl")
    os.utime(older, (1, 1))
    os.utime(newer, (2, 2))
    assert bundle.own_wheel("0.1.0") == newer


@pytest.mark.parametrize("tag", ["manylinux_2_37_x86_64", "manylinux_3_0_x86_64", "linux_x86_64"])
def test_wheel_that_hosts_cannot_load_is_refused(
    bundle: ModuleType, tmp_path: Path, tag: str
) -> None:
    wheel(tmp_path, f"hci_vmstore-0.1.0-cp311-abi3-{tag}.whl")
    with pytest.raises(SystemExit, match="build it on Debian 12"):
        bundle.own_wheel("0.1.0")


def test_no_wheel_is_said(bundle: ModuleType) -> None:
    with pytest.raises(SystemExit, match="`make wheel` builds it"):
        bundle.own_wheel("0.1.0")
