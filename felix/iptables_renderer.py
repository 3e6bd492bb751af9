"""Neutral chains → rules as ``iptables-restore`` reads them, for IPv4 and IPv6.

A fragment is all of a rule but ``-A CHAIN`` and the ownership comment: ``-i cali+ -j
cali-from-wl-dispatch``. One neutral rule becomes none (it can't match in this IP version), one
or several: iptables takes one address and 15 ports a rule, so longer lists of addresses become
constant sets and longer lists of ports several rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from api.net import V4, Net, format_address
from felix import names
from felix.chains import (
    ANY_PACKET,
    Accept,
    Action,
    Allow,
    AnyChain,
    Chain,
    ChainRule,
    ClearMarks,
    Condition,
    Deny,
    DestinationNat,
    Dispatch,
    Drop,
    Goto,
    Index,
    Jump,
    Log,
    Mark,
    MarkAndReturn,
    Masquerade,
    NoTrack,
    Reject,
    Return,
    Side,
    SourceDispatch,
    SourceNat,
    Table,
)
from felix.iptables_index import Shape, condition
from felix.iptables_matches import ConstantSet, Matches, NeverError, joined
from felix.settings import Manner
from policy.model import PortRange

LINEAR_DISPATCH = 8  # so many interfaces are compared one after the other
MAX_COMMENT = 255


@dataclass(frozen=True, slots=True)
class RenderedChain:
    """A chain's fragments and the constant sets that must exist before them."""

    fragments: tuple[str, ...]
    sets: tuple[ConstantSet, ...] = ()


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders for one table of one IP version."""

    version: int
    manner: Manner
    table: Table = Table.FILTER

    def render(self, chain: AnyChain) -> dict[str, RenderedChain]:
        """The chains it takes, by name: a ``Dispatch`` may take several, callers first."""
        match chain:
            case Dispatch():
                return self._dispatch(chain)
            case SourceDispatch():
                return self._by_source(chain)
            case Index():
                return {chain.name: self._chain(tuple(_walk(chain)))}
            case Chain():
                return {chain.name: self._chain(chain.rules)}

    def index(self, index: Index, name: str, shapes: Iterable[Shape]) -> dict[str, RenderedChain]:
        """The rules that look up an index in sets: one for each shape of its keys."""
        conditions = [
            condition(self.version, name, shape, index.side) for shape in sorted(shapes, key=str)
        ]
        fragments = self._fragments(conditions, "Many policies at once", index.action)
        return {index.name: RenderedChain(tuple(fragments))}

    def _chain(self, rules: Sequence[ChainRule]) -> RenderedChain:
        fragments: list[str] = []
        sets: dict[str, ConstantSet] = {}
        for rule in rules:
            matches = Matches(self.version)
            try:
                conditions = self._conditions(rule.condition, matches)
            except NeverError:
                continue
            fragments.extend(self._fragments(conditions, rule.comment, rule.action))
            sets.update(matches.sets)
        return RenderedChain(tuple(fragments), tuple(sets.values()))

    def _fragments(self, conditions: Iterable[str], comment: str, action: Action) -> Iterator[str]:
        for words in conditions:
            for target in self._targets(action):
                yield _join(words, comment, target)
        if isinstance(action, MarkAndReturn):
            yield _join(self._marked(action.mark), comment, "-j RETURN")

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

    def _by_source(self, dispatch: SourceDispatch) -> dict[str, RenderedChain]:
        """Many addresses: one more chain for each network of sixteen."""
        otherwise = self._chain(dispatch.otherwise)
        chains = {dispatch.name: RenderedChain(())}
        own: list[str] = []
        if len(dispatch.targets) <= LINEAR_DISPATCH:
            own += (f"-s {address} -g {goal}" for address, goal in dispatch.targets)
        else:
            room = names.MAX_CHAIN - len(dispatch.name) - 1
            for network, members in itertools.groupby(dispatch.targets, key=_around):
                child = f"{dispatch.name}-{names.digest(str(network), room)}"
                own.append(f"-s {network} -g {child}")
                fragments = (f"-s {address} -g {goal}" for address, goal in members)
                rules = (*fragments, *otherwise.fragments)
                chains[child] = RenderedChain(rules, otherwise.sets)
        chains[dispatch.name] = RenderedChain((*own, *otherwise.fragments), otherwise.sets)
        return chains

    def _conditions(self, condition: Condition, matches: Matches) -> list[str]:
        """The alternatives, any of which suffices."""
        interfaces = joined(
            f"-i {condition.in_interface.replace('*', '+')}" if condition.in_interface else "",
            f"-o {condition.out_interface.replace('*', '+')}" if condition.out_interface else "",
        )
        words: list[str] = []
        if condition.marked or condition.unmarked:
            value = self.manner.bits(condition.marked)
            words.append(_mark_match(value, value | self.manner.bits(condition.unmarked)))
        if condition.states:
            states = ",".join(state.value for state in condition.states)
            words.append(f"-m conntrack --ctstate {states}")
        if condition.to_this_host:
            words.append("-m addrtype --dst-type LOCAL")
        if condition.from_this_host is not None:
            words.append(f"-m addrtype {'' if condition.from_this_host else '! '}--src-type LOCAL")
        if condition.translated is not None:
            words.append(f"-m conntrack {'' if condition.translated else '! '}--ctstate DNAT")
        if condition.spoofed:
            words.append("-m rpfilter --validmark --invert")
        common = " ".join(words)
        if condition.packet is ANY_PACKET:  # most rules of an endpoint: there are many
            return [joined(interfaces, common)]
        packets = matches.alternatives(condition.packet, interfaces)
        return [joined(packet, common) for packet in packets]

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
                kind = "icmp" if self.version == V4 else "icmp6"
                return f"-j REJECT --reject-with {kind}-port-unreachable"
            case Return():
                return "-j RETURN"
            case Jump(chain):
                return f"-j {chain}"
            case Goto(chain):
                return f"-g {chain}"
            case ClearMarks(marks):
                return f"-j MARK --set-xmark 0x0/{self.manner.bits(marks):#x}"
            case MarkAndReturn(mark):
                return self._mark(mark)
            case Log(prefix):
                return f"-j LOG --log-prefix {quoted(prefix[:29])} --log-level 5"
            case NoTrack():
                return "-j CT --notrack"
            case Masquerade(ports):
                return joined("-j MASQUERADE", _to_ports(ports), "--random-fully")
            case SourceNat(address, ports):
                return f"-j SNAT --to-source {_translated(address, ports)} --random-fully"
            case DestinationNat(address):
                return f"-j DNAT --to-destination {_translated(address, None)}"
            case Allow() | Deny():
                raise AssertionError(f"{action}: {self._targets(action)}")

    def _mark(self, marks: Mark) -> str:
        bits = self.manner.bits(marks)
        return f"-j MARK --set-xmark {bits:#x}/{bits:#x}"

    def _marked(self, marks: Mark) -> str:
        bits = self.manner.bits(marks)
        return _mark_match(bits, bits)


def _walk(index: Index) -> Iterator[ChainRule]:
    """Its chains one after the other, until one decides."""
    decided = index.action.mark if isinstance(index.action, MarkAndReturn) else Mark.NONE
    for chain, _ in index.entries:
        yield ChainRule(Jump(chain), Condition(unmarked=decided))


def quoted(text: str) -> str:
    """``text`` as one word of a rule: what iptables-restore could misread becomes ``_``.

    In quotes where iptables-save has them.
    """
    if text.isascii() and text.replace("-", "_").isidentifier():
        return text
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


def _mark_match(value: int, mask: int) -> str:
    return f"-m mark --mark {value:#x}/{mask:#x}"


def _join(condition: str, comment: str, target: str) -> str:
    said = f"-m comment --comment {quoted(comment[:MAX_COMMENT])}" if comment else ""
    return joined(condition, said, target)


def _around(target: tuple[Net, str]) -> Net:
    """The network of sixteen that an address is in."""
    address = target[0]
    return Net(address.version, address.address & ~15, address.length - 4)


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
        # A prefix that is an interface's whole name stands alone, before its "+" takes the others.
        if group[0][0] == prefix:
            yield None, group[:1]
            del group[0]
        if len(group) == 1:
            yield None, group
        elif group:
            yield prefix, group


def _child_name(root: str, branch: str) -> str:
    """``cali-from-wl-dispatch-3f``: what the branch adds to ``cali``, hashed when too long."""
    room = names.MAX_CHAIN - len(root) - 1
    suffix = branch.removeprefix("cali")
    return f"{root}-{suffix if len(suffix) <= room else names.digest(branch, room)}"
