"""The commands of ``./dev lab``. See docs/lab.md."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from api.errors import InvalidObjectError
from api.registry import problems
from lab.client import START_TIMEOUT, Lab
from lab.control import JSON
from lab.errors import LabError
from lab.fabric import Pod
from lab.fabricfile import FabricFileError, load

INTERRUPTED = 128 + signal.SIGINT  # exit status, as a shell gives it

console = Console()
if not console.is_terminal:
    console.width = 1000  # for grep and awk: a member or pod is one line
errors = Console(stderr=True)


@contextmanager
def _errors_said() -> Iterator[None]:
    """Turn the errors a user can cause or mend into a message and exit status 1; Ctrl-C, 130."""
    try:
        yield
    except KeyboardInterrupt:
        _print_error("interrupted")
        sys.exit(INTERRUPTED)
    except InvalidObjectError as error:
        _print_error(f"{error.kind} {error.name}".strip() + " is refused:")
        for problem in error.problems:
            errors.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except LabError as error:
        _print_error(error.message)
        if error.log:
            errors.print(error.log, markup=False, highlight=False, soft_wrap=True, style="dim")
        sys.exit(error.status)
    except FabricFileError as error:
        _print_error(str(error))
        sys.exit(1)


def _print_error(text: str) -> None:
    errors.print(text, markup=False, highlight=False, soft_wrap=True, style="bold red")


def _split(target: str) -> tuple[Lab, str]:
    """``[LAB:]NAME``: the lab, by default the only one, and the name in it."""
    lab, colon, name = target.rpartition(":")
    return Lab.connect(lab if colon else None), name


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Build clusters in network namespaces, from one YAML file each.

    TARGET is [LAB:]NAME: a node, router or host, or a pod as [NAMESPACE/]NAME. LAB may be
    left out while only one lab runs.
    """


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the lab; the fabric's by default.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=START_TIMEOUT,
    show_default=True,
    help="Seconds for everything in it to be ready.",
)
def up(file: Path, name: str | None, timeout: float) -> None:
    """Build the fabric in FILE and start everything in it."""
    with _errors_said():
        fabric = load(file)
        try:
            lab = Lab.up(
                fabric,
                name=name,
                keep=True,
                timeout=timeout,
                say=lambda text: console.print(text, style="dim", markup=False, highlight=False),
            )
        except KeyboardInterrupt:
            _print_error("interrupted; nothing of the lab is left")
            sys.exit(INTERRUPTED)
        console.print(f"lab {lab.name} is up; ./dev lab status, ./dev lab down {lab.name}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
def validate(file: Path) -> None:
    """Check the fabric in FILE, build nothing."""
    with _errors_said():
        fabric = load(file)
        console.print(f"{file}: fabric {fabric.name} can be built", highlight=False)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("target")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec(target: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in a node, router, host or pod; its exit status is the exit status."""
    with _errors_said():
        lab, name = _split(target)
        process = lab.popen(name, command)
    sys.exit(_wait(process))


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status as a shell gives it. Ctrl-C is for the command, not for us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = process.wait()
    return code if code >= 0 else 128 - code


@main.command()
@click.argument("target")
@click.argument("program", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as the logs grow.")
@click.option("-n", "--lines", type=int, default=50, show_default=True)
def logs(target: str, program: str | None, follow: bool, lines: int) -> None:
    """Show what the programs of a node or router, or one of them, have logged."""
    with _errors_said():
        lab, name = _split(target)
        programs = {
            member["name"]: [each["name"] for each in member["programs"]]
            for member in lab.status()["members"]
        }
        if name not in programs:
            raise LabError(f"{name!r}: expected one of {', '.join(programs)}")
        known = programs[name]
        if not known:
            raise LabError(f"no program of the lab runs in {name!r}")
        if program is not None and program not in known:
            raise LabError(f"{name}: program {program!r}: expected one of {', '.join(known)}")
        files = [f"/run/log/{each}.log" for each in known if program in (None, each)]
        process = lab.popen(name, ["tail", "-n", str(lines), *(["-F"] if follow else []), *files])
    sys.exit(_wait(process))


@main.group()
def pod() -> None:
    """Create and remove pods, as kubelet and a container runtime do."""


@pod.command("add")
@click.argument("node")
@click.argument("names", nargs=-1, required=True, metavar="[NAMESPACE/]NAME...")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE")
@click.option("--service-account", default="default", show_default=True)
@click.option("--port", "ports", multiple=True, metavar="NAME=PORT[/PROTOCOL]")
def pod_add(
    node: str,
    names: tuple[str, ...],
    labels: tuple[str, ...],
    service_account: str,
    ports: tuple[str, ...],
) -> None:
    """Create pods on a node ([LAB:]NODE)."""
    with _errors_said():
        lab, node = _split(node)
        for each in names:
            namespace, slash, name = each.rpartition("/")
            pod = _pod(
                {
                    "node": node,
                    "name": name,
                    "namespace": namespace if slash else "default",
                    "labels": dict(_pairs("--label", labels)),
                    "serviceAccountName": service_account,
                    "ports": [_port(key, value) for key, value in _pairs("--port", ports)],
                }
            )
            info = lab.add_pod(pod)
            text = f"{info.key} on {info.node}: {', '.join(info.addresses)}"
            console.print(f"{text} (ADD took {info.add_seconds * 1000:.1f} ms)", highlight=False)


@pod.command("del")
@click.argument("names", nargs=-1, required=True, metavar="[LAB:][NAMESPACE/]NAME...")
def pod_del(names: tuple[str, ...]) -> None:
    """Disconnect and remove pods."""
    with _errors_said():
        for each in names:
            lab, name = _split(each)
            lab.delete_pod(name)


def _pod(data: JSON) -> Pod:
    try:
        return Pod.model_validate(data)
    except ValidationError as error:
        raise LabError("; ".join(map(str, problems(Pod, error)))) from None


def _pairs(option: str, texts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise LabError(f"{option} {text!r}: expected KEY=VALUE")
        yield key, value


def _port(name: str, text: str) -> JSON:
    number, _, protocol = text.partition("/")
    if not number.isdecimal():
        raise LabError(f"--port {name}={text}: expected NAME=PORT[/PROTOCOL], as in http=8080/TCP")
    port: JSON = {"name": name, "containerPort": int(number)}
    return port | ({"protocol": protocol.upper()} if protocol else {})


@main.command()
@click.argument("lab", required=False)
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def status(lab: str | None, as_json: bool) -> None:
    """Show what is in a lab and how it is."""
    with _errors_said():
        found = Lab.connect(lab).status()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    console.print(_members_table(found))
    if found["pods"]:
        console.print(_pods_table(found))


def _members_table(found: JSON) -> Table:
    table = Table(title=f"Lab {found['name']}", title_justify="left", box=None)
    for column in ("NAME", "ROLE", "ADDRESSES", "PROGRAMS"):
        table.add_column(column, justify="left")
    for member in found["members"]:
        programs = ", ".join(_program_state(each) for each in member["programs"])
        addresses = ", ".join(member["addresses"])
        table.add_row(member["name"], member["role"], addresses, programs)
    return table


def _program_state(program: JSON) -> str:
    name, restarts = program["name"], program["restarts"]
    again = f" (restarts: {restarts})" if restarts else ""
    if program["pid"] is None:
        return f"[red]{name} {program['last_exit'] or 'not running'}[/]{again}"
    return f"{name}{again}" if program["ready"] else f"[yellow]{name} not ready[/]{again}"


def _pods_table(found: JSON) -> Table:
    table = Table(box=None)
    for column in ("POD", "NODE", "ADDRESSES"):
        table.add_column(column, justify="left")
    for pod in found["pods"]:
        addresses = ", ".join(pod["addresses"])
        table.add_row(f"{pod['namespace']}/{pod['name']}", pod["node"], addresses)
    return table


@main.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
def routes(targets: tuple[str, ...]) -> None:
    """Show the routes of nodes, routers, hosts or pods, and which program wrote them."""
    from lab.routing import routes as read_routes  # its netlink library takes 0.2 s to load

    table = Table(box=None)
    for column in ("AT", "DESTINATION", "VIA", "WRITTEN BY"):
        table.add_column(column, justify="left")
    with _errors_said():
        for target in targets:
            lab, name = _split(target)
            with lab.open(name) as place:
                for line in read_routes(place):
                    table.add_row(name, line.destination, "\n".join(line.via), line.writer)
    console.print(table, markup=False)


@main.command()
@click.argument("lab", required=False)
def down(lab: str | None) -> None:
    """Take a lab down; nothing of it is left."""
    with _errors_said():
        Lab.connect(lab).down()
