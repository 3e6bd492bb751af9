"""Neutral chains → rules as ``iptables-restore`` reads them, for IPv4 and IPv6.

A fragment is all of a rule but ``-A CHAIN`` and the ownership comment: ``-i cali+ -j
cali-from-wl-dispatch``. One neutral rule becomes none (it can't match in this IP version), one
or several: iptables takes one address and 15 ports a rule, so longer lists of addresses become
constant sets and longer lists of ports several rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from api.net import V4, Net, format_address
from felix import names
from felix.chains import (
    ANY_PACKET,
    Accept,
    Action,
    Allow,
    Chain,
    ChainRule,
    ClearMarks,
    Condition,
    Deny,
    DestinationNat,
    Dispatch,
    Drop,
    Goto,
    Jump,
    Log,
    Mark,
    MarkAndReturn,
    Masquerade,
    NoTrack,
    Reject,
    Return,
    Side,
    SourceNat,
    Table,
)
from felix.settings import Manner
from policy.model import Match, PortRange

ICMP = {4: 1, 6: 58}
PORT_PROTOCOLS = (6, 17, 132, 33, 136)  # TCP, UDP, SCTP, DCCP, UDP-Lite: multiport reads theirs
MULTIPORT_SLOTS = 15  # iptables-extensions(8), multiport; a range takes two
LINEAR_DISPATCH = 8  # so many interfaces are compared one after the other
MAX_COMMENT = 255


@dataclass(frozen=True, slots=True)
class ConstantSet:
    """A list of networks that rules refer to. Its id is a hash of its members: it never changes."""

    id: str
    members: tuple[Net, ...]


@dataclass(frozen=True, slots=True)
class RenderedChain:
    """A chain's fragments and the constant sets that must exist before them."""

    fragments: tuple[str, ...]
    sets: tuple[ConstantSet, ...] = ()


