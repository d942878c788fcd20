"""What commands share while one runs: the cluster that is meant, and its catalogue."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hci import config_file
from hci.config import Config

if TYPE_CHECKING:
    from vmstore.catalog import Catalog


@dataclass
class Session:
    """`given` is the file of --config, if any."""

    given: Path | None

    @cached_property
    def config(self) -> Config:
        """The configuration of the cluster that is meant. Raises ConfigError."""
        return config_file.load(config_file.find(self.given).absolute())

    @contextmanager
    def catalog(self, *, may_be_empty: bool = False) -> "Iterator[Catalog]":
        """Give the cluster's catalogue for one block.

        Raises OtherCluster; and NoCluster, unless etcd `may_be_empty`.
        """
        from hci.connect import catalog

        with catalog(self.config, may_be_empty=may_be_empty) as records:
            yield records


def of(context: typer.Context) -> Session:
    """Return the session of the command that runs."""
    session = context.find_root().obj
    assert isinstance(session, Session)
    return session
