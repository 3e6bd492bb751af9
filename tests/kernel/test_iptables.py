"""Both backends, both families: adoption, atomicity, others' rules, errors, packets."""

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.iptables import (
    ALTERED,
    IptablesTable,
    TableState,
    TableUpdate,
    rule_hashes,
)
from kernel.iptables_variants import IptablesError, detect_backend
from kernel.netns import Namespace, inside
from tests.support.netns import connect, eventually, fresh_namespace, run

Fragments = tuple[str, ...]

VARIANTS = [(4, "nft"), (4, "legacy"), (6, "nft"), (6, "legacy")]
CHAINS: Mapping[str, Fragments] = {
    "cali-FORWARD": ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-j cali-policy"),
    "cali-policy": (
        "-p 6 -m multiport --dports 80,443 -j ACCEPT",
        "-m mark --mark 0x10000/0x10000 -j RETURN",
        '-m comment --comment "a policy\'s name" -j DROP',
    ),
    "cali-empty": (),
}
INSERT: Mapping[str, Fragments] = {"FORWARD": ("-j cali-FORWARD", "-m mark --mark 0x1 -j ACCEPT")}
APPEND: Mapping[str, Fragments] = {"FORWARD": ("-j ACCEPT",), "INPUT": ("-j cali-policy",)}


@dataclass(frozen=True)
class World:
    """A namespace, our filter table in it, and the command strangers use."""

    namespace: Namespace
    table: IptablesTable
    command: str

    def stranger(self, rule: str) -> None:
        run(self.namespace, self.command, *rule.split())

    def saved(self) -> list[str]:
        output = run(self.namespace, f"{self.command}-save", "-t", "filter").stdout
        return [line for line in output.splitlines() if line[:1] in (":", "-")]

    def rules(self, chain: str) -> list[str]:
        return [line for line in self.saved() if line.startswith(f"-A {chain} ")]

    def become(self, chains: Mapping[str, Fragments] = CHAINS) -> None:
        self.table.apply(self.table.read().update_to(chains, INSERT, APPEND))


@pytest.fixture(params=VARIANTS, ids=lambda variant: f"IPv{variant[0]}-{variant[1]}")
def world(request: pytest.FixtureRequest, namespace: Namespace) -> Iterator[World]:
    family, backend = request.param
    command = f"{'iptables' if family == 4 else 'ip6tables'}-{backend}"
    with IptablesTable(family, "filter", backend, netns_fd=namespace.fd) as table:
        yield World(namespace, table, command)


def test_an_empty_table_has_nothing_of_ours(world: World) -> None:
    state = world.table.read()
    builtin = ("INPUT", "FORWARD", "OUTPUT")
    accepting = dict.fromkeys(builtin, "ACCEPT")
    assert state == TableState({}, dict.fromkeys(builtin, ()), accepting)
    assert not state.update_to({}, {})
    run(world.namespace, world.command, "-P", "FORWARD", "DROP")
    assert world.table.read().policies == accepting | {"FORWARD": "DROP"}


def test_a_new_agent_adopts_what_is_right(world: World) -> None:
    world.become()
    state = world.table.read()
    assert state.chains == {name: rule_hashes(name, rules) for name, rules in CHAINS.items()}
    before = world.saved()
    family, backend = world.table.family, world.table.backend
    with IptablesTable(family, "filter", backend, netns_fd=world.namespace.fd) as successor:
        update = successor.read().update_to(CHAINS, INSERT, APPEND)
        assert not update
        successor.apply(update)
        # even when told again it writes no rule that stands
        successor.apply(TableUpdate(insert=INSERT, append=APPEND))
        assert successor._restore.pid is None
    assert world.saved() == before


def test_only_what_differs_is_changed(world: World) -> None:
    world.become()
    wanted = {**CHAINS, "cali-policy": ("-j DROP",), "cali-new": ("-j cali-policy",)}
    del wanted["cali-empty"]
    update = world.table.read().update_to(wanted, INSERT, APPEND)
    assert update == TableUpdate(
        replace={name: wanted[name] for name in ("cali-policy", "cali-new")}, delete=("cali-empty",)
    )
    world.table.apply(update)
    state = world.table.read()
    assert state.chains == {name: rule_hashes(name, rules) for name, rules in wanted.items()}


