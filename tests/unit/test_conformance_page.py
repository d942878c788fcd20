"""docs/nbd.md names the tests that there are: all of the protocol's, and no other ones."""

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
TESTS = PROJECT / "tests"
PAGE = PROJECT / "docs" / "nbd.md"


def named() -> set[Path]:
    """Files of tests that the page names; those without a folder are the protocol's."""
    words = re.findall(r"`(?:(\w+)/)?(test_\w+)`", PAGE.read_text())
    return {TESTS / (folder or "protocol") / f"{name}.py" for folder, name in words}


def test_page_names_every_test_of_the_protocol() -> None:
    assert set((TESTS / "protocol").glob("test_*.py")) - named() == set()


def test_page_names_no_test_that_is_not_there() -> None:
    assert {path for path in named() if not path.exists()} == set()
