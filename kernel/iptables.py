"""iptables: read which of our chains and rules stand, change them atomically.

See iptables(8), iptables-restore(8). Ours are the chains whose names begin with a prefix
and the rules with a comment ``cali:`` and sixteen characters, a hash of the rule and of
all before it in its chain. So a restarted agent sees from the kernel alone what is right:
a rule is ours as long as the hash of what it says is that in its comment. No other chain is
changed but for the rules we insert, and no other rule is.

With the nft backend a change right after another waits some ten milliseconds: the kernel
first lets go of the rules that the earlier one removed. So gather changes into one update.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from kernel.iptables_variants import BACKENDS, COMMANDS, IptablesError, detect_backend, run_program
from kernel.nftables import Nftables
from kernel.restore import Restore, RestoreError, find_program

CHAIN_NAME_LIMIT = 28  # characters
_TABLES = ("filter", "nat", "raw", "mangle", "security")
_ATTEMPTS = 3
_OURS = re.compile(r'-m comment --comment "?cali:([A-Za-z0-9_-]{16})"?(?: |$)')
_PROTOCOL = re.compile(r"((?:(?:! )?-[sdio] [^ ]+ )*(?:! )?-p )([^ ]+)")
# Those that iptables knows by itself.
_PROTOCOLS = {"tcp": 6, "udp": 17, "udplite": 136, "sctp": 132, "icmp": 1, "ipv6-icmp": 58}
# In the place of the hash of a rule that says something else than we wrote.
ALTERED = "altered"

Fragments = tuple[str, ...]


def rule_hashes(chain: str, fragments: Iterable[str]) -> tuple[str, ...]:
    """The sixteen characters of each rule: a hash over the chain's rules so far."""
    state = hashlib.sha256(chain.encode())
    hashes = []
    for fragment in fragments:
        state.update(b"\n" + fragment.encode())
        hashes.append(base64.urlsafe_b64encode(state.digest()[:12]).decode())
    return tuple(hashes)


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """Changes to a table, done together or not at all. Rules are without ``-A CHAIN``.

    ``replace``: our chains and all their rules. ``delete``: our chains to remove.
    ``insert`` and ``append``: the rules of ours that must come first and last in a chain
    that is not ours; a chain named in either gets no others of ours.
    """

    replace: Mapping[str, Fragments] = field(default_factory=dict)
    delete: Collection[str] = ()
    insert: Mapping[str, Fragments] = field(default_factory=dict)
    append: Mapping[str, Fragments] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.replace or self.delete or self.insert or self.append)


@dataclass(frozen=True, slots=True)
class TableState:
    """What stands in a table, one hash a rule; an empty text is a rule that isn't ours.

    ``chains`` are ours; ``inserted`` are the others: the builtin ones, and more where a
    rule of ours is found. ``policies`` are those of the builtin ones, such as ``DROP``.
    ``dormant``: no packet sees the table (nft variant only).
    """

    chains: dict[str, tuple[str, ...]]
    inserted: dict[str, tuple[str, ...]]
    policies: dict[str, str] = field(default_factory=dict)
    dormant: bool = False

    def update_to(
        self,
        chains: Mapping[str, Fragments],
        insert: Mapping[str, Fragments],
        append: Mapping[str, Fragments] | None = None,
    ) -> TableUpdate:
        """What must change so that exactly these chains and inserted rules of ours stand."""
        append = append or {}
        hooked = {name for name, hashes in self.inserted.items() if any(hashes)}
        wrong = {
            name
            for name in hooked | insert.keys() | append.keys()
            if not _in_place(
                self.inserted.get(name, ()), name, insert.get(name, ()), append.get(name, ())
            )
        }
        return TableUpdate(
            replace={
                name: fragments
                for name, fragments in chains.items()
                if self.chains.get(name) != rule_hashes(name, fragments)
            },
            delete=tuple(sorted(self.chains.keys() - chains.keys())),
            insert={name: insert.get(name, ()) for name in sorted(wrong)},
            append={name: append[name] for name in sorted(wrong & append.keys())},
        )


