"""What tests look at in the kernel, and break there, whichever enforcer is at work."""

from __future__ import annotations

import json
from typing import Protocol

from tests.felix.world import Node
from tests.support.netns import run


class Enforcer(Protocol):
    """How an enforcer's work shows."""

    iptables: bool

    def rules(self, node: Node) -> str:
        """All its rules."""

    def kernel(self, node: Node) -> list[str]:
        """Everything it made, without counters, in an order of its own."""

    def sets(self, node: Node) -> set[str]:
        """The names of all its sets."""

    def packets(self, node: Node, comment: str) -> int:
        """How many packets met rules with such a comment."""

    def allow_spoofing(self, node: Node) -> None:
        """Break the rule against forged sources."""

    def break_chains(self, node: Node, interface: str) -> None:
        """Break the way to an endpoint's chain, empty that chain, and add a set."""

    def change_set(self, node: Node, name: str, *, remove: str, add: str) -> None:
        """Take one member from a set and put another in."""


class Iptables:
    """iptables and ipset."""

    iptables = True

    def rules(self, node: Node) -> str:
        return "".join(
            run(node.netns, command).stdout for command in ("iptables-save", "ip6tables-save")
        )

    def kernel(self, node: Node) -> list[str]:
        sets = run(node.netns, "ipset", "save", "-sorted").stdout.splitlines()
        rules = [line for line in self.rules(node).splitlines() if line[:1] != "#"]
        # a set's seed is drawn when it is made
        return rules + sorted(line.split(" initval")[0] for line in sets)

    def sets(self, node: Node) -> set[str]:
        return set(run(node.netns, "ipset", "list", "-n").stdout.split())

    def packets(self, node: Node, comment: str) -> int:
        lines = run(node.netns, "iptables-save", "-c", "-t", "filter").stdout.splitlines()
        return sum(int(line[1:].split(":")[0]) for line in lines if comment in line)

    def allow_spoofing(self, node: Node) -> None:
        run(node.netns, "iptables", "-t", "raw", "-F", "cali-PREROUTING")

    def break_chains(self, node: Node, interface: str) -> None:
        run(node.netns, "iptables", "-D", "FORWARD", "1")
        run(node.netns, "iptables", "-F", f"cali-tw-{interface}")
        run(node.netns, "iptables", "-A", "cali-INPUT", "-j", "ACCEPT")
        run(node.netns, "ipset", "create", "cali40stale", "hash:ip")

    def change_set(self, node: Node, name: str, *, remove: str, add: str) -> None:
        run(node.netns, "ipset", "del", name, remove)
        run(node.netns, "ipset", "add", name, add)


class Nftables:
    """The tables ``ip calico`` and ``ip6 calico``."""

    iptables = False

    def rules(self, node: Node) -> str:
        return "".join(
            run(node.netns, "nft", "list", "table", family, "calico", check=False).stdout
            for family in ("ip", "ip6")
        )

    def kernel(self, node: Node) -> list[str]:
        lines = []
        for family in ("ip", "ip6"):
            listing = run(node.netns, "nft", "-j", "-s", "list", "table", family, "calico").stdout
            for item in json.loads(listing)["nftables"]:
                for found in item.values():
                    found.pop("handle", None)
                    if "elem" in found:
                        found["elem"].sort(key=json.dumps)  # a hash has them in any order
                lines.append(json.dumps(item))
        return sorted(lines)

    def sets(self, node: Node) -> set[str]:
        items = json.loads(run(node.netns, "nft", "-j", "list", "sets").stdout)["nftables"]
        return {item["set"]["name"] for item in items if "set" in item}

    def packets(self, node: Node, comment: str) -> int:
        lines = [line.split() for line in self.rules(node).splitlines() if comment in line]
        return sum(int(words[words.index("packets") + 1]) for words in lines)

    def allow_spoofing(self, node: Node) -> None:
        run(node.netns, "nft", "flush", "chain", "ip", "calico", "raw-cali-PREROUTING")

    def break_chains(self, node: Node, interface: str) -> None:
        run(node.netns, "nft", "flush", "chain", "ip", "calico", "filter-FORWARD")
        run(node.netns, "nft", "flush", "chain", "ip", "calico", f"filter-cali-tw-{interface}")
        run(node.netns, "nft", "add", "rule", "ip", "calico", "filter-cali-INPUT", "accept")
        run(node.netns, "nft", "add", "set", "ip", "calico", "stale", "{ type ipv4_addr; }")

    def change_set(self, node: Node, name: str, *, remove: str, add: str) -> None:
        for verb, member in (("delete", remove), ("add", add)):
            run(node.netns, "nft", verb, "element", "ip", "calico", name, f"{{ {member} }}")


ENFORCERS: dict[str, Enforcer] = {"nftables": Nftables(), "iptables": Iptables()}
