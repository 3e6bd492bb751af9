"""One table of nftables: read it, and change it in transactions. See nft(8).

A transaction is carried out at one moment or not at all: no packet sees a part of it. Ours is
recognised by the table's name; whatever is in it is ours, and nothing else is touched. Speaks
netlink (linux/netfilter/nf_tables.h) on a socket that stays open: closing one after rules were
deleted waits some 16 ms.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from api.net import V4, V6
from kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    Message,
    NetlinkSocket,
    attribute,
    attribute_text,
    attributes,
    nested,
    text,
)
from kernel.nft_expressions import alike, number, uncounted
from kernel.nft_sets import (
    NftSet,
    Range,
    Target,
    bulk,
    declaration,
    key_elements,
    parse_declaration,
    parse_elements,
    parse_ranges,
    range_elements,
    verdict_elements,
)

MAX_NAME = 255  # bytes, of a chain's or a set's name
MAX_COMMENT = 253  # bytes, of a rule's comment

_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NEW_TABLE, _GET_TABLE, _DELETE_TABLE = (_SUBSYSTEM | n for n in (0, 1, 2))
_NEW_CHAIN, _GET_CHAIN, _DELETE_CHAIN = (_SUBSYSTEM | n for n in (3, 4, 5))
_NEW_RULE, _GET_RULE, _DELETE_RULE = (_SUBSYSTEM | n for n in (6, 7, 8))
_NEW_SET, _GET_SET, _DELETE_SET = (_SUBSYSTEM | n for n in (9, 10, 11))
_NEW_ELEMENTS, _GET_ELEMENTS, _DELETE_ELEMENTS = (_SUBSYSTEM | n for n in (12, 13, 14))
_GET_GENERATION = _SUBSYSTEM | 16
_BATCH_BEGIN = 0x10
_BATCH_END = 0x11

_NLM_F_APPEND = 0x800

_TABLE_NAME, _TABLE_FLAGS = 1, 2
_DORMANT = 1  # NFT_TABLE_F_DORMANT
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 4, 7
_SET_NAME = 2  # of a set, and in a list of elements
_COMMENT = 0  # NFTNL_UDATA_RULE_COMMENT
_GENERATION_ID = 1

_FAMILIES = {V4: 2, V6: 10}
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_HOOK_NAMES = {code: name for name, code in _HOOKS.items()}
_POLICIES = {"drop": 0, "accept": 1}  # NF_DROP, NF_ACCEPT
_POLICY_NAMES = {code: name for name, code in _POLICIES.items()}

# One transaction is one datagram.
_SEND_BUFFER = 256 << 20


class NftablesError(OSError):
    """The kernel refused a transaction; nothing of it is in force.

    ``refused`` says which objects were at fault: (object, what the kernel says).
    """

    def __init__(self, code: int, table: str, refused: tuple[tuple[str, str], ...]) -> None:
        shown = "; ".join(f"{what}: {why}" for what, why in refused[:3])
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        super().__init__(code, f"nftables {table}: {shown}{more}")
        self.refused = refused


@dataclass(frozen=True, slots=True)
class BaseChain:
    """Where the kernel hands packets to a chain. ``kind`` is ``filter``, ``nat`` or ``route``.

    ``hook`` is as nft(8) writes it; lower priorities come first. ``policy``, ``accept`` or
    ``drop``, is what becomes of packets that meet the chain's end.
    """

    kind: str
    hook: str
    priority: int
    policy: str = "accept"


@dataclass(frozen=True, slots=True)
class NftRule:
    """A rule: its expressions (``kernel.nft_expressions``), and a comment that listings show."""

    expressions: bytes
    comment: str = ""


@dataclass(frozen=True, slots=True)
class ChainState:
    """A chain in the kernel: its hook if it has one, and its rules in order, as it tells them."""

    base: BaseChain | None
    rules: tuple[NftRule, ...]

    def is_as(self, sent: ChainState) -> bool:
        """Whether it is the chain that was sent, however the kernel writes it."""
        return (
            self.base == sent.base
            and len(self.rules) == len(sent.rules)
            and all(
                told.comment == rule.comment and alike(rule.expressions, told.expressions)
                for told, rule in zip(self.rules, sent.rules, strict=True)
            )
        )


@dataclass(frozen=True, slots=True)
class TableState:
    """What is in a table, but the elements of sets.

    ``exists``: it is there; ``dormant``: but no packet sees it.
    """

    chains: Mapping[str, ChainState]
    sets: Mapping[str, NftSet]
    exists: bool = True
    dormant: bool = False


@dataclass(slots=True)
class Transaction:
    """Changes to a table, in order: what is referred to must be there before what refers to it."""

    version: int
    table: str
    messages: list[Message] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)
    _prefix: bytes = field(init=False)

    def __post_init__(self) -> None:
        self._prefix = _preamble(self.version) + attribute_text(_TABLE_NAME, self.table)

    def __bool__(self) -> bool:
        return bool(self.messages)

    def create_table(self) -> None:
        """``add table``; one that is there stays, and is dormant no more."""
        self._add(_NEW_TABLE, NLM_F_CREATE, number(_TABLE_FLAGS, 0), f"table {self.table}")

    def delete_table(self) -> None:
        """``delete table``, with all that is in it."""
        self._add(_DELETE_TABLE, 0, b"", f"table {self.table}")

    def create_chain(self, name: str, base: BaseChain | None = None) -> None:
        """``add chain``; one that is there and alike stays."""
        body = attribute_text(_CHAIN_NAME, name)
        if base is not None:
            hook = number(_HOOK_NUMBER, _HOOKS[base.hook]) + number(_HOOK_PRIORITY, base.priority)
            body += nested(_CHAIN_HOOK, hook) + number(_CHAIN_POLICY, _POLICIES[base.policy])
            body += attribute_text(_CHAIN_TYPE, base.kind)
        self._add(_NEW_CHAIN, NLM_F_CREATE, body, f"chain {name}")

    def delete_chain(self, name: str) -> None:
        """``delete chain``; it must be empty and nothing may refer to it."""
        self._add(_DELETE_CHAIN, 0, attribute_text(_CHAIN_NAME, name), f"chain {name}")

    def flush_chain(self, name: str) -> None:
        """``flush chain``: its rules go."""
        self._add(_DELETE_RULE, 0, attribute_text(_RULE_CHAIN, name), f"chain {name}")

    def append_rules(self, chain: str, rules: Iterable[NftRule]) -> None:
        """``add rule``, one after the other."""
        named = attribute_text(_RULE_CHAIN, chain)
        for rule in rules:
            body = named + nested(_RULE_EXPRESSIONS, rule.expressions)
            if rule.comment:
                comment = rule.comment.encode()[:MAX_COMMENT] + b"\0"
                body += attribute(_RULE_USERDATA, bytes((_COMMENT, len(comment))) + comment)
            self._add(_NEW_RULE, NLM_F_CREATE | _NLM_F_APPEND, body, f"chain {chain}")

    def create_set(self, wanted: NftSet) -> None:
        """``add set`` or ``add map``; one that is there and alike stays."""
        identity = len(self.messages) + 1
        body = declaration(wanted, identity)
        self._add(_NEW_SET, NLM_F_CREATE, body, f"set {wanted.name}")

    def delete_set(self, name: str) -> None:
        """``delete set``; no rule may refer to it."""
        self._add(_DELETE_SET, 0, attribute_text(_SET_NAME, name), f"set {name}")

    def flush_set(self, name: str) -> None:
        """``flush set``: its elements go."""
        self._add(_DELETE_ELEMENTS, 0, attribute_text(_SET_NAME, name), f"set {name}")

    def add_keys(self, set_name: str, keys: Iterable[bytes]) -> None:
        """``add element`` to a plain set; one that is there stays."""
        self._elements(_NEW_ELEMENTS, set_name, key_elements(keys))

    def delete_keys(self, set_name: str, keys: Iterable[bytes]) -> None:
        """``delete element`` of a plain set or a map; one that isn't there is an error."""
        self._elements(_DELETE_ELEMENTS, set_name, key_elements(keys))

    def add_ranges(self, set_name: str, ranges: Iterable[Range]) -> None:
        """``add element`` to a set of ranges; one that overlaps another is an error."""
        self._elements(_NEW_ELEMENTS, set_name, range_elements(ranges))

    def delete_ranges(self, set_name: str, ranges: Iterable[Range]) -> None:
        """``delete element``: exactly these ranges; one that isn't there is an error."""
        self._elements(_DELETE_ELEMENTS, set_name, range_elements(ranges))

    def add_targets(self, map_name: str, targets: Mapping[bytes, Target]) -> None:
        """``add element`` to a verdict map; a key that says something else is an error."""
        self._elements(_NEW_ELEMENTS, map_name, verdict_elements(targets))

    def _elements(self, kind: int, set_name: str, elements: Iterable[bytes]) -> None:
        flags = NLM_F_CREATE if kind == _NEW_ELEMENTS else 0
        for body in bulk(set_name, elements):
            self._add(kind, flags, body, f"set {set_name}")

    def _add(self, kind: int, flags: int, body: bytes, subject: str) -> None:
        self.messages.append(Message(kind, flags, self._prefix + body))
        self.subjects.append(subject)


