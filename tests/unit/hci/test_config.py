"""The sections of the configuration, apart from the file that they come from."""

import pytest

from hci.config import Endpoint


@pytest.mark.parametrize("text", ["127.0.0.1:1", "[::1]:65535", "host.example:7101"])
def test_endpoint_prints_as_it_was_written(text: str) -> None:
    assert str(Endpoint.parse(text)) == text
