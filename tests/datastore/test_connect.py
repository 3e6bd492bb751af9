from __future__ import annotations

from pathlib import Path

import pytest

from datastore.connect import connect
from tests.datastore.programs import numbered, pool_key


@pytest.mark.parametrize("slashes", ["//", "///"])
@pytest.mark.parametrize("option", ["", "?synchronous=full", "?synchronous=normal"])
def test_sqlite(tmp_path: Path, slashes: str, option: str) -> None:
    store = connect(f"sqlite:{slashes}{tmp_path}/a%20file.db{option}")
    store.create(pool_key("a"), numbered(1))
    assert (tmp_path / "a file.db").is_file()
    store.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "scheme '' is not known; expected sqlite:///absolute/path"),
        ("/var/lib/manx/datastore.db", "scheme '' is not known"),
        ("etcd3://127.0.0.1:2379", "scheme 'etcd3' is not known"),
        ("sqlite:", "absolute path"),
        ("sqlite:relative.db", "absolute path"),
        ("sqlite://host/path.db", "absolute path"),
        ("sqlite:///directory/", "absolute path"),
        ("sqlite:///a.db#b", "absolute path"),
        ("sqlite:///a.db?synchronous=off", "synchronous=off is not known"),
        ("sqlite:///a.db?mode=ro", "mode=ro is not known"),
    ],
)
def test_url_that_names_no_store(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        connect(url)
    assert repr(url) in str(caught.value)