class Nftables:
    """The table ``name`` of one IP version, in one network namespace.

    That of the calling thread, unless ``netns_fd`` names another. For one thread at a time.
    """

    def __init__(self, version: int, name: str, *, netns_fd: int | None = None) -> None:
        self.version = version
        self.name = name
        self._socket = NetlinkSocket(NETLINK_NETFILTER, netns_fd=netns_fd, send_buffer=_SEND_BUFFER)
        self._named = attribute_text(_TABLE_NAME, name)
        self._head = _preamble(version)
        self.commits = 0  # transactions that were carried out

    def __str__(self) -> str:
        return f"{'ip' if self.version == V4 else 'ip6'} {self.name}"

    @property
    def port(self) -> int:
        """The number by which ``kernel.nft_monitor`` knows this one's changes."""
        return self._socket.port

    def __enter__(self) -> Nftables:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket. What is in the kernel stays."""
        self._socket.close()

    def transaction(self) -> Transaction:
        """An empty transaction."""
        return Transaction(self.version, self.name)

    def commit(self, transaction: Transaction) -> None:
        """Carry out the transaction. Raises NftablesError; then nothing was done."""
        if not transaction:
            return
        begin = Message(_BATCH_BEGIN, 0, _BATCH_HEADER)
        end = Message(_BATCH_END, 0, _BATCH_HEADER)
        failures = self._socket.atomic([begin, *transaction.messages, end])
        if not failures:
            self.commits += 1
            return
        subjects = [str(self), *transaction.subjects, str(self)]
        refused = tuple((subjects[failure.index], failure.message) for failure in failures)
        raise NftablesError(failures[0].errno, str(self), refused)

    def generation(self) -> int:
        """The number of the last transaction of anybody, in this network namespace."""
        answer = self._socket.request(Message(_GET_GENERATION, 0, _preamble(0)))
        return int.from_bytes(attributes(answer, 4)[_GENERATION_ID], "big")

    def exists(self) -> bool:
        """Whether the table is there."""
        return self._table() is not None

    def dormant(self) -> bool:
        """Whether it is there, but no packet sees it (``flags dormant``)."""
        found = self._table() or {}
        return int.from_bytes(found.get(_TABLE_FLAGS, b""), "big") & _DORMANT != 0

    def read(self) -> TableState:
        """The chains and sets of the table; none if it is not there."""
        if not self.exists():
            return TableState({}, {}, exists=False)
        rules = self._rules()
        chains: dict[str, ChainState] = {}
        for found in self._dump(_GET_CHAIN):
            name = text(found[_CHAIN_NAME])
            chains[name] = ChainState(_parse_base(found), tuple(rules.get(name, ())))
        sets = [parse_declaration(found) for found in self._dump(_GET_SET)]
        return TableState(chains, {each.name: each for each in sets}, dormant=self.dormant())

    def keys(self, set_name: str) -> set[bytes]:
        """The elements of a plain set.

        Raises FileNotFoundError without such a set, ForeignElementError.
        """
        return {raw for raw, _, _ in parse_elements(self._element_bodies(set_name))}

    def ranges(self, set_name: str) -> set[Range]:
        """The elements of a set of ranges. Raises as ``keys`` does."""
        return parse_ranges(parse_elements(self._element_bodies(set_name)))

    def targets(self, map_name: str) -> dict[bytes, Target]:
        """The elements of a verdict map. Raises as ``keys`` does."""
        found = parse_elements(self._element_bodies(map_name))
        return {raw: target for raw, _, target in found if target is not None}

    def _table(self) -> dict[int, bytes] | None:
        try:
            found = self._socket.request(Message(_GET_TABLE, 0, self._head + self._named))
        except FileNotFoundError:
            return None
        return attributes(found, 4)

    def _rules(self) -> dict[str, list[NftRule]]:
        """All rules by chain, in order."""
        rules: dict[str, list[NftRule]] = {}
        for found in self._dump(_GET_RULE):
            comment = _parse_comment(found.get(_RULE_USERDATA, b""))
            rule = NftRule(uncounted(found.get(_RULE_EXPRESSIONS, b"")), comment)
            rules.setdefault(text(found[_RULE_CHAIN]), []).append(rule)
        return rules

    def _dump(self, kind: int) -> list[dict[int, bytes]]:
        """What a dump tells of this table; the kernel may tell of others, too."""
        bodies = self._socket.dump(Message(kind, 0, self._head + self._named))
        parsed = [attributes(body, 4) for body in bodies if body[0] == _FAMILIES[self.version]]
        return [found for found in parsed if text(found[_TABLE_NAME]) == self.name]

    def _element_bodies(self, set_name: str) -> list[bytes]:
        body = self._head + self._named + attribute_text(_SET_NAME, set_name)
        return self._socket.dump(Message(_GET_ELEMENTS, 0, body))


def _preamble(version: int) -> bytes:
    """struct nfgenmsg: family, version, resource id."""
    return bytes((_FAMILIES.get(version, 0), 0, 0, 0))


# The resource id of a batch is the subsystem.
_BATCH_HEADER = struct.pack(">BBH", 0, 0, _SUBSYSTEM >> 8)


def _parse_base(found: Mapping[int, bytes]) -> BaseChain | None:
    if _CHAIN_HOOK not in found:
        return None
    hook = attributes(found[_CHAIN_HOOK])
    return BaseChain(
        text(found[_CHAIN_TYPE]),
        _HOOK_NAMES[int.from_bytes(hook[_HOOK_NUMBER], "big")],
        int.from_bytes(hook[_HOOK_PRIORITY], "big", signed=True),
        _POLICY_NAMES[int.from_bytes(found[_CHAIN_POLICY], "big")],
    )


def _parse_comment(userdata: bytes) -> str:
    """The comment among a rule's user data, which is type, length, value of a byte each."""
    offset = 0
    while offset + 2 <= len(userdata):
        kind, length = userdata[offset], userdata[offset + 1]
        if kind == _COMMENT:
            return text(userdata[offset + 2 : offset + 2 + length])
        offset += 2 + length
    return ""
