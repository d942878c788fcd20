"""The root of every error this project raises on purpose, and those of the vocabulary.

    HciError                  one line for a person: what happened, to what, what to do
    ├── BadValue              text or a number that breaks a rule of the vocabulary
    │   ├── BadName           a node, pool or image id
    │   └── BadSize           a size or a shard size
    └── TooFewDomains         a pool cannot be placed on the nodes there are

The packages above add their own branches (`etcd.errors`, `vmstore.errors`).
"""


class HciError(Exception):
    """An expected failure. Its text is shown to a person as it is."""


class BadValue(HciError):
    """A value that breaks a rule of the vocabulary; correct it and ask again."""


class BadName(BadValue):
    """A name or an id that breaks its rule."""


class BadSize(BadValue):
    """A size that is no number, or outside its limits."""


class TooFewDomains(HciError):
    """Fewer failure domains with usable nodes than a replica set has members."""

    def __init__(self, needed: int, found: int, domain: str) -> None:
        self.needed = needed
        self.found = found
        self.domain = domain
        super().__init__(
            f"a replica set needs {needed} nodes of different {domain}s, only {found} usable; "
            f"add nodes on other {domain}s, or choose a narrower failure domain"
        )
