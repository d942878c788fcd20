"""The data path, in Rust.

Mechanism only: it moves bytes, counts acknowledgements and refuses stale epochs. Who is in sync,
and what to do about a lost replica, is decided by the callers.
"""

from engine._engine import VERSION, Gateway, Node

__all__ = ["VERSION", "Gateway", "Node"]
