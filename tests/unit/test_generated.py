"""The generated code that is committed is what the `.proto` files say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_what_protoc_makes_of_the_definitions(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / ".ci" / "generate.py", "--out", tmp_path], check=True)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*")}
    committed = {
        path.relative_to(ROOT)
        for package in ("hci", "arbiter")
        for path in (ROOT / package).glob("*_pb2*.py*")
        if path.suffix in (".py", ".pyi")
    }
    assert made
    assert made == committed, "`make fix` writes them anew"
    for path in sorted(made):
        same = (tmp_path / path).read_text() == (ROOT / path).read_text()
        assert same, f"{path} is out of date: `make fix` writes it anew"