class IptablesTable:
    """One table of one family and backend (``nft``, ``legacy``, ``auto``: what is in use).

    In the network namespace ``netns_fd``, by default that of the thread that calls. For
    one thread at a time. Raises ValueError for a table that does not exist,
    FileNotFoundError where iptables is not installed.
    """

    def __init__(
        self,
        family: int,
        table: str,
        backend: str = "auto",
        *,
        prefix: str = "cali-",
        netns_fd: int | None = None,
    ) -> None:
        if family not in COMMANDS or table not in _TABLES:
            raise ValueError(f"iptables family {family}, table {table!r}: 4 or 6, {_TABLES}")
        if backend not in (*BACKENDS, "auto"):
            raise ValueError(f"iptables backend {backend!r}: nft, legacy or auto")
        self.family = family
        self.table = table
        self.backend = detect_backend(netns_fd) if backend == "auto" else backend
        self._prefix = prefix
        self._netns_fd = netns_fd
        command = f"{COMMANDS[family]}-{self.backend}"
        self._save = (find_program(f"{command}-save"), "-t", table)
        self._restore = Restore(f"{command}-restore", netns_fd=netns_fd)
        # Other chains than ours, as last seen: (hash, text) of each rule. None: not known
        self._hooks: dict[str, list[tuple[str, str]]] | None = None
        # What this iptables makes of fragments that it doesn't tell as they were written, and
        # the chains where that may be so.
        self._told_as: dict[str, str] = {}
        self._doubtful: set[str] = set()

    def __str__(self) -> str:
        return f"{COMMANDS[self.family]}-{self.backend} table {self.table}"

    def __enter__(self) -> IptablesTable:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the running program. The table stays as it is, and may be used again."""
        self._restore.close()

    def read(self) -> TableState:
        """What stands (``iptables-save -t TABLE``).

        Raises IptablesError, also where another program keeps rules that only nft(8) can
        show.
        """
        rules, policies = self._rules()
        self._doubtful.clear()
        marks = {name: self._marks(name, each) for name, each in rules.items()}
        ours = {name for name in rules if name.startswith(self._prefix)}
        hooks = rules.keys() - ours
        self._hooks = {name: list(zip(marks[name], rules[name], strict=True)) for name in hooks}
        return TableState(
            {name: marks[name] for name in rules if name in ours},
            {name: marks[name] for name in rules if name in hooks},
            policies,
            self.backend == "nft" and self._is_dormant(),
        )

    def wake(self) -> None:
        """Have packets see the table again. Raises NftablesError."""
        with Nftables(self.family, self.table, netns_fd=self._netns_fd) as table:
            transaction = table.transaction()
            transaction.create_table()
            table.commit(transaction)

    def _is_dormant(self) -> bool:
        with Nftables(self.family, self.table, netns_fd=self._netns_fd) as table:
            return table.dormant()

    def _rules(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """The rules of our chains and of those we hook into, and the policies of the latter."""
        rules: dict[str, list[str]] = {}
        policies: dict[str, str] = {}
        for line in run_program(self._save, self._netns_fd).splitlines():
            if line.startswith("# Table") and "incompatible" in line:
                # said with exit code 0 and instead of everything else
                raise IptablesError(f"{self}: cannot be read: {line[2:]}")
            if line.startswith(":"):
                name, policy, _ = line[1:].split(" ", 2)
                if name.startswith(self._prefix):
                    rules[name] = []
                elif policy != "-":
                    rules[name] = []
                    policies[name] = policy
            elif line.startswith("-A "):
                name, _, rule = line[3:].partition(" ")
                rules.setdefault(name, []).append(rule)
        return rules, policies

    def _marks(self, chain: str, rules: Sequence[str]) -> tuple[str, ...]:
        """The hash of each rule of ours that says what we wrote; ``ALTERED`` of another."""
        found = [_OURS.search(rule) for rule in rules]
        said = [_said(rule, ours) for rule, ours in zip(rules, found, strict=True) if ours]
        hashes = iter(rule_hashes(chain, [self._told_as.get(text, text) for text in said]))
        marks = []
        for ours in found:
            if ours is None:
                marks.append("")
                continue
            is_right = next(hashes) == ours[1]
            marks.append(ours[1] if is_right else ALTERED)
            if not is_right:
                self._doubtful.add(chain)
        return tuple(marks)

    def apply(self, update: TableUpdate) -> None:
        """Do the whole update in one transaction; an inserted rule in place is left alone.

        A failure is tried again with fresh eyes, as it may come from another program's
        change. Raises IptablesError, ValueError for names and rules that cannot be.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            lines = list(self._render(update))
            if len(lines) == 2:  # only "*table" and "COMMIT"
                return
            try:
                self._restore.apply(lines)
                break
            except RestoreError as error:
                self._hooks = None
                if attempt == _ATTEMPTS:
                    raise self._explain(error, lines) from error
        self._learn(update)
        if self._hooks is not None:
            for name in update.insert.keys() | update.append.keys():
                self._remember(name, update.insert.get(name, ()), update.append.get(name, ()))

    def _learn(self, update: TableUpdate) -> None:
        """See how this iptables tells what was just written where a rule seemed altered.

        Another version may say the same in other words; else the rule would be put right again
        and again.
        """
        written = dict(update.replace)
        for name in update.insert.keys() | update.append.keys():
            written[name] = (*update.insert.get(name, ()), *update.append.get(name, ()))
        doubtful = self._doubtful & written.keys()
        if not doubtful:
            return
        rules, _ = self._rules()
        for name in doubtful:
            ours = [(rule, _OURS.search(rule)) for rule in rules.get(name, ())]
            said = [_said(rule, found) for rule, found in ours if found]
            if len(said) == len(written[name]):
                pairs = zip(said, written[name], strict=True)
                self._told_as.update(pair for pair in pairs if pair[0] != pair[1])
        self._doubtful -= doubtful

    def _render(self, update: TableUpdate) -> Iterator[str]:
        for name in (*update.replace, *update.delete):
            self._check_ours(name)
        yield f"*{self.table}"
        for name in (*update.replace, *update.delete):
            yield f":{name} - [0:0]"  # made, or emptied
        for name, fragments in update.replace.items():
            for rule in _commented(name, fragments):
                yield f"-A {name} {rule}"
        for name in sorted(update.insert.keys() | update.append.keys()):
            yield from self._render_hooks(
                name, update.insert.get(name, ()), update.append.get(name, ())
            )
        for name in update.delete:
            yield f"-X {name}"
        yield "COMMIT"

    def _render_hooks(self, name: str, insert: Fragments, append: Fragments) -> Iterator[str]:
        if name.startswith(self._prefix):
            raise ValueError(f"iptables chain {name}: is ours; replace it instead")
        present = self._known_hooks().get(name, [])
        if _in_place([mark for mark, _ in present], name, insert, append):
            return
        for mark, rule in present:
            if mark:
                # by its text: a number could meanwhile be a stranger's rule
                yield f"-D {name} {rule}"
        rules = _commented(name, (*insert, *append))
        for rule in reversed(rules[: len(insert)]):
            yield f"-I {name} {rule}"
        for rule in rules[len(insert) :]:
            yield f"-A {name} {rule}"

    def _known_hooks(self) -> dict[str, list[tuple[str, str]]]:
        if self._hooks is None:
            self.read()
        assert self._hooks is not None
        return self._hooks

    def _remember(self, name: str, insert: Fragments, append: Fragments) -> None:
        assert self._hooks is not None
        rules = (*insert, *append)
        ours = list(zip(rule_hashes(name, rules), _commented(name, rules), strict=True))
        others = [rule for rule in self._hooks.get(name, []) if not rule[0]]
        self._hooks[name] = [*ours[: len(insert)], *others, *ours[len(insert) :]]

    def _check_ours(self, name: str) -> None:
        if not name.startswith(self._prefix) or len(name) > CHAIN_NAME_LIMIT or " " in name:
            raise ValueError(
                f"iptables chain {name!r}: a name that begins with {self._prefix!r} and has at "
                f"most {CHAIN_NAME_LIMIT} characters is needed"
            )

    def _explain(self, error: RestoreError, lines: Sequence[str]) -> IptablesError:
        if error.line is None or not lines[error.line].startswith(("-", ":")):
            touched = [line.split(" ")[0][1:] for line in lines if line.startswith(":")]
            where = f" (changing chains {', '.join(touched[:10])})" if touched else ""
            return IptablesError(f"{self}: {error}{where}")
        line = lines[error.line]
        words = line.split(" ", 2)
        chain = words[0][1:] if line.startswith(":") else words[1]
        return IptablesError(f"{self}: {error}: at {line!r}", chain, line)