def test_others_rules_and_chains_survive_everything(world: World) -> None:
    for rule in (
        "-N DOCKER-USER",
        "-A DOCKER-USER -j RETURN",
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -m comment --comment cali:short -j ACCEPT",
        "-A FORWARD -m comment --comment not-cali:0123456789abcdef -j ACCEPT",
        "-N calico-lookalike",
        "-P FORWARD DROP",
    ):
        world.stranger(rule)
    before = world.saved()
    world.become()
    assert len(world.rules("FORWARD")) == 6
    assert world.table.read().inserted["FORWARD"][2:5] == ("", "", "")
    world.table.apply(world.table.read().update_to({}, {}))
    assert world.saved() == before


def test_a_rule_that_does_nothing_is_a_rule(world: World) -> None:
    world.stranger("-A FORWARD")
    world.become()
    assert world.table.read().inserted["FORWARD"][2:3] == ("",)
    assert world.rules("FORWARD ") == []
    assert "-A FORWARD" in world.saved()


def test_a_table_that_iptables_cannot_show_is_not_taken_for_empty(namespace: Namespace) -> None:
    with IptablesTable(4, "filter", "nft", netns_fd=namespace.fd) as table:
        chains, insert = {"cali-a": ("-j ACCEPT",)}, {"FORWARD": ("-j cali-a",)}
        table.apply(table.read().update_to(chains, insert))
        run(namespace, "nft", "add rule ip filter FORWARD fib daddr type local accept")
        with pytest.raises(IptablesError, match="filter' is incompatible, use 'nft' tool"):
            table.read()
        # what is known by heart can still be changed
        table.apply(TableUpdate(replace={"cali-a": ("-j DROP",)}))
        ruleset = run(namespace, "nft", "list", "ruleset").stdout
        assert ruleset.count("jump cali-a") == 1


def test_our_rules_return_to_their_place(world: World) -> None:
    world.become()
    right = world.rules("FORWARD")
    world.stranger("-I FORWARD -j DROP")
    world.stranger("-A FORWARD -j DROP")
    world.stranger("-D FORWARD 3")  # one of ours
    world.stranger(right[0].replace('"', ""))  # and a second one of another
    update = world.table.read().update_to(CHAINS, INSERT, APPEND)
    assert update.insert.keys() == {"FORWARD"}
    assert update.append.keys() == {"FORWARD"}
    assert not update.replace
    world.table.apply(update)
    now = world.rules("FORWARD")
    assert (now[:2], now[-1:]) == (right[:2], right[-1:])
    assert len(now) == 5
    assert [mark for mark in world.table.read().inserted["FORWARD"] if not mark] == ["", ""]


def test_what_a_stranger_did_to_our_chains_is_seen(world: World) -> None:
    for damage in (
        "-A cali-policy -j ACCEPT",
        "-I cali-policy -j ACCEPT",
        "-D cali-policy 2",
        "-F cali-policy",
        "-R cali-policy 1 -j ACCEPT",
    ):
        world.become()
        world.stranger(damage)
        update = world.table.read().update_to(CHAINS, INSERT, APPEND)
        assert update == TableUpdate(replace={"cali-policy": CHAINS["cali-policy"]})
        world.table.apply(update)
        assert world.table.read().chains["cali-policy"] == rule_hashes(
            "cali-policy", CHAINS["cali-policy"]
        )


def test_a_rule_that_says_something_else_under_its_comment_is_not_ours(world: World) -> None:
    world.become()
    for chain, number in (("cali-policy", 3), ("FORWARD", 1)):
        rule = world.rules(chain)[number - 1].removeprefix(f"-A {chain} ")
        changed = re.sub("-[jg] .*", "-j RETURN", rule)
        run(world.namespace, world.command, "-R", chain, str(number), *shlex.split(changed))
        state = world.table.read()
        assert ALTERED in (state.chains | state.inserted)[chain]
        update = state.update_to(CHAINS, INSERT, APPEND)
        assert {*update.replace, *update.insert} == {chain}
        world.table.apply(update)
        assert not world.table.read().update_to(CHAINS, INSERT, APPEND)


