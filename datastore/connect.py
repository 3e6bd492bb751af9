"""From a URL to the store it names."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

from datastore.interface import Datastore
from datastore.sqlite import SqliteDatastore
from datastore.sqlite_file import SYNCHRONOUS


def connect(url: str) -> Datastore:
    """The store of ``url``. Nothing is opened before the first operation needs it.

    ``sqlite:///var/lib/manx/datastore.db`` (an absolute path; four slashes also do), with
    ``?synchronous=full`` for commits that survive a power loss. Raises ValueError.
    """
    parts = urlsplit(url)
    if parts.scheme != "sqlite":
        raise ValueError(
            f"datastore {url!r}: scheme {parts.scheme!r} is not known;"
            " expected sqlite:///absolute/path"
        )
    path = unquote(parts.path)
    if parts.netloc or parts.fragment or not path.startswith("/") or path.endswith("/"):
        raise ValueError(
            f"datastore {url!r}: expected an absolute path to a file,"
            " as in sqlite:///var/lib/manx/datastore.db"
        )
    synchronous = "normal"
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name != "synchronous" or value not in SYNCHRONOUS:
            raise ValueError(
                f"datastore {url!r}: option {name}={value} is not known;"
                f" expected synchronous={' or '.join(SYNCHRONOUS)}"
            )
        synchronous = value
    return SqliteDatastore("/" + path.lstrip("/"), synchronous=synchronous)