def _commented(chain: str, fragments: Sequence[str]) -> list[str]:
    """The rules with the comment we recognise them by."""
    for fragment in fragments:
        if "\n" in fragment:
            raise ValueError(f"iptables chain {chain}: rule {fragment!r}: one line is needed")
    return [
        f'-m comment --comment "cali:{mark}" {fragment}'
        for mark, fragment in zip(rule_hashes(chain, fragments), fragments, strict=True)
    ]


def _said(rule: str, ours: re.Match[str]) -> str:
    """A rule that iptables-save tells as we write it.

    That is, without our comment, with protocols by number and no escaped apostrophes.
    """
    text = (rule[: ours.start()] + rule[ours.end() :]).rstrip().replace("\\'", "'")
    protocol = _PROTOCOL.match(text)
    if protocol is None or protocol[2].isdigit():
        return text
    return f"{protocol[1]}{_protocol_number(protocol[2])}{text[protocol.end() :]}"


@lru_cache
def _protocol_number(name: str) -> str:
    """By the name in ``/etc/protocols``, where iptables has it from; else the name."""
    try:
        return str(_PROTOCOLS.get(name) or socket.getprotobyname(name))
    except OSError:
        return name


def _in_place(present: Sequence[str], chain: str, insert: Fragments, append: Fragments) -> bool:
    """Whether exactly these of our rules stand in a chain, at its beginning and end."""
    wanted = rule_hashes(chain, (*insert, *append))
    others = len(present) - len(wanted)
    first = len(insert)
    return tuple(present) == (*wanted[:first], *[""] * others, *wanted[first:])