def test_a_rule_that_iptables_tells_in_other_words_is_written_again_only_once(
    world: World,
) -> None:
    net = "10.0.0.0/8" if world.table.family == 4 else "fd00::/16"
    own = {"cali-a": ("-j DROP", f"-p tcp -s {net} -j DROP", "-j REJECT")}
    chains = {**CHAINS, **own}
    world.become(chains)
    assert world.table.read().update_to(chains, INSERT, APPEND) == TableUpdate(replace=own)
    world.become(chains)
    assert not world.table.read().update_to(chains, INSERT, APPEND)
    rule = world.rules("cali-a")[2].removeprefix("-A cali-a ")
    changed = re.sub("-j .*", "-j ACCEPT", rule)
    run(world.namespace, world.command, "-R", "cali-a", "3", *shlex.split(changed))
    assert world.table.read().update_to(chains, INSERT, APPEND) == TableUpdate(replace=own)


def test_a_table_that_sleeps_is_woken(namespace: Namespace) -> None:
    with IptablesTable(4, "filter", "nft", netns_fd=namespace.fd) as table:
        table.apply(table.read().update_to(CHAINS, INSERT, APPEND))
        run(namespace, "nft", "add", "table", "ip", "filter", "{ flags dormant; }")
        state = table.read()
        assert state.dormant and not state.update_to(CHAINS, INSERT, APPEND)
        table.wake()
        assert not table.read().dormant


def test_inserted_rules_change_though_a_stranger_took_them_away(world: World) -> None:
    world.become()
    world.stranger("-F FORWARD")
    # The table believes its rules are there; deleting them fails, so it looks again.
    world.table.apply(TableUpdate(insert={"FORWARD": ("-j cali-policy",)}))
    (rule,) = world.rules("FORWARD")
    assert rule.endswith("-j cali-policy")


def test_a_refused_rule_is_named_and_nothing_is_changed(world: World) -> None:
    world.become()
    before = world.saved()
    with pytest.raises(IptablesError, match=r'unknown option "--no-such-option"') as caught:
        world.table.apply(
            TableUpdate(
                replace={
                    "cali-empty": ("-j ACCEPT",),
                    "cali-policy": ("-j ACCEPT", "-p tcp --no-such-option", "-j DROP"),
                }
            )
        )
    assert caught.value.chain == "cali-policy"
    assert caught.value.rule.endswith("-p tcp --no-such-option")
    with pytest.raises(IptablesError, match="cali-nowhere"):
        world.table.apply(TableUpdate(replace={"cali-policy": ("-j cali-nowhere",)}))
    with pytest.raises(IptablesError, match="cali-policy"):
        world.table.apply(TableUpdate(delete=["cali-policy"]))  # in use
    assert world.saved() == before
    # and the next update works
    world.table.apply(TableUpdate(replace={"cali-policy": ("-j DROP",)}))
    assert len(world.rules("cali-policy")) == 1


def test_what_the_kernel_refuses_at_commit_names_the_chain(world: World) -> None:
    with pytest.raises(IptablesError, match="cali-policy"):
        world.table.apply(TableUpdate(replace={"cali-policy": ("-p tcp -j MASQUERADE",)}))


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (TableUpdate(replace={"FORWARD": ()}), "begins with 'cali-'"),
        (TableUpdate(delete=["DOCKER"]), "begins with 'cali-'"),
        (TableUpdate(replace={"cali-" + 24 * "x": ()}), "at most 28 characters"),
        (TableUpdate(replace={"cali-a b": ()}), "begins with 'cali-'"),
        (TableUpdate(insert={"cali-a": ("-j ACCEPT",)}), "is ours; replace it instead"),
        (TableUpdate(replace={"cali-a": ("-j ACCEPT\n-F",)}), "one line is needed"),
    ],
)
def test_updates_that_cannot_be_are_refused(
    namespace: Namespace, update: TableUpdate, expected: str
) -> None:
    with (
        IptablesTable(4, "filter", "nft", netns_fd=namespace.fd) as table,
        pytest.raises(ValueError, match=expected),
    ):
        table.apply(update)


