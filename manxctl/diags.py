"""What a report about a node or a cluster needs, in one tar file, with nothing secret in it.

Left out on purpose: whatever Manx does not read of Kubernetes' objects (environment variables
of pods), annotations that repeat whole objects, and what stands after a word such as
``password`` or ``token`` in logs and files.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import click

from api.errors import InvalidObjectError
from api.kinds import CALICO, KINDS
from datastore.interface import JSON, Datastore, Entry, StoreError
from manxctl.outputs import LAST_APPLIED, dumped

F = TypeVar("F", bound=Callable[..., Any])
Part = tuple[str, bytes]  # name in the archive, contents

_SECONDS = 20  # for one command
_MOST = 32 << 20  # bytes of one command's output
_LOG_END = 4 << 20  # bytes of a log
_SECRET = re.compile(
    rb"(?i)((?:pass(?:word|wd|phrase)?|secret|token|private[-_ ]?key|psk|md5[-_ ]?\w*)"
    rb"['\"]?\s*[:= ]\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s;,]+)"
)
_COMMANDS = {
    "kernel/links": "ip -d -s link show",
    "kernel/addresses": "ip address show",
    "kernel/routes-v4": "ip -4 -N route show table all",
    "kernel/routes-v6": "ip -6 -N route show table all",
    "kernel/rules-v4": "ip -4 rule show",
    "kernel/rules-v6": "ip -6 rule show",
    "kernel/nexthops": "ip nexthop show",
    "kernel/neighbours": "ip neighbour show",
    "kernel/fdb": "bridge fdb show",
    "kernel/nftables": "nft -s list ruleset",
    "kernel/iptables-v4": "iptables-save -c",
    "kernel/iptables-v6": "ip6tables-save -c",
    "kernel/iptables-legacy-v4": "iptables-legacy-save -c",
    "kernel/iptables-legacy-v6": "ip6tables-legacy-save -c",
    "kernel/ipsets": "ipset list",
    "kernel/conntrack-counters": "conntrack -S",
    "kernel/sockets": "ss -H -t -u -l -n -p",
    "kernel/bgp-sockets": "ss -H -t -n -i ( sport = 179 or dport = 179 )",
    "kernel/sysctl": "sysctl -a -r ^net\\.(ipv4|ipv6|netfilter|core)",
    "kernel/wireguard": "wg show",
    "kernel/modules": "lsmod",
    "programs": "ps -eo pid,ppid,etime,rss,comm --sort=pid",
}

output_option: Callable[[F], F] = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write (default: manx-….tar.gz in this folder).",
)


def write_archive(path: Path | None, name: str, parts: Iterable[Part]) -> Path:
    """A tar file with every part under the folder ``name``; nobody else may read it.

    A file that is there is not overwritten. Raises ClickException.
    """
    now = time.time()
    if path is None:
        stamp = datetime.fromtimestamp(now, UTC)
        path = Path(f"{name}-{stamp:%Y%m%d-%H%M%S}.tar.gz")
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error
    with file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for part, contents in parts:
            member = tarfile.TarInfo(f"{name}/{part}")
            member.size, member.mtime, member.mode = len(contents), int(now), 0o600
            archive.addfile(member, io.BytesIO(contents))
    return path


def node_parts(run_dir: Path, log_dir: Path) -> Iterator[Part]:
    """Status of the programs, the kernel's tables, ends of logs."""
    yield "versions", _versions()
    yield "status/felix.json", _asked(lambda: _felix(run_dir))
    yield "status/bgp.json", _asked(lambda: _bgp(run_dir))
    for name, command in _COMMANDS.items():
        yield f"{name}.txt", redacted(_output(command.split(" ")))
    found = [(run_dir, "run"), (log_dir, "log")]
    for directory, place in found:
        for file in sorted(directory.glob("*.log")) + sorted(directory.glob("*.conf")):
            yield f"{place}/{file.name}", redacted(_end(file))


def cluster_parts(store: Datastore) -> Iterator[Part]:
    """Every object of every kind, how addresses are used, versions."""
    yield "versions", _versions()
    for kind in KINDS.values():
        if kind.id == "Secret":
            continue
        try:
            values = [_told(entry) for entry in store.list(kind.id).entries]
        except StoreError as error:
            yield f"resources/{kind.plural}.txt", f"not to be had: {error}\n".encode()
            continue
        if values:
            whole = {"apiVersion": "v1", "kind": "List", "items": values}
            yield f"resources/{kind.plural}.yaml", dumped(whole, "yaml").encode()
    yield "ipam.txt", _asked(lambda: _addresses(store))


def redacted(text: bytes) -> bytes:
    """Without what stands after ``password``, ``token`` and the like."""
    return _SECRET.sub(rb"\1(left out)", text)


def _versions() -> bytes:
    lines = [
        f"manx {version('manx')}",
        f"python {platform.python_version()}",
        f"kernel {platform.release()} {platform.version()}",
        f"time {datetime.now(UTC).isoformat(timespec='seconds')}",
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def _asked(question: Callable[[], str]) -> bytes:
    """An answer, or why there is none: the rest of the report is wanted all the same."""
    try:
        return question().encode()
    except Exception as error:
        return f"not to be had: {type(error).__name__}: {error}\n".encode()


def _felix(run_dir: Path) -> str:
    from felix.status import query

    return json.dumps(query(run_dir), indent=2) + "\n"


def _bgp(run_dir: Path) -> str:
    from bird_glue.status import query

    return json.dumps(asdict(query(run_dir)), indent=2) + "\n"


def _addresses(store: Datastore) -> str:
    from manxctl.ipam import table_of_use

    return table_of_use(store, show_blocks=True) + "\n"


def _output(command: list[str]) -> bytes:
    shown = f"$ {' '.join(command)}\n".encode()
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return shown + b"there is no such program here\n"
    except subprocess.TimeoutExpired:
        return shown + f"no end within {_SECONDS} s\n".encode()
    return shown + done.stdout[:_MOST]


def _end(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _LOG_END))
            return stream.read(_LOG_END)
    except OSError as error:
        return f"not to be had: {error.strerror}\n".encode()


def _told(entry: Entry) -> JSON:
    """An object without secrets: of Kubernetes' kinds only what Manx reads."""
    value = entry.value
    if KINDS[entry.key.kind].api_version != CALICO:
        from api.registry import dump, parse

        try:
            value = dump(parse(value))
        except InvalidObjectError as error:
            names = {"name": entry.key.name, "namespace": entry.key.namespace}
            return {"kind": entry.key.kind, "metadata": names, "unreadable": str(error)}
    metadata = dict(value.get("metadata") or {})
    metadata.pop("managedFields", None)
    if annotations := metadata.get("annotations"):
        metadata["annotations"] = {
            key: text
            for key, text in annotations.items()
            if "projectcalico.org/" in key and key != LAST_APPLIED
        }
    return value | {"metadata": metadata}
