"""``manxctl delete``: by file, or by kind and name."""

from __future__ import annotations

import click

from api.kinds import Kind
from datastore.interface import ConflictError, Datastore, Key, NotFoundError
from manxctl.documents import DEFAULT_NAMESPACE, KEEPERS, TIERED, title
from manxctl.options import file_options, kind_named, moving, open_store, read_or_fail, warn


@click.command("delete")
@click.argument("kind", required=False, callback=kind_named)
@click.argument("names", nargs=-1)
@file_options(required=False)
@click.option("--skip-not-exists", is_flag=True, help="What is absent is no error.")
@click.option("--force", is_flag=True, help="Delete an IPPool whose addresses are in use.")
def command(
    kind: Kind | None,
    names: tuple[str, ...],
    filenames: tuple[str, ...],
    recursive: bool,
    skip_empty: bool,
    namespace: str | None,
    skip_not_exists: bool,
    force: bool,
) -> None:
    """Delete the resources in files, or those of a KIND by their NAMES."""
    if bool(filenames) == bool(kind):
        raise click.UsageError("give either -f, or KIND and NAMES")
    if kind and not names:
        raise click.UsageError(f"which {kind.plural}? give at least one name")
    if kind:
        wanted = _named(kind, names, namespace or DEFAULT_NAMESPACE)
    else:
        wanted = {}
        for document in read_or_fail(filenames, namespace, recursive, skip_empty):
            if not document.key.name:
                raise click.ClickException(document.complain("metadata.name: required"))
            version = (document.value.get("metadata") or {}).get("resourceVersion")
            wanted[document.key] = None if version is None else str(version)
    failed = False
    with open_store() as store:
        for doubt in moving(store):
            warn(doubt)
        # a tier goes after the policies in it, wherever it stands in a file
        for key in sorted(wanted, key=lambda key: key.kind == "Tier"):
            complaint = _delete(store, key, wanted[key], skip_not_exists, force)
            if complaint:
                failed = True
                click.echo(f"Error: {title(key)}: {complaint}", err=True)
    if failed:
        raise SystemExit(1)


def _named(kind: Kind, names: tuple[str, ...], namespace: str) -> dict[Key, str | None]:
    return {Key(kind.id, name, namespace if kind.namespaced else ""): None for name in names}


def _delete(
    store: Datastore, key: Key, revision: str | None, skip: bool, force: bool
) -> str | None:
    """Delete and report one object; returns what stood against it."""
    if complaint := _objection(store, key):
        return complaint
    try:
        if key.kind == "IPPool":
            if complaint := _delete_pool(store, key, revision, force):
                return complaint
        else:
            store.delete(key, revision)
    except NotFoundError:
        if not skip:
            return "does not exist"
        click.echo(f"{title(key)} does not exist")
    except ConflictError:
        return f"metadata.resourceVersion: {revision!r}: it is another now; get the object again"
    else:
        click.echo(f"{title(key)} deleted")
    return None


def _delete_pool(store: Datastore, key: Key, revision: str | None, force: bool) -> str | None:
    from manxctl import pool  # with all of IPAM, which other kinds need not load

    blocks = pool.blocks(store, key.name)
    if not force and (complaint := pool.in_use(blocks)):
        return complaint
    store.delete(key, revision)  # first: nobody claims a block of a pool that is not there
    pool.give_back(store, blocks)
    return None


def _objection(store: Datastore, key: Key) -> str | None:
    if keeper := KEEPERS.get(key.kind):
        return f"not deleted by hand: {keeper}"
    if key.kind != "Tier":
        return None
    from api.policy import BUILT_IN_TIERS  # with all models, which other kinds need not load

    if key.name in BUILT_IN_TIERS:
        return "a built-in tier stays"
    inside = [
        entry.key.name
        for kind in TIERED
        for entry in store.list(kind).entries
        if (entry.value.get("spec") or {}).get("tier") == key.name
    ]
    return f"still has policies: {', '.join(inside)}" if inside else None
