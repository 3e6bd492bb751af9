from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from datastore.connect import connect
from datastore.etcd import EtcdDatastore
from datastore.etcd_client import EtcdSettings, TlsFiles
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
        ("etcd://", "'': expected host:port"),
        ("etcd://a", "'a': expected host:port"),
        ("etcd://a:0", "'a:0': expected host:port"),
        ("etcd://a:1,", "'': expected host:port"),
        ("etcd://fd00::1:2379", r"expected host:port, .*\[fd00::1\]:2379"),
        ("etcd://user:secret@a:1", "expected host:port"),
        ("etcd://a:1/calico", "nothing but options"),
        ("etcd://a:1?ca=/a", "ca=/a is not known; expected user=NAME or timeout=SECONDS"),
        ("etcd://a:1?password=x", "password=x is not known"),
        ("etcd://a:1?timeout=never", "timeout=never: expected seconds"),
        ("etcd://a:1?user=me", "user me needs a password, in MANX_ETCD_PASSWORD"),
        ("etcds://a:1?cert=/c", "both cert and key"),
    ],
)
def test_url_that_names_no_store(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        connect(url, {})
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("etcd://a:1,b:2", {}, EtcdSettings(("a:1", "b:2"))),
        ("etcd://[fd00::1]:1/", {"MANX_ETCD_CA": "/ca"}, EtcdSettings(("[fd00::1]:1",))),
        (
            "etcds://a:1?ca=/x&timeout=2",
            {"MANX_ETCD_CA": "/ca", "MANX_ETCD_CERT": "/cert", "MANX_ETCD_KEY": "/key"},
            EtcdSettings(
                ("a:1",), tls=TlsFiles(Path("/x"), Path("/cert"), Path("/key")), timeout=2
            ),
        ),
        (
            "etcds://a:1?user=me",
            {"MANX_ETCD_USER": "you", "MANX_ETCD_PASSWORD": "secret"},
            EtcdSettings(("a:1",), tls=TlsFiles(), user="me", password="secret"),
        ),
    ],
)
def test_etcd(url: str, environment: dict[str, str], expected: EtcdSettings) -> None:
    store = connect(url, environment)
    assert isinstance(store, EtcdDatastore)
    assert store.settings == expected
    store.close()


def test_etcd_password_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    environment = {"MANX_ETCD_USER": "me", "MANX_ETCD_PASSWORD_FILE": str(file)}
    with pytest.raises(ValueError, match=r"MANX_ETCD_PASSWORD_FILE: .*: No such file"):
        connect("etcd://a:1", environment)
    file.write_text("secret\n")
    store = connect("etcd://a:1", environment)
    assert isinstance(store, EtcdDatastore)
    assert store.settings.password == "secret"
    store.close()


def test_programs_load_only_the_store_they_use() -> None:
    """gRPC and Kubernetes' client cost tens of megabytes and hundreds of milliseconds."""
    program = (
        "import sys; from datastore.connect import connect; connect('sqlite:///tmp/a.db');"
        "print([m for m in ('grpc', 'kubernetes', 'google.protobuf') if m in sys.modules])"
    )
    answer = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert answer == "[]\n"
