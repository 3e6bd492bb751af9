"""``manx-cni``: the daemon, and installing the plugin on a node."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from cni.server import socket_path
from datastore.environment import Environment, configure_logging

_BIN_DIR = click.option(
    "--bin-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="/opt/cni/bin",
    show_default=True,
    help="Where the runtime looks for plugins.",
)
_CONF_DIR = click.option(
    "--conf-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="/etc/cni/net.d",
    show_default=True,
    help="Where the runtime looks for network configurations.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The CNI plugin of Manx. Settings are MANX_… environment variables: see docs/cni.md."""


@main.command()
def daemon() -> None:
    """Serve the plugin on this node, until SIGTERM."""
    try:
        environment = Environment.load()
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    configure_logging(environment, "manx-cni")
    from cni.daemon import run

    try:
        run(environment)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@_BIN_DIR
@_CONF_DIR
@click.option("--mtu", type=click.IntRange(0, 65535), default=0, help="0: what the uplink carries.")
@click.option(
    "--config",
    default="",
    metavar="JSON|@FILE",
    help="What else the configuration shall have: an object, merged into it.",
)
@click.option(
    "--chain",
    multiple=True,
    metavar="JSON|@FILE",
    help="The configuration of a plugin to run after this one; may be repeated.",
)
@click.option(
    "--usual-chain/--no-usual-chain",
    default=True,
    show_default=True,
    help="After those run portmap (host ports), where it is installed.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Stay, and put it right whenever it or a FILE changes, until SIGTERM.",
)
def install(
    bin_dir: Path,
    conf_dir: Path,
    mtu: int,
    config: str,
    chain: tuple[str, ...],
    usual_chain: bool,
    keep: bool,
) -> None:
    """Put plugin and network configuration in place for the runtime."""
    from cni import install as installer

    def once(*, quiet: bool = False) -> list[str]:
        plugins = [_text(item) for item in chain]
        if usual_chain:
            plugins += installer.usual_chain(bin_dir, plugins)
        files = installer.install(
            bin_dir, conf_dir, socket, mtu=mtu, config=_text(config), chain=plugins
        )
        for path in files:
            if not quiet:
                click.echo(f"installed {path}")
        found = installer.preferred(conf_dir)
        first = [f"{path} comes first: a runtime may use it instead" for path in found]
        return first + installer.rivals(plugins)

    try:
        environment = Environment.load()
        socket = socket_path(environment)
        warnings = once()
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if not keep:
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)
        return
    configure_logging(environment, "manx-cni")
    _keep(lambda: once(quiet=True), bin_dir, conf_dir, (config, *chain))


def _keep(
    once: Callable[[], list[str]], bin_dir: Path, conf_dir: Path, settings: Iterable[str]
) -> None:
    from cni import keeper

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
    files = [Path(item[1:]).absolute().parent for item in settings if item.startswith("@")]
    keeper.keep(once, {bin_dir, conf_dir, *files}, lambda: bool(stopped))


def _text(item: str) -> str:
    """``JSON``, or what is in ``@FILE``. Raises OSError."""
    return Path(item[1:]).read_text() if item.startswith("@") else item


@main.command()
@_BIN_DIR
@_CONF_DIR
def uninstall(bin_dir: Path, conf_dir: Path) -> None:
    """Take plugin and network configuration away again."""
    from cni import install as installer

    try:
        for path in installer.uninstall(bin_dir, conf_dir):
            click.echo(f"removed {path}")
    except OSError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
