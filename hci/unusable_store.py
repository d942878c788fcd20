"""What a person can do about a node's store that the engine does not open.

The engine says what it found, in one sentence for each reason, and knows nothing of configurations.
"""

_ADVICE = {
    "the store belongs to": (
        "if that is another node's disk, mount this node's own or correct `data_dir`; else correct "
        "the node's name or the cluster's id in the configuration. Nothing on it was changed"
    ),
    "the store is open in another process": (
        "if this node runs already, end that process first; else give it a `data_dir` of its own"
    ),
    "which this program does not read": (
        "run the version of hci that wrote it; or give the node a new name and an empty `data_dir`"
    ),
}
"""By the words of `engine/core/src/store/errors.rs`."""


def with_advice(why: str) -> str:
    """Return what the engine said, and what to do where it did not say so itself."""
    for said, advice in _ADVICE.items():
        if said in why:
            return f"{why}; {advice}"
    return why
