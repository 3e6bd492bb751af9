"""``manxctl node``: what this node's programs say of themselves, and all of it in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from bird_glue.status import BgpStatus, PeerStatus, StatusError
from bird_glue.status import query as ask_bgp
from cni.findings import read as read_findings
from felix.status import query as ask_felix
from manxctl import table
from manxctl.diags import node_parts, output_option, write_archive
from manxctl.options import environment

TITLES = ("PEER ADDRESS", "PEER TYPE", "STATE", "SINCE", "INFO")
BGP_PORT = 179


@click.group("node")
def command() -> None:
    """Show what this node's programs do."""


@command.command("status")
@click.option(
    "-o", "--output", type=click.Choice(("table", "json")), default="table", show_default=True
)
def status(output: str) -> None:
    """Show the agent's state and the BGP sessions of this node.

    Exits with 1 when one of the programs can't be asked.
    """
    run_dir = environment().run_dir
    missing = []
    felix: dict[str, Any] | None = None
    bgp: BgpStatus | None = None
    try:
        felix = ask_felix(run_dir)
    except (OSError, ValueError) as error:
        missing.append(f"{run_dir}/felix.sock: {error}; does manx-felix run?")
    try:
        bgp = ask_bgp(run_dir)
    except StatusError as error:
        missing.append(str(error))
    cni: dict[str, Any] | None = None
    try:
        cni = read_findings(run_dir)
    except (OSError, ValueError) as error:
        missing.append(f"{error}; does manx-cni run?")
    if output == "json":
        both = {"felix": felix, "cni": cni, "bgp": None if bgp is None else asdict(bgp)}
        click.echo(json.dumps(both, indent=2, ensure_ascii=False))
    else:
        lines = [] if felix is None else list(_felix(felix))
        lines += [] if cni is None else list(_cni(cni))
        lines += [] if bgp is None else list(_bgp(bgp))
        if lines:
            click.echo("\n".join(lines))
    for complaint in missing:
        click.echo(f"Error: {complaint}", err=True)
    if missing:
        raise SystemExit(1)


@command.command("diags")
@output_option
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/var/log/manx"),
    show_default=True,
    help="Where the programs' logs are; the ends of *.log in it are taken.",
)
def diags(output: Path | None, log_dir: Path) -> None:
    """Collect status, kernel tables, logs and versions of this node in a tar file.

    Nothing secret is in it. What can't be had is noted in its place. To be run as root.
    """
    found = environment()
    told = node_parts(found.run_dir, log_dir)
    click.echo(f"wrote {write_archive(output, f'manx-node-{found.node}', told)}")


def _felix(status: dict[str, Any]) -> Iterator[str]:
    counts = ", ".join(
        f"{len(value) if isinstance(value, dict) else value} {name}"
        for name in ("endpoints", "policies")
        if (value := status.get(name)) is not None
    )
    state = "ready" if status.get("ready") else "not ready"
    if not status.get("in_sync", True):
        state += ", still reading the datastore"
    if (problem := status.get("datastore", "followed")) != "followed":
        state += f", datastore not followed: {problem}"
    yield f"felix: {state}{f' ({counts})' if counts else ''}"
    for error in status.get("errors", []):
        yield f"  {error['object']}: {error['message']}"


def _cni(found: dict[str, Any]) -> Iterator[str]:
    """What the CNI daemon found at its last look, if it ever had one."""
    findings = found.get("findings", [])
    count = f"{len(findings)} disagreements" if findings else "all agrees"
    yield f"interfaces, routes and endpoints: {count} (at {found.get('at')})"
    for finding in findings:
        yield f"  {finding['fault']}: {finding['subject']}: {finding['message']}"


def _bgp(status: BgpStatus) -> Iterator[str]:
    engine = "BIRD" if status.engine == "bird" else "ExaBGP"
    if status.pid is not None:
        state = "running on BIRD" if status.engine == "bird" else "running"
    else:
        state = f"{engine} does not run" if status.peers else "no peers to talk to"
    if not status.in_sync:
        state += ", still reading the datastore"
    if status.datastore != "followed":
        state += f", datastore not followed: {status.datastore}"
    if status.holding:
        state += ", keeps the routes of an earlier run until the peers are heard"
    blocks = ", ".join(status.blocks) or "none"
    yield f"BGP: {state} (AS {status.asn}, router ID {status.router_id}, blocks: {blocks})"
    for problem in status.problems:
        yield f"  {problem}"
    for version in (4, 6):
        peers = [peer for peer in status.peers if (":" in peer.address) == (version == 6)]
        yield ""
        if not peers:
            yield f"No IPv{version} peers"
            continue
        yield f"IPv{version} peers"
        yield table.render(TITLES, [_peer(peer) for peer in peers])
        for peer in peers:
            for why, count in peer.refused.items():
                yield f"  of {peer.address} {count} refused: {why}"


def _peer(peer: PeerStatus) -> list[str]:
    address = peer.address
    if peer.port != BGP_PORT:
        address = f"[{address}]:{peer.port}" if ":" in address else f"{address}:{peer.port}"
    info = [peer.info] if peer.info else []
    if peer.state == "Established":
        of = f" of {peer.intended}" if peer.announced < peer.intended else ""
        info.append(
            f"{peer.received} prefixes in, {peer.used} accepted, {peer.installed} installed,"
            f" {peer.announced}{of} out"
        )
    if peer.bfd:
        info.append(f"BFD {peer.bfd}")
    return [address, peer.type, peer.state, _since(peer.since), "; ".join(info)]


def _since(seconds: float) -> str:
    """The time of day, or the day when that is another."""
    moment = datetime.fromtimestamp(seconds).astimezone()
    today = datetime.now().astimezone().date()
    return f"{moment:%H:%M:%S}" if moment.date() == today else f"{moment:%Y-%m-%d}"
