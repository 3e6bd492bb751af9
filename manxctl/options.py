"""Options that several verbs share, and the datastore they all use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from api.kinds import Kind, find_kind
from datastore.environment import Environment
from datastore.interface import Datastore, StoreError
from manxctl.documents import Document, read

F = TypeVar("F", bound=Callable[..., Any])


def kind_named(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> Kind | None:
    """Callback of an argument: the kind by its plural, singular or short name, in any case."""
    try:
        return None if value is None else find_kind(value)
    except LookupError as error:
        raise click.BadParameter(str(error.args[0])) from error


def environment() -> Environment:
    """What the environment says; a usage error when it says something impossible."""
    try:
        return Environment.load()
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@contextmanager
def open_store() -> Iterator[Datastore]:
    """The datastore the environment names, closed at the end."""
    from datastore.connect import connect

    try:
        store = connect(environment().datastore)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    try:
        yield store
    finally:
        store.close()


@contextmanager
def open_kubernetes() -> Iterator[Datastore | None]:
    """The Kubernetes whose nodes and pods count, where MANX_KUBERNETES names one."""
    from datastore.connect import connect

    url = os.environ.get("MANX_KUBERNETES")
    try:
        store = connect(url) if url else None
    except ValueError as error:
        raise click.ClickException(f"MANX_KUBERNETES: {error}") from error
    try:
        yield store
    finally:
        if store is not None:
            store.close()


def file_options(*, required: bool = True) -> Callable[[F], F]:
    """``-f``, ``-R``, ``--skip-empty``, ``-n``."""

    def decorate(function: F) -> F:
        function = click.option(
            "-f",
            "--filename",
            "filenames",
            multiple=True,
            required=required,
            metavar="FILE|DIR|-",
            help="YAML or JSON with resources; a directory; or - for standard input. Repeatable.",
        )(function)
        function = click.option(
            "-R", "--recursive", is_flag=True, help="Directories with all below them."
        )(function)
        function = click.option(
            "--skip-empty", is_flag=True, help="Files without any resource are no error."
        )(function)
        return namespace_option(function)

    return decorate


def warn(text: str) -> None:
    """Tell of what is done though it is hardly meant."""
    click.echo(f"Warning: {text}", err=True)


def moving(store: Datastore) -> Iterator[str]:
    """The warning about any write to a datastore that is being moved.

    It is one even where nobody can tell: who may write one kind in one namespace may do so.
    """
    from datastore.migrate import is_locked  # with models, which a look need not load

    try:
        locked = is_locked(store)
    except StoreError as error:
        yield f"can't tell whether the datastore is locked: {error}"
        return
    if locked:
        yield (
            "the datastore is locked, because it is being moved: no program acts on this before"
            " manxctl datastore migrate unlock, and what was exported already is without it"
        )


def namespace_option(function: F) -> F:
    """``-n``."""
    return click.option(
        "-n",
        "--namespace",
        metavar="NAMESPACE",
        help="Namespace of namespaced resources that name none (default: default).",
    )(function)


def read_or_fail(
    filenames: tuple[str, ...], namespace: str | None, recursive: bool, skip_empty: bool
) -> list[Document]:
    """As ``documents.read``; no resource at all is an error, unless that may be skipped."""
    found = read(filenames, namespace, recursive=recursive)
    if not found and not skip_empty:
        raise click.ClickException(f"no resource in {', '.join(filenames)}")
    return found
