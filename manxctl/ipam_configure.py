"""``manxctl ipam configure`` and ``split``: how addresses are given, and out of which pools."""

from __future__ import annotations

from typing import Any

import click

from api.errors import InvalidObjectError
from api.ippool import IPPool
from api.net import BITS, Net, parse_net
from api.registry import parse_as
from datastore.interface import (
    JSON,
    AlreadyExistsError,
    ConflictError,
    Datastore,
    Entry,
    Key,
    NotFoundError,
)
from datastore.migrate import is_locked
from manxctl.options import open_store

_CONFIGURATION = Key("IPAMConfiguration", "default")
_ATTEMPTS = 20
_MOST_PARTS = 1024


@click.command("configure")
@click.option(
    "--strictaffinity", type=bool, help="Whether nodes never take addresses of others' blocks."
)
@click.option(
    "--max-blocks-per-host",
    type=click.IntRange(0, 1_000_000),
    help="How many blocks a node may have; 0 means 20. Other numbers need strict affinity.",
)
@click.option(
    "--ip-cooldown-seconds",
    type=click.IntRange(0, 1200),
    help="How long an address rests after its release.",
)
def configure(
    strictaffinity: bool | None, max_blocks_per_host: int | None, ip_cooldown_seconds: int | None
) -> None:
    """Set how addresses are given; what is not named stays as it is."""
    asked = {
        "strictAffinity": strictaffinity,
        "maxBlocksPerHost": max_blocks_per_host,
        "ipCooldownSeconds": ip_cooldown_seconds,
    }
    changes = {name: value for name, value in asked.items() if value is not None}
    if not changes:
        raise click.UsageError("nothing to set; see --help")
    with open_store() as store:
        _configure(store, changes)
    for name, value in changes.items():
        click.echo(f"{name} is {str(value).lower()}")


def _configure(store: Datastore, changes: JSON) -> None:
    for _ in range(_ATTEMPTS):
        try:
            entry: Entry | None = store.get(_CONFIGURATION)
        except NotFoundError:
            entry = None
        value: JSON = {
            "apiVersion": "projectcalico.org/v3",
            "kind": "IPAMConfiguration",
            "metadata": {"name": "default"},
        }
        if entry is not None:
            value = entry.value
        value = value | {"spec": (value.get("spec") or {}) | changes}
        spec: Any = parse_as("IPAMConfiguration", value)
        if spec.spec.max_blocks_per_host and not spec.spec.strict_affinity:
            raise click.ClickException(
                f"maxBlocksPerHost {spec.spec.max_blocks_per_host} needs strict affinity: without"
                " it a node whose blocks are full takes addresses of others' blocks; add"
                " --strictaffinity=true, or set --max-blocks-per-host=0"
            )
        value["spec"].setdefault("autoAllocateBlocks", True)
        value["spec"].setdefault("strictAffinity", False)
        try:
            if entry is None:
                store.create(_CONFIGURATION, value)
            else:
                store.update(_CONFIGURATION, value, entry.revision)
        except (AlreadyExistsError, ConflictError, NotFoundError):
            continue
        return
    raise click.ClickException(f"{_CONFIGURATION}: changed by others again and again; try again")


@click.command("split")
@click.argument("parts", type=int, metavar="N")
@click.option("--cidr", help="The pool, by its CIDR.")
@click.option("--name", help="The pool, by its name.")
def split(parts: int, cidr: str | None, name: str | None) -> None:
    """Replace an IPPool by N pools of equal size, a power of two.

    Blocks and addresses in use stay. The datastore must be locked meanwhile (manxctl datastore
    migrate lock), so that nobody takes addresses of two pools at once. After an interruption,
    run it again.
    """
    if (cidr is None) == (name is None):
        raise click.UsageError("one of --cidr and --name is needed")
    if not 2 <= parts <= _MOST_PARTS or parts & (parts - 1):
        raise click.BadParameter(
            f"{parts}: expected a power of two from 2 to {_MOST_PARTS}", param_hint="N"
        )
    with open_store() as store:
        if not is_locked(store):
            raise click.ClickException(
                "the datastore is not locked; run first: manxctl datastore migrate lock"
            )
        entry, pool = _pool(store, cidr, name)
        for child in _children(entry, pool, parts):
            _create(store, child)
            click.echo(f"IPPool {child['metadata']['name']} ({child['spec']['cidr']}) created")
        store.delete(entry.key, entry.revision)
    click.echo(f"IPPool {entry.key.name} deleted")
    click.echo("still locked; when all is well: manxctl datastore migrate unlock")


def _pool(store: Datastore, cidr: str | None, name: str | None) -> tuple[Entry, IPPool]:
    wanted = None
    if cidr is not None:
        try:
            wanted = parse_net(cidr)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--cidr") from error
    there = []
    for entry in store.list("IPPool").entries:
        try:
            pool: Any = parse_as("IPPool", entry.value)
        except InvalidObjectError as error:
            if entry.key.name == name:
                raise
            there.append(str(error.title))
            continue
        if entry.key.name == name or pool.spec.net == wanted:
            return entry, pool
        there.append(f"{entry.key.name} ({pool.spec.net})")
    raise click.ClickException(f"no IPPool {name or cidr}; there are: {', '.join(there) or 'none'}")


def _children(entry: Entry, pool: IPPool, parts: int) -> list[JSON]:
    net = pool.spec.net
    length = net.length + parts.bit_length() - 1
    if length > pool.spec.block_size:
        most = 1 << (pool.spec.block_size - net.length)
        raise click.ClickException(
            f"IPPool {entry.key.name} ({net}) has blocks of /{pool.spec.block_size}: it can be"
            f" split into {most} parts at most"
        )
    size = 1 << (BITS[net.version] - length)
    metadata = entry.value["metadata"]
    kept = {key: metadata[key] for key in ("labels", "annotations") if key in metadata}
    return [
        {
            **{key: value for key, value in entry.value.items() if key != "status"},
            "metadata": {"name": f"split-{entry.key.name}-{number}"} | kept,
            "spec": entry.value["spec"]
            | {"cidr": str(Net(net.version, net.address + number * size, length))}
            | {"blockSize": pool.spec.block_size},
        }
        for number in range(parts)
    ]


def _create(store: Datastore, value: JSON) -> None:
    key = Key("IPPool", value["metadata"]["name"])
    parse_as("IPPool", value)
    try:
        store.create(key, value)
    except AlreadyExistsError:
        cidr = (store.get(key).value.get("spec") or {}).get("cidr")
        if cidr != value["spec"]["cidr"]:
            raise click.ClickException(
                f"{key} exists already, with cidr {cidr}: it is not of this split"
            ) from None
