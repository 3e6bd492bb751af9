"""Passwords of sessions, from Secrets: named ones only, read again and again.

Nothing here, nor what is made of it, shows a value: not in a log, a problem, a repr.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from api.errors import UNREADABLE
from datastore.interface import JSON, Datastore, Key, NotFoundError, StoreError

DEFAULT_NAMESPACE = "kube-system"
MAX_PASSWORD = 80  # bytes (TCP_MD5SIG_MAXKEYLEN)
_PRINTABLE = re.compile(rb"[ !#-~]*")  # what both engines, and routers, take
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SECONDS = 2.0
_SECONDS_KUBERNETES = 20.0  # many nodes ask one API server
_SECONDS_FAILED = 5.0  # until one is asked for again of which nothing is known yet

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SecretKey:
    """Where a password is: a Secret in Manx's namespace, and the key in it."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class SecretRead:
    """What a Secret holds; None if it does not exist. ``problem``: why that isn't known."""

    name: str
    values: Mapping[str, bytes] | None = field(default=None, repr=False)
    problem: str = ""


class PasswordError(Exception):
    """There is no password: the text says why, and names the Secret."""


def password_of(key: SecretKey, known: Mapping[str, SecretRead]) -> bytes:
    """The password at a key. Raises PasswordError."""
    read = known.get(key.name)
    if read is None:
        raise PasswordError(f"Secret {key.name}, which has not been read yet")
    if read.problem:
        raise PasswordError(f"Secret {key.name}, which can't be read: {read.problem}")
    if read.values is None:
        raise PasswordError(f"Secret {key.name}, which does not exist")
    if key.key not in read.values:
        raise PasswordError(f"Secret {key.name} with the key {key.key!r}")
    # an editor's newline at the end is nobody's password
    password = read.values[key.key].removesuffix(b"\n").removesuffix(b"\r")
    if not 1 <= len(password) <= MAX_PASSWORD or not _PRINTABLE.fullmatch(password):
        expected = f"1 to {MAX_PASSWORD} printable ASCII characters, none of them a double quote"
        raise PasswordError(f"Secret {key.name} with {expected}, at {key.key!r}")
    return password


def values_of(secret: JSON) -> dict[str, bytes]:
    """The values of a Secret; what is not base64 is left out."""
    found: dict[str, bytes] = {}
    data, plain = secret.get("data"), secret.get("stringData")
    for key, text in data.items() if isinstance(data, dict) else ():
        try:
            found[key] = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError, TypeError):
            continue
    for key, text in plain.items() if isinstance(plain, dict) else ():
        if isinstance(text, str):
            found[key] = text.encode()
    return found


def own_namespace() -> str:
    """MANX_NAMESPACE, else that of the pod's service account, else kube-system."""
    if named := os.environ.get("MANX_NAMESPACE"):
        return named
    try:
        return _OWN_NAMESPACE.read_text().strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE


class SecretReader:
    """A thread that reads the Secrets that are wanted, and tells ``sink`` what is different.

    While the store doesn't answer, what was read stands.
    """

    def __init__(
        self, store: Datastore, namespace: str, sink: Callable[[SecretRead], object]
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._sink = sink
        self._seconds = _SECONDS_KUBERNETES if "Secret" in store.given else _SECONDS
        self._wanted: frozenset[str] = frozenset()
        self._known: dict[str, SecretRead] = {}
        self._changed = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="secrets", daemon=True)

    def want(self, names: frozenset[str]) -> None:
        """Which Secrets to read from now on."""
        if names != self._wanted:
            self._wanted = names
            self._changed.set()
            if self._thread.ident is None:
                self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait until it has ended."""
        self._stopping = True
        self._changed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            self._changed.clear()
            wanted = self._wanted
            self._known = {name: read for name, read in self._known.items() if name in wanted}
            for name in sorted(wanted):
                try:
                    read = self._read(name)
                except Exception:
                    # a bug, in the store: keep the other Secrets going
                    _log.exception("unexpected error while reading Secret %s", name)
                    continue
                if read is not None and read != self._known.get(name):
                    self._known[name] = read
                    self._sink(read)
            failed = any(read.problem for read in self._known.values())
            seconds = min(self._seconds, _SECONDS_FAILED) if failed else self._seconds
            # not all nodes at the same moment
            pause = seconds * random.uniform(0.8, 1.2) if wanted else None
            self._changed.wait(pause)

    def _read(self, name: str) -> SecretRead | None:
        """What the store says now; None if it says nothing and something is known already."""
        key = Key("Secret", name, self._namespace)
        try:
            entry = self._store.get(key)
            if UNREADABLE in entry.value.get("spec", {}):
                raise StoreError("its stored bytes are no object", key)
        except NotFoundError:
            return SecretRead(name)
        except StoreError as error:
            before = self._known.get(name)
            if before is not None and not before.problem:
                _log.warning("Secret %s not read, its last values stand: %s", name, error)
                return None
            return SecretRead(name, problem=str(error))
        return SecretRead(name, values_of(entry.value))
