"""``manxctl explain``: whether policy lets a flow pass, and which rule says so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import click

from api.fields import PROTOCOLS
from api.net import V4, V6, format_address
from datastore.interface import Datastore
from felix.explain import Cluster, End, Leg, Question, UnknownEndError
from felix.snapshot import KINDS
from manxctl.documents import DEFAULT_NAMESPACE
from manxctl.options import namespace_option, open_store, warn
from manxctl.outputs import dumped
from policy.evaluate import Step
from policy.model import Action, Part

_ICMP = {V4: PROTOCOLS["ICMP"], V6: PROTOCOLS["ICMPv6"]}
_ECHO = {V4: 8, V6: 128}  # requests
_PORTS = frozenset(PROTOCOLS[name] for name in ("TCP", "UDP", "SCTP", "UDPLite"))
_PARTS = {
    Part.FORWARD: " (forwarded)",
    Part.PRE_DNAT: " (preDNAT)",
    Part.UNTRACKED: " (doNotTrack)",
}


@click.command("explain")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("-p", "--port", metavar="PORT[/PROTOCOL]", help="80, 53/UDP; without it: ICMP.")
@click.option("--protocol", metavar="NAME|NUMBER", help="Of a protocol without ports.")
@click.option("--source-port", type=click.IntRange(1, 65535), metavar="PORT", help="If it matters.")
@click.option(
    "--icmp-type", type=click.IntRange(0, 254), default=None, help="Default: echo request."
)
@click.option("--icmp-code", type=click.IntRange(0, 255), default=None)
@click.option("-6", "--ipv6", is_flag=True, help="By their IPv6 addresses.")
@click.option(
    "-o", "--output", type=click.Choice(("text", "yaml", "json")), default="text", show_default=True
)
@namespace_option
def command(
    source: str,
    target: str,
    port: str | None,
    protocol: str | None,
    source_port: int | None,
    icmp_type: int | None,
    icmp_code: int | None,
    ipv6: bool,
    output: str,
    namespace: str | None,
) -> None:
    """Say whether policy lets a flow pass, and why.

    FROM and TO are pods (POD or NAMESPACE/POD), nodes, or addresses of anybody. It is
    answered from the stored objects alone, whatever node this is run on.
    """
    if port and protocol:
        raise click.UsageError("--port names the protocol too: 53/UDP")
    number, port_number = _port(port) if port else (_protocol(protocol), None)
    with open_store() as store:
        cluster = _read(store)
    for problem in cluster.problems:
        warn(problem)
    try:
        ends = [cluster.ends(text, namespace or DEFAULT_NAMESPACE) for text in (source, target)]
    except UnknownEndError as error:
        raise click.ClickException(str(error)) from error
    first, second = _same_version(ends, (source, target), V6 if ipv6 else None)
    version = first.address.version
    if number is None:
        number = _ICMP[version]
    if number == _ICMP[version] and icmp_type is None:
        icmp_type = _ECHO[version]
    question = Question(
        first, second, number, port_number, source_port, icmp_type=icmp_type, icmp_code=icmp_code
    )
    legs = cluster.explain(question)
    if output == "text":
        click.echo("\n".join(_lines(question, legs)))
    else:
        click.echo(dumped(_value(question, legs), output), nl=False)


def _read(store: Datastore) -> Cluster:
    return Cluster((entry.key, entry.value) for kind in KINDS for entry in store.list(kind).entries)


def _port(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:/(\w+))?", text)
    number = int(found[1]) if found else 0
    protocol = _number_of((found and found[2]) or "TCP")
    if not 1 <= number <= 65535 or protocol not in _PORTS:
        expected = "a port from 1 to 65535 and a protocol that has ports: 80, 53/UDP"
        raise click.BadParameter(f"{text!r}: expected {expected}", param_hint="--port")
    return protocol, number


def _protocol(text: str | None) -> int | None:
    """None: ICMP, of whatever version the addresses are."""
    if text is None:
        return None
    number = _number_of(text)
    if number is None or number in _PORTS:
        names = ", ".join(name for name, each in PROTOCOLS.items() if each not in _PORTS)
        expected = f"{names}, or a number from 1 to 255; those with ports by --port"
        raise click.BadParameter(f"{text!r}: expected {expected}", param_hint="--protocol")
    return number


def _number_of(text: str) -> int | None:
    by_name = {name.lower(): number for name, number in PROTOCOLS.items()}
    if text.isdecimal() and 1 <= int(text) <= 255:
        return int(text)
    return by_name.get(text.lower())


def _same_version(
    ends: Sequence[Sequence[End]], texts: Sequence[str], version: int | None
) -> tuple[End, End]:
    for each in (V4, V6) if version is None else (version,):
        found = [[end for end in of if end.address.version == each] for of in ends]
        if all(found):
            return found[0][0], found[1][0]
    which = "addresses of one IP version" if version is None else f"IPv{version} addresses"
    raise click.ClickException(f"{' and '.join(texts)}: expected {which} at both ends")


def _flow(question: Question) -> str:
    name = next(
        (name for name, number in PROTOCOLS.items() if number == question.protocol),
        f"protocol {question.protocol}",
    )
    port = f" port {question.port}" if question.port is not None else ""
    return f"{name} from {question.source} to {question.target}{port}"


def _lines(question: Question, legs: Sequence[Leg]) -> Iterator[str]:
    yield _flow(question)
    for leg in legs:
        yield f"\non {leg.node}:"
        place = None
        for step in leg.verdict.trace:
            here = (step.endpoint, step.direction, step.part, step.tier)
            if here != place:
                place = here
                yield f"  {_place(question, step)}"
            yield f"    {_what(step)}: {_does(step)}"
        if not leg.verdict.trace and not leg.why:
            yield "  no policy is asked"
        if leg.why:
            yield f"  {leg.why}"
        yield from (f"  note: {note}" for note in leg.notes)
    if not legs:
        yield "\nneither end is in this cluster: no policy is asked"
    yield f"\n{'Allowed' if _allowed(legs) else 'Denied'}"


def _allowed(legs: Sequence[Leg]) -> bool:
    return all(leg.allowed for leg in legs)


def _place(question: Question, step: Step) -> str:
    whose = next(
        (end.name for end in (question.source, question.target) if end.workload == step.endpoint),
        f"HostEndpoint({step.endpoint.name})",
    )
    tier = f", tier {step.tier}" if step.tier else ", profiles"
    return f"{step.direction.value} of {whose}{_PARTS.get(step.part, '')}{tier}"


def _what(step: Step) -> str:
    if step.policy is not None:
        rule = f" rule {step.rule_index}" if step.rule_index is not None else ""
        return f"{step.policy}{rule}"
    return "end of the tier" if step.tier else "end of the profiles"


def _does(step: Step) -> str:
    if step.action is None:
        return "no rule matches"
    if step.policy is not None and step.policy.is_staged:
        return f"would {step.action.value}"
    return step.action.value


def _value(question: Question, legs: Sequence[Leg]) -> dict[str, Any]:
    return {
        "source": _end(question.source),
        "target": _end(question.target),
        "protocol": question.protocol,
        "port": question.port,
        "action": (Action.ALLOW if _allowed(legs) else Action.DENY).value,
        "nodes": [
            {
                "node": leg.node,
                "action": leg.verdict.action.value,
                "reason": leg.why or None,
                "notes": list(leg.notes),
                "steps": [_step(question, step) for step in leg.verdict.trace],
            }
            for leg in legs
        ],
    }


def _end(end: End) -> dict[str, Any]:
    address = format_address(end.address.version, end.address.address)
    return {"name": end.name or None, "address": address, "node": end.node or None}


def _step(question: Question, step: Step) -> dict[str, Any]:
    policy = step.policy
    return {
        "endpoint": f"{step.endpoint.kind}({step.endpoint.name})",
        "direction": step.direction.value,
        "tier": step.tier or None,
        "policy": str(policy) if policy else None,
        "rule": step.rule_index,
        "action": step.action.value if step.action else None,
        "staged": bool(policy and policy.is_staged),
        "decides": step.decides,
    }