def test_a_table_that_cannot_be_is_refused() -> None:
    for family, table, backend in ((5, "filter", "nft"), (4, "fltr", "nft"), (4, "nat", "ebpf")):
        with pytest.raises(ValueError, match="iptables"):
            IptablesTable(family, table, backend)


@pytest.mark.parametrize("name", ["nat", "raw", "mangle"])
@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_the_other_tables_work_too(namespace: Namespace, name: str, backend: str) -> None:
    chains = {"cali-PREROUTING": ("-j ACCEPT",)}
    insert = {"PREROUTING": ("-j cali-PREROUTING",)}
    with IptablesTable(4, name, backend, netns_fd=namespace.fd) as table:
        table.apply(table.read().update_to(chains, insert))
        assert not table.read().update_to(chains, insert)
        assert any(table.read().inserted["PREROUTING"])


def test_a_killed_program_is_started_again(world: World) -> None:
    world.become()
    for number in range(3):
        pid = world.table._restore.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        world.table.apply(
            TableUpdate(replace={"cali-empty": (f"-m mark --mark {number} -j DROP",)})
        )
        assert world.rules("cali-empty")[0].endswith(f"--mark 0x{number:x} -j DROP")
        assert world.table._restore.pid != pid
    pid = world.table._restore.pid
    world.table.close()
    assert not Path(f"/proc/{pid}").exists()


