"""The events that daemons log are those that docs/operations.md explains."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("arbiter", "etcd", "hci", "shard", "vmstore")
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}


def logged() -> Iterator[str]:
    """The first argument of each call of a logger; one of two where it is chosen on the spot."""
    for package in PACKAGES:
        for source in (PROJECT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in LEVELS
                    and ast.unparse(node.func.value) in ("log", "structlog.get_logger()")
                ):
                    event = node.args[0]
                    either = [event.body, event.orelse] if isinstance(event, ast.IfExp) else [event]
                    for each in either:
                        assert isinstance(each, ast.Constant), f"{source}:{node.lineno}: a constant"
                        yield str(each.value)


def test_each_event_is_documented_and_each_documented_one_exists() -> None:
    text = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = text.split("\n## Logs\n")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    told = {name for cell in first_cells for name in re.findall("`([a-z_]+)`", cell)}
    made = set(logged())
    assert len(made) > 60
    assert made == told
