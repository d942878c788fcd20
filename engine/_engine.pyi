"""Types of the Rust module. `make check` compares this file with the module, both ways."""

from typing import Final

__all__ = ["VERSION"]

VERSION: Final[str]
"""Version of the engine, the same as the distribution's."""