class NeverError(Exception):
    """The condition can't hold in this IP version: the rule is left out."""


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders for one table of one IP version."""

    version: int
    manner: Manner
    table: Table = Table.FILTER

    def render(self, chain: Chain | Dispatch) -> dict[str, RenderedChain]:
        """The chains it takes, by name: a ``Dispatch`` may take several, callers first."""
        if isinstance(chain, Dispatch):
            return self._dispatch(chain)
        return {chain.name: self._chain(chain.rules)}

    def _chain(self, rules: Sequence[ChainRule]) -> RenderedChain:
        fragments: list[str] = []
        sets: dict[str, ConstantSet] = {}
        for rule in rules:
            matches = _Matches(self.version)
            try:
                conditions = self._conditions(rule.condition, matches)
            except NeverError:
                continue
            fragments.extend(
                _join(condition, rule.comment, target)
                for condition in conditions
                for target in self._targets(rule.action)
            )
            if isinstance(rule.action, MarkAndReturn):
                marked = self._marked(rule.action.mark)
                fragments.append(_join(marked, rule.comment, "-j RETURN"))
            sets.update(matches.sets)
        return RenderedChain(tuple(fragments), tuple(sets.values()))

    def _dispatch(self, dispatch: Dispatch) -> dict[str, RenderedChain]:
        flag = "-i" if dispatch.side is Side.IN else "-o"
        otherwise = self._chain(dispatch.otherwise)
        chains: dict[str, RenderedChain] = {}

        def add(name: str, targets: Sequence[tuple[str, str]]) -> None:
            fragments: list[str] = []
            chains[name] = RenderedChain(())  # keeps callers before what they call
            for branch, members in _branches(targets):
                if branch is None:
                    fragments.extend(f"{flag} {interface} -g {goal}" for interface, goal in members)
                    continue
                child = _child_name(dispatch.name, branch)
                fragments.append(f"{flag} {branch}+ -g {child}")
                add(child, members)
            # The end of a chain reached by goto is the end of its caller too, so every chain
            # of the tree says itself what happens to the interfaces it doesn't know.
            chains[name] = RenderedChain((*fragments, *otherwise.fragments), otherwise.sets)

        add(dispatch.name, dispatch.targets)
        return chains

    def _conditions(self, condition: Condition, matches: _Matches) -> list[str]:
        """The alternatives, any of which suffices."""
        words: list[str] = []
        if condition.in_interface:
            words.append(f"-i {condition.in_interface.replace('*', '+')}")
        if condition.out_interface:
            words.append(f"-o {condition.out_interface.replace('*', '+')}")
        if condition.marked or condition.unmarked:
            value = self._bits(condition.marked)
            words.append(_mark_match(value, value | self._bits(condition.unmarked)))
        if condition.states:
            states = ",".join(state.value for state in condition.states)
            words.append(f"-m conntrack --ctstate {states}")
        if condition.to_this_host:
            words.append("-m addrtype --dst-type LOCAL")
        if condition.from_this_host:
            words.append("-m addrtype --src-type LOCAL")
        if condition.translated is not None:
            words.append(f"-m conntrack {'' if condition.translated else '! '}--ctstate DNAT")
        if condition.spoofed:
            words.append("-m rpfilter --validmark --invert")
        common = " ".join(words)
        if condition.packet is ANY_PACKET:  # most rules of an endpoint: there are many
            return [common]
        return [_words(packet, common) for packet in matches.alternatives(condition.packet)]

    def _targets(self, action: Action) -> tuple[str, ...]:
        """What the action takes, each in a rule of its own under the same condition."""
        if isinstance(action, Allow):
            returns = {
                Table.FILTER: self.manner.returns,
                Table.MANGLE: self.manner.mangle_returns,
            }
            if returns.get(self.table, False):
                return self._mark(Mark.ACCEPT), "-j RETURN"
            return ("-j ACCEPT",)
        if isinstance(action, Deny):
            refused = self.manner.rejects and self.table is Table.FILTER
            action = Reject() if refused else Drop()
        return (self._target(action),)

    def _target(self, action: Action) -> str:
        match action:
            case Accept():
                return "-j ACCEPT"
            case Drop():
                return "-j DROP"
            case Reject():
                return "-j REJECT"  # with ICMP port unreachable
            case Return():
                return "-j RETURN"
            case Jump(chain):
                return f"-j {chain}"
            case Goto(chain):
                return f"-g {chain}"
            case ClearMarks(marks):
                return f"-j MARK --set-xmark 0x0/{self._bits(marks):#x}"
            case MarkAndReturn(mark):
                return self._mark(mark)
            case Log(prefix):
                return f"-j LOG --log-prefix {quoted(prefix[:29])} --log-level 5"
            case NoTrack():
                return "-j CT --notrack"
            case Masquerade(ports):
                return _words("-j MASQUERADE", _to_ports(ports), "--random-fully")
            case SourceNat(address, ports):
                return f"-j SNAT --to-source {_translated(address, ports)} --random-fully"
            case DestinationNat(address):
                return f"-j DNAT --to-destination {_translated(address, None)}"
            case Allow() | Deny():
                raise AssertionError(f"{action}: {self._targets(action)}")

    def _mark(self, marks: Mark) -> str:
        bits = self._bits(marks)
        return f"-j MARK --set-xmark {bits:#x}/{bits:#x}"

    def _bits(self, marks: Mark) -> int:
        return (self.manner.accept if Mark.ACCEPT in marks else 0) | (
            self.manner.passed if Mark.PASS in marks else 0
        )

    def _marked(self, marks: Mark) -> str:
        bits = self._bits(marks)
        return _mark_match(bits, bits)


class _Matches:
    """Renders policy matches and collects the constant sets they need."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.sets: dict[str, ConstantSet] = {}

    def alternatives(self, match: Match) -> list[str]:
        """Fragments of which any suffices. Raises NeverError when none could."""
        if match.version is not None and match.version != self.version:
            raise NeverError
        head = _words(
            *self._icmp(match),
            *self._nets("-s", "src", match.src_nets, match.not_src_nets),
            *self._nets("-d", "dst", match.dst_nets, match.not_dst_nets),
            *self._members("src", match.src_sets, match.not_src_sets),
            *self._members("dst", match.dst_sets, match.not_dst_sets),
        )
        found: list[str] = []
        for protocol in self._protocols(match):
            source = self._ports("src", protocol, match.src_ports, match.src_named_ports)
            target = self._ports("dst", protocol, match.dst_ports, match.dst_named_ports)
            unwanted = _words(
                *self._no_ports("src", protocol, match.not_src_ports, match.not_src_named_ports),
                *self._no_ports("dst", protocol, match.not_dst_ports, match.not_dst_named_ports),
            )
            found.extend(
                _words(_protocol_words(protocol, match.not_protocol), head, unwanted, *pair)
                for pair in itertools.product(source, target)
            )
        if not found:
            raise NeverError
        return found

    def _protocols(self, match: Match) -> Sequence[int | None]:
        """The protocols to write a rule for; None for any."""
        wanted = match.protocol
        if wanted is None and _speaks_of_icmp(match):
            wanted = ICMP[self.version]
        if wanted is not None:
            return () if wanted == match.not_protocol else (wanted,)
        if _speaks_of_ports(match):
            return [number for number in PORT_PROTOCOLS if number != match.not_protocol]
        return (None,)

    def _icmp(self, match: Match) -> Iterator[str]:
        if not _speaks_of_icmp(match):
            return
        if match.protocol not in (None, ICMP[self.version]):
            raise NeverError
        kind, module = match.icmp_type, "-m icmp" if self.version == V4 else "-m icmp6"
        flag = "--icmp-type" if self.version == V4 else "--icmpv6-type"
        if kind is None and (match.icmp_code is not None or match.not_icmp_code is not None):
            raise ValueError(f"{match}: iptables knows ICMP codes only together with their type")
        if kind is not None:
            code = "" if match.icmp_code is None else f"/{match.icmp_code}"
            yield f"{module} {flag} {kind}{code}"
        if match.not_icmp_type is not None:
            yield f"{module} ! {flag} {match.not_icmp_type}"
        if match.not_icmp_code is not None:
            yield f"{module} ! {flag} {kind}/{match.not_icmp_code}"

    def _nets(
        self, flag: str, side: str, wanted: tuple[Net, ...], unwanted: tuple[Net, ...]
    ) -> Iterator[str]:
        if wanted:
            nets = self._own_version(wanted)
            if not nets:
                raise NeverError
            if any(net.length == 0 for net in nets):
                wanted = ()
            elif len(nets) == 1:
                yield f"{flag} {nets[0]}"
            else:
                yield f"-m set --match-set {self._constant(nets)} {side}"
        nets = self._own_version(unwanted)
        if any(net.length == 0 for net in nets):
            raise NeverError
        if len(nets) == 1 and not wanted:
            yield f"! {flag} {nets[0]}"
        elif nets:
            yield f"-m set ! --match-set {self._constant(nets)} {side}"

    def _members(self, side: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Iterator[str]:
        for set_id in wanted:
            yield f"-m set --match-set {names.set_name(set_id, self.version)} {side}"
        for set_id in unwanted:
            yield f"-m set ! --match-set {names.set_name(set_id, self.version)} {side}"

    def _ports(
        self, side: str, protocol: int | None, ports: Sequence[PortRange], named: Sequence[str]
    ) -> Sequence[str]:
        """The alternatives of one side's ports: ``""`` when any will do, none when none can."""
        if not ports and not named:
            return ("",)
        if protocol not in PORT_PROTOCOLS:
            return ()
        found = [f"-m multiport --{side[0]}ports {chunk}" for chunk in _chunks(ports)]
        for set_id in named:
            name = names.set_name(set_id, self.version)
            found.append(f"-m set --match-set {name} {side},{side}")
        return found

    def _no_ports(
        self, side: str, protocol: int | None, ports: Sequence[PortRange], named: Sequence[str]
    ) -> Iterator[str]:
        if protocol not in PORT_PROTOCOLS:
            return
        for chunk in _chunks(ports):
            yield f"-m multiport ! --{side[0]}ports {chunk}"
        for set_id in named:
            name = names.set_name(set_id, self.version)
            yield f"-m set ! --match-set {name} {side},{side}"

    def _own_version(self, nets: Sequence[Net]) -> list[Net]:
        return sorted({net for net in nets if net.version == self.version})

    def _constant(self, nets: Sequence[Net]) -> str:
        text = ",".join(str(net) for net in nets)
        constant = ConstantSet(f"c:{names.digest(text, 23)}", tuple(nets))
        self.sets[constant.id] = constant
        return names.set_name(constant.id, self.version)


def quoted(text: str) -> str:
    """``text`` as one word of a rule: what iptables-restore could misread becomes ``_``."""
    return (
        '"'
        + "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in text)
        + '"'
    )


def _to_ports(ports: PortRange | None) -> str:
    return f"--to-ports {ports.first}-{ports.last}" if ports else ""


def _translated(address: Net, ports: PortRange | None) -> str:
    """``192.0.2.1:1024-2047``, ``[2001:db8::1]:1024-2047``."""
    text = format_address(address.version, address.address)
    if ports is None:
        return text
    host = text if address.version == V4 else f"[{text}]"
    return f"{host}:{ports.first}-{ports.last}"


def _speaks_of_icmp(match: Match) -> bool:
    return match.icmp_type is not None or match.not_icmp_type is not None


def _speaks_of_ports(match: Match) -> bool:
    return bool(
        match.src_ports
        or match.not_src_ports
        or match.dst_ports
        or match.not_dst_ports
        or match.src_named_ports
        or match.not_src_named_ports
        or match.dst_named_ports
        or match.not_dst_named_ports
    )


def _protocol_words(wanted: int | None, unwanted: int | None) -> str:
    if wanted is not None:
        return f"-p {wanted}"
    return "" if unwanted is None else f"! -p {unwanted}"


def _mark_match(value: int, mask: int) -> str:
    return f"-m mark --mark {value:#x}/{mask:#x}"


def _chunks(ports: Sequence[PortRange]) -> Iterator[str]:
    """Lists of ports as one multiport match takes them: ``80,8000:8080``."""
    chunk: list[str] = []
    free = MULTIPORT_SLOTS
    for first, last in ports:
        slots = 1 if first == last else 2
        if slots > free:
            yield ",".join(chunk)
            chunk, free = [], MULTIPORT_SLOTS
        chunk.append(str(first) if first == last else f"{first}:{last}")
        free -= slots
    if chunk:
        yield ",".join(chunk)


def _words(*words: str) -> str:
    return " ".join(word for word in words if word)


def _join(condition: str, comment: str, target: str) -> str:
    said = f"-m comment --comment {quoted(comment[:MAX_COMMENT])}" if comment else ""
    return _words(condition, said, target)


Targets = Sequence[tuple[str, str]]


def _branches(targets: Targets) -> Iterator[tuple[str | None, Targets]]:
    """Few targets: (None, all of them). Many: one (prefix, its targets) for each next letter."""
    if len(targets) <= LINEAR_DISPATCH:
        yield None, targets
        return
    # Sorted by interface, so what the first and the last have in common all have in common.
    ends = zip(targets[0][0], targets[-1][0], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
    for prefix, members in itertools.groupby(targets, key=lambda target: target[0][: shared + 1]):
        group = list(members)
        # A prefix that is an interface's whole name stands alone; its "+" would take others.
        if len(group) == 1 or group[0][0] == prefix:
            yield None, group
        else:
            yield prefix, group


def _child_name(root: str, branch: str) -> str:
    """``cali-from-wl-dispatch-3f``: what the branch adds to ``cali``, hashed when too long."""
    room = names.MAX_CHAIN - len(root) - 1
    suffix = branch.removeprefix("cali")
    return f"{root}-{suffix if len(suffix) <= room else names.digest(branch, room)}"
