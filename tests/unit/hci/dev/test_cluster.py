"""The dev cluster's own times and words."""

from hci.dev import cluster
from vmstore.serving import STOP_S


def test_stop_gives_a_gateway_more_time_than_it_takes() -> None:
    # Both were 20 s: a gateway with an image that could not be flushed was always killed, just
    # before it would have ended by itself, and `hci dev stop` failed.
    assert cluster.STOP_GRACE_S >= STOP_S + 5
