"""The collection in `ansible/`: what its linter says, and that its pages tell what there is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.hosts import PROJECT
from tests.deploy.playbook import PROGRAMS

COLLECTION = PROJECT / "ansible"
ROLES = sorted(path.name for path in (COLLECTION / "roles").iterdir())


def test_linter_finds_nothing_without_a_network(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "ANSIBLE_HOME": str(tmp_path),
        "NO_COLOR": "1",
    }
    install = ["ansible-galaxy", "collection", "install", str(COLLECTION)]
    subprocess.run(install, env=environment, check=True, capture_output=True)
    copy = tmp_path / "collections/ansible_collections/hci/vmstore"
    (copy / ".ansible-lint").write_text((COLLECTION / ".ansible-lint").read_text())
    done = subprocess.run(
        ["unshare", "--net", str(PROGRAMS / "ansible-lint"), "--strict"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_of_a_role_is_specified_and_described(role: str) -> None:
    folder = COLLECTION / "roles" / role

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return yaml.safe_load(path.read_text()) if path.exists() else {}

    specified = read("meta/argument_specs.yml")["argument_specs"]["main"].get("options", {})
    defaults = read("defaults/main.yml")
    page = (folder / "README.md").read_text()
    for name, default in defaults.items():
        assert name in specified, f"{name} has a default and is not specified"
        # What is computed has no default that could be said there.
        if "{{" not in str(default):
            assert specified[name]["default"] == default, name
    told = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert told == set(specified), "the table of its README"


def test_page_names_every_role_and_playbook() -> None:
    page = (COLLECTION / "README.md").read_text()
    for role in ROLES:
        assert f"roles/{role}/README.md" in page
    for playbook in (COLLECTION / "playbooks").glob("*.yml"):
        assert f"`hci.vmstore.{playbook.stem}`" in page