def test_the_program_ends_with_its_user(namespace: Namespace) -> None:
    script = """
import os, sys, signal
from kernel.iptables import IptablesTable, TableUpdate
table = IptablesTable(4, "filter", "nft", netns_fd=int(sys.argv[1]))
table.apply(TableUpdate(replace={"cali-a": ("-j DROP",)}))
print(table._restore.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(namespace.fd)],
        pass_fds=[namespace.fd],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    eventually(lambda: not Path(f"/proc/{pid}/exe").exists())


def test_the_lock_of_legacy_iptables_is_waited_for(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    with (
        lock.open("w") as held,
        IptablesTable(4, "filter", "legacy", netns_fd=namespace.fd) as table,
    ):
        fcntl.flock(held, fcntl.LOCK_EX)
        update = TableUpdate(replace={"cali-a": ("-j DROP",)})
        writer = threading.Thread(target=table.apply, args=(update,))
        writer.start()
        wanted = f":{lock.stat().st_ino} "
        eventually(lambda: "-> FLOCK" in lock_waiters(wanted))
        assert writer.is_alive()
        fcntl.flock(held, fcntl.LOCK_UN)
        writer.join(60)
        assert "cali-a" in table.read().chains


def lock_waiters(inode: str) -> str:
    """The lines of /proc/locks about a file; an arrow marks who waits."""
    return "".join(line for line in Path("/proc/locks").read_text().splitlines() if inode in line)


def test_writers_do_not_disturb_each_other(world: World) -> None:
    """Two agents' tables and a stranger write at once: everything arrives."""
    world.stranger("-N KUBE-SERVICES")
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return call

    def agent(prefix: str) -> Callable[[], None]:
        def work() -> None:
            family, backend = world.table.family, world.table.backend
            with IptablesTable(
                family, "filter", backend, prefix=prefix, netns_fd=world.namespace.fd
            ) as table:
                for number in range(15):
                    rule = f"-m mark --mark {number} -j RETURN"
                    table.apply(TableUpdate(replace={f"{prefix}{number}": (rule,)}))

        return work

    def stranger() -> None:
        for number in range(10):
            world.stranger(f"-w 60 -A KUBE-SERVICES -m mark --mark {number} -j RETURN")

    threads = [
        threading.Thread(target=guarded(work))
        for work in (agent("cali-a"), agent("cali-b"), stranger)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(world.rules("KUBE-SERVICES")) == 10
    state = world.table.read()
    assert state.chains.keys() == {f"cali-{x}{n}" for x in "ab" for n in range(15)}
    assert all(len(rules) == 1 and rules[0] for rules in state.chains.values())


def test_a_rule_drops_packets_and_its_replacement_lets_them_through(namespace: Namespace) -> None:
    with fresh_namespace() as other:
        connect(namespace, "one", other, "two", ("10.0.0.1/24", "10.0.0.2/24"))
        for backend in ("nft", "legacy"):
            with IptablesTable(4, "filter", backend, netns_fd=namespace.fd) as table:
                for verdict, lost in (("ACCEPT", False), ("DROP", True), ("ACCEPT", False)):
                    ping = ("ping", "-c1", "-W1" if lost else "-W20", "10.0.0.1")
                    chains = {"cali-INPUT": (f"-p icmp -j {verdict}",)}
                    insert = {"INPUT": ("-j cali-INPUT",)}
                    table.apply(table.read().update_to(chains, insert))
                    assert (run(other, *ping, check=False).returncode != 0) == lost


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_no_packet_sees_half_an_update(namespace: Namespace, backend: str) -> None:
    """Chains that all accept what the other version drops: replaced under a flow."""
    with fresh_namespace() as other:
        connect(namespace, "one", other, "two", ("10.0.0.1/24", "10.0.0.2/24"))
        versions = [
            {
                "cali-INPUT": ("-j cali-x", "-j DROP") if number else ("-j cali-y", "-j DROP"),
                "cali-x": ("-j ACCEPT",) if number else ("-j DROP",),
                "cali-y": ("-j DROP",) if number else ("-j ACCEPT",),
            }
            for number in (0, 1)
        ]
        with IptablesTable(4, "filter", backend, netns_fd=namespace.fd) as table:
            table.apply(TableUpdate(versions[0], insert={"INPUT": ("-j cali-INPUT",)}))
            turns = 0
            while turns <= 10:  # the less often in a second, the longer
                with inside(other.fd):
                    flood = subprocess.Popen(
                        ["ping", "-q", "-i", "0.002", "-c", "300", "-W", "20", "10.0.0.1"],
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                while flood.poll() is None:
                    turns += 1
                    table.apply(TableUpdate(versions[turns % 2]))
                assert "300 received, 0% packet loss" in flood.communicate()[0]


def test_auto_takes_the_only_backend_there_is(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernel.restore._SBIN", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="iptables-nft-save: not found; install"):
        IptablesTable(4, "filter", "nft")
    for name in ("iptables-legacy-save", "iptables-legacy-restore"):
        (tmp_path / name).symlink_to("/usr/sbin/xtables-legacy-multi")
    with IptablesTable(4, "filter", "auto", netns_fd=namespace.fd) as table:
        assert table.backend == "legacy"


def test_auto_takes_the_backend_in_use(namespace: Namespace) -> None:
    default = detect_backend(namespace.fd)
    assert default in ("nft", "legacy")
    # looking does not load legacy tables
    with inside(namespace.fd):
        assert Path("/proc/thread-self/net/ip_tables_names").read_text() == ""
    for backend in ("legacy", "nft"):
        for _ in range(2 if backend == "nft" else 1):
            run(namespace, f"ip6tables-{backend}", "-A", "INPUT", "-j", "ACCEPT")
        assert detect_backend(namespace.fd) == backend
        with IptablesTable(4, "filter", netns_fd=namespace.fd) as table:
            assert table.backend == backend


FRAGMENTS = st.lists(st.text(min_size=1, max_size=8), max_size=6).map(tuple)


@given(st.sampled_from(["cali-a", "cali-b"]), FRAGMENTS, FRAGMENTS)
@settings(max_examples=200, deadline=None)
def test_hashes_differ_from_the_first_difference_on(
    chain: str, one: Fragments, other: Fragments
) -> None:
    first, second = rule_hashes(chain, one), rule_hashes(chain, other)
    assert all(len(mark) == 16 for mark in first)
    assert len(set(first)) == len(first)
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    assert first[:common] == second[:common]
    assert not set(first[common:]) & set(second[common:])
    assert not set(first) & set(rule_hashes("cali-c", one))
