"""Passwords of sessions: what is read of Secrets, and that nothing shows them."""

from __future__ import annotations

import base64
import queue
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.net import parse_net
from bird_glue.config import Neighbor, render
from bird_glue.configfile import ConfigurationFile
from bird_glue.keepsake import Keepsake
from bird_glue.secrets import (
    PasswordError,
    SecretKey,
    SecretRead,
    SecretReader,
    own_namespace,
    password_of,
    values_of,
)
from datastore.interface import Entry, Key, UnavailableError
from datastore.sqlite import SqliteDatastore

KEY = SecretKey("bgp", "tor")


def read(value: bytes) -> dict[str, SecretRead]:
    return {"bgp": SecretRead("bgp", {"tor": value})}


def test_a_password_and_its_newline() -> None:
    for value in (b"hidden", b"hidden\n", b"hidden\r\n"):
        assert password_of(KEY, read(value)) == b"hidden"
    assert password_of(KEY, read(b" it's {a};\\")) == b" it's {a};\\"


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "not been read yet"),
        ({"bgp": SecretRead("bgp")}, "does not exist"),
        ({"bgp": SecretRead("bgp", problem="forbidden")}, "can't be read: forbidden"),
        ({"bgp": SecretRead("bgp", {"other": b"x"})}, "with the key 'tor'"),
        *(
            (read(value), "with 1 to 80 printable")
            for value in (b"", b"\n", b"x" * 81, b'"', b"\xff", b"a\nb", b"\x00")
        ),
    ],
)
def test_why_there_is_none(known: dict[str, SecretRead], words: str) -> None:
    with pytest.raises(PasswordError, match=words) as caught:
        password_of(KEY, known)
    assert str(caught.value).startswith("Secret bgp")


def test_no_file_is_left_of_what_was_forgotten(tmp_path: Path) -> None:
    """Not even of a save that was cut short; another file is kept."""
    passwords, objects = (Keepsake(tmp_path / name) for name in ("bgp.passwords", "bgp.objects"))
    objects.save([{"kind": "Node"}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        passwords.save([{"value": "hidden" * 10}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "hid" in "".join(path.read_text() for path in tmp_path.iterdir())
    passwords.forget()
    assert objects.load() == [{"kind": "Node"}]
    assert [path.name for path in tmp_path.iterdir()] == ["bgp.objects"]


JSON = st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)
)


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional={"data": JSON, "stringData": JSON}))
def test_whatever_a_secret_holds(secret: dict[str, object]) -> None:
    for value in values_of(secret).values():
        assert isinstance(value, bytes)


def test_values() -> None:
    data = {"a": base64.b64encode(b"\xff").decode(), "b": "!", "c": 5, "d": "eA=="}
    assert values_of({"data": data, "stringData": {"d": "y"}}) == {"a": b"\xff", "d": b"y"}


def neighbor(password: bytes) -> Neighbor:
    peer, local = parse_net("10.0.0.1"), parse_net("10.0.0.2")
    return Neighbor(peer, local, 65001, 64512, local.address, password=password)


def test_nothing_shows_them() -> None:
    assert "hidden" not in repr(neighbor(b"hidden"))
    assert "hidden" not in repr(read(b"hidden"))


@pytest.mark.parametrize("password", [b"plain", b"deadbeef", b"\"'; {} # \\ \n\x00\xff", b"x" * 80])
def test_exabgp_takes_any(tmp_path: Path, password: bytes) -> None:
    file = ConfigurationFile(tmp_path, tmp_path / "socket")
    made = neighbor(password)
    file.want({made.address: made})
    file.write(check=True)
    assert file.rejected == {}
    text = file.path.read_text()
    assert base64.b64encode(password).decode() in text
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert render([made], tmp_path)[1] != render([neighbor(b"other")], tmp_path)[1]


class Failing:
    """A store that can be made to fail."""

    def __init__(self, store: SqliteDatastore) -> None:
        self._store = store
        self.given: frozenset[str] = frozenset()
        self.failing = False

    def get(self, key: Key) -> Entry:
        if self.failing:
            raise UnavailableError("no answer", key)
        return self._store.get(key)


def test_the_reader_tells_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bird_glue.secrets._SECONDS", 0.01)
    store = SqliteDatastore(tmp_path / "store.db")
    failing = Failing(store)
    found: queue.SimpleQueue[SecretRead] = queue.SimpleQueue()
    reader = SecretReader(failing, "here", found.put)  # type: ignore[arg-type]

    def put(value: str, namespace: str = "here") -> None:
        key = Key("Secret", "bgp", namespace)
        body = {"apiVersion": "v1", "kind": "Secret", "stringData": {"tor": value}}
        body["metadata"] = {"name": "bgp", "namespace": namespace}
        if any(entry.key == key for entry in store.list("Secret").entries):
            store.update(key, body)
        else:
            store.create(key, body)

    put("elsewhere", "there")
    try:
        failing.failing = True
        reader.want(frozenset({"bgp"}))
        assert found.get(timeout=60) == SecretRead("bgp", problem="no answer")
        failing.failing = False
        assert found.get(timeout=60) == SecretRead("bgp")
        put("hidden")
        assert found.get(timeout=60) == SecretRead("bgp", {"tor": b"hidden"})
        failing.failing = True  # what was read stands
        with pytest.raises(queue.Empty):
            found.get(timeout=0.1)
        failing.failing = False
        put("rotated")
        assert found.get(timeout=60) == SecretRead("bgp", {"tor": b"rotated"})
        store.delete(Key("Secret", "bgp", "here"))
        assert found.get(timeout=60) == SecretRead("bgp")
    finally:
        reader.stop()
        store.close()
    assert "hidden" not in caplog.text


def test_the_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MANX_NAMESPACE", raising=False)
    monkeypatch.setattr("bird_glue.secrets._OWN_NAMESPACE", tmp_path / "namespace")
    assert own_namespace() == "kube-system"
    (tmp_path / "namespace").write_text("manx\n")
    assert own_namespace() == "manx"
    monkeypatch.setenv("MANX_NAMESPACE", "other")
    assert own_namespace() == "other"
