"""From a URL to the store it names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from datastore.interface import Datastore

_EXPECTED = "sqlite:///absolute/path, etcd://host:port,host:port or kubernetes://"
_ETCD_FILES = ("ca", "cert", "key")


def connect(url: str, env: Mapping[str, str] = os.environ) -> Datastore:
    """The store of ``url``. Nothing is opened before the first operation needs it.

    - ``sqlite:///var/lib/manx/datastore.db`` (an absolute path; four slashes also do), with
      ``?synchronous=full`` for commits that survive a power loss.
    - ``etcd://host:port,host:port``, or ``etcds://`` for TLS, with ``?ca=FILE&cert=FILE&key=FILE``,
      ``user=NAME`` and ``timeout=SECONDS``. What the URL does not say comes from
      ``MANX_ETCD_CA``, ``_CERT``, ``_KEY``, ``_USER``; the password from ``MANX_ETCD_PASSWORD``
      or the file ``MANX_ETCD_PASSWORD_FILE`` alone.
    - ``kubernetes://?kubeconfig=FILE&context=NAME``; without a file that of ``KUBECONFIG``, else
      the cluster this pod runs in, else ``~/.kube/config``.

    Raises ValueError.
    """
    parts = urlsplit(url)
    opener = _SCHEMES.get(parts.scheme)
    if opener is None:
        raise ValueError(
            f"datastore {url!r}: scheme {parts.scheme!r} is not known; expected {_EXPECTED}"
        )
    return opener(url, parts, env)


def _sqlite(url: str, parts: SplitResult, env: Mapping[str, str]) -> Datastore:
    from datastore.sqlite import SqliteDatastore
    from datastore.sqlite_file import SYNCHRONOUS

    path = unquote(parts.path)
    if parts.netloc or parts.fragment or not path.startswith("/") or path.endswith("/"):
        raise ValueError(
            f"datastore {url!r}: expected an absolute path to a file,"
            " as in sqlite:///var/lib/manx/datastore.db"
        )
    options = _options(url, parts, {"synchronous": f"synchronous={' or '.join(SYNCHRONOUS)}"})
    synchronous = options.get("synchronous", "normal")
    if synchronous not in SYNCHRONOUS:
        raise ValueError(
            f"datastore {url!r}: option synchronous={synchronous} is not known;"
            f" expected synchronous={' or '.join(SYNCHRONOUS)}"
        )
    return SqliteDatastore("/" + path.lstrip("/"), synchronous=synchronous)


def _etcd(url: str, parts: SplitResult, env: Mapping[str, str]) -> Datastore:
    from datastore.etcd import EtcdDatastore
    from datastore.etcd_client import EtcdSettings, TlsFiles

    known = {"user": "user=NAME", "timeout": "timeout=SECONDS"}
    encrypted = parts.scheme == "etcds"
    if encrypted:
        known |= {name: f"{name}=FILE" for name in _ETCD_FILES}
    options = _options(url, parts, known)
    files = {
        name: Path(text)
        for name in _ETCD_FILES
        if (text := options.get(name) or env.get(f"MANX_ETCD_{name.upper()}"))
    }
    if encrypted and ("cert" in files) != ("key" in files):
        raise ValueError(f"datastore {url!r}: a client certificate takes both cert and key")
    user = options.get("user") or env.get("MANX_ETCD_USER", "")
    password = _etcd_password(env)
    if user and not password:
        raise ValueError(
            f"datastore {url!r}: user {user} needs a password, in MANX_ETCD_PASSWORD or in the"
            " file that MANX_ETCD_PASSWORD_FILE names"
        )
    settings = EtcdSettings(
        endpoints=_endpoints(url, parts),
        tls=TlsFiles(**files) if encrypted else None,
        user=user,
        password=password,
        timeout=_seconds(url, options.get("timeout", "5")),
    )
    return EtcdDatastore(settings)


def _endpoints(url: str, parts: SplitResult) -> tuple[str, ...]:
    endpoints = tuple(parts.netloc.split(","))
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        wrong_host = not host or (":" in host and not host.startswith("["))
        if "@" in endpoint or wrong_host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"datastore {url!r}: {endpoint!r}: expected host:port, as in"
                f" {parts.scheme}://10.0.0.1:2379,10.0.0.2:2379 or {parts.scheme}://[fd00::1]:2379"
            )
    if parts.path not in ("", "/") or parts.fragment:
        raise ValueError(f"datastore {url!r}: expected nothing but options after the endpoints")
    return endpoints


def _etcd_password(env: Mapping[str, str]) -> str:
    file = env.get("MANX_ETCD_PASSWORD_FILE")
    if not file:
        return env.get("MANX_ETCD_PASSWORD", "")
    try:
        return Path(file).read_text().rstrip("\n")
    except OSError as error:
        raise ValueError(f"MANX_ETCD_PASSWORD_FILE: {file}: {error.strerror}") from error


def _seconds(url: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= 600:
        raise ValueError(f"datastore {url!r}: timeout={text}: expected seconds, at most 600")
    return seconds


def _kubernetes(url: str, parts: SplitResult, env: Mapping[str, str]) -> Datastore:
    from datastore.kubernetes import KubernetesDatastore
    from datastore.kubernetes_client import KubernetesSettings

    if parts.netloc or parts.path not in ("", "/") or parts.fragment:
        raise ValueError(
            f"datastore {url!r}: expected kubernetes:// and perhaps options:"
            " kubernetes://?kubeconfig=FILE&context=NAME"
        )
    options = _options(url, parts, {"kubeconfig": "kubeconfig=FILE", "context": "context=NAME"})
    return KubernetesDatastore(
        KubernetesSettings(
            kubeconfig=options.get("kubeconfig") or env.get("KUBECONFIG", ""),
            context=options.get("context", ""),
        )
    )


def _options(url: str, parts: SplitResult, known: Mapping[str, str]) -> dict[str, str]:
    options = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            raise ValueError(
                f"datastore {url!r}: option {name}={value} is not known;"
                f" expected {' or '.join(known.values())}"
            )
        options[name] = value
    return options


_SCHEMES: Mapping[str, Callable[[str, SplitResult, Mapping[str, str]], Datastore]] = {
    "sqlite": _sqlite,
    "etcd": _etcd,
    "etcds": _etcd,
    "kubernetes": _kubernetes,
}
