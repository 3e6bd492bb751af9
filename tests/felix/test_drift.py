"""What a stranger changes is put right, at once or within the interval that the settings say.

Running connections that policy allows lose nothing by it, and nothing that it forbids passes
afterwards, not even what could begin meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from api.net import parse_net
from felix import names
from felix.chains import Chain, ChainRule, Condition, Dispatch, Drop, Hook, Jump, Side, Table
from felix.desired import ChainKey, Delta, HookKey, SetKey
from felix.iptables_dataplane import IptablesDataplane
from felix.nftables_dataplane import NftablesDataplane
from felix.settings import settings
from kernel.netns import Namespace, inside
from kernel.nftables import Nftables, TableState
from policy.engine import SetDelta
from policy.model import Match, Member, SetKind
from tests.felix.enforcers import ENFORCERS, Enforcer
from tests.felix.world import (
    V3,
    Flow,
    Listener,
    Pod,
    cluster,
    felix_configuration,
    is_dropped,
    policy,
    reaches,
)
from tests.support.netns import eventually, run

_NONE: frozenset[Member] = frozenset()
CHAIN = "cali-tw-"
# Of iptables nobody tells, so it is looked at every second. Of nftables the kernel tells: never.
INTERVALS = {
    "iptables": {"iptablesRefreshInterval": "1s", "ipsetsRefreshInterval": "1s"},
    "nftables": {"nftablesRefreshInterval": "0s", "ipsetsRefreshInterval": "0s"},
}


class World:
    def __init__(self, stack: contextlib.ExitStack, enforcer: Enforcer) -> None:
        self.enforcer = enforcer
        name = "node1"
        found = cluster(name, addresses=("172.31.1.11/24",), iptables=enforcer.iptables)
        (self.node,) = stack.enter_context(found)
        intervals = INTERVALS["iptables" if enforcer.iptables else "nftables"]
        more = {"nftablesMode": "Disabled"} if enforcer.iptables else {}
        spec = {**intervals, **more, "routeRefreshInterval": "1s"}
        self.node.put(felix_configuration(f"node.{name}", **spec))
        self.web = self.node.pod("web", "10.0.0.1", labels={"app": "web"})
        self.client = self.node.pod("client", "10.0.0.2", labels={"app": "client"})
        self.guest = self.node.pod("guest", "10.0.0.3")
        rule = {"action": "Allow", "source": {"selector": "app == 'client'"}}
        self.node.put(policy("p", selector="app == 'web'", types=["Ingress"], ingress=[rule]))
        self.node.start()
        self.node.settle()

    def kernel(self) -> list[str]:
        """All that is ours."""
        own = self.enforcer.kernel(self.node)
        routes = run(self.node.netns, "ip", "route", "show", "proto", "80").stdout.splitlines()
        table = "filter" if self.enforcer.iptables else "calico"
        listed = run(self.node.netns, "nft", "list", "table", "ip", table).stdout
        return own + sorted(routes) + re.findall("dormant", listed)

    def is_mended(self, before: list[str]) -> bool:
        """Whether all is again as it was before."""
        try:
            return self.kernel() == before
        except AssertionError:  # there is no table at all
            return False

    def nobody_looks(self) -> contextlib.AbstractContextManager[None]:
        """A stranger on iptables needs several commands, and one may fail because the look that
        is due each second has mended what the one before it did."""
        return self.node.paused() if self.enforcer.iptables else contextlib.nullcontext()

    def shell(self, *commands: str) -> None:
        """As a stranger does."""
        for command in commands:
            run(self.node.netns, *command.split())

    def set_name(self) -> str:
        """The set of the clients."""
        (name,) = (name for name in self.enforcer.sets(self.node) if "40s" in name or "s-" in name)
        return name


@pytest.fixture(scope="module", params=ENFORCERS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(stack, ENFORCERS[request.param])


def flush_a_chain(world: World) -> None:
    name = CHAIN + world.web.interface
    if world.enforcer.iptables:
        world.shell(f"iptables -F {name}")
    else:
        world.shell(f"nft flush chain ip calico filter-{name}")


def add_a_rule(world: World) -> None:
    name = CHAIN + world.web.interface
    if world.enforcer.iptables:
        world.shell(f"iptables -I {name} -j ACCEPT")
    else:
        world.shell(f"nft insert rule ip calico filter-{name} accept")


def break_several(world: World) -> None:
    """A hook, a chain, a rule of a stranger's and a set of a stranger's."""
    world.enforcer.break_chains(world.node, world.web.interface)


def delete_and_add_a_member(world: World) -> None:
    world.enforcer.change_set(world.node, world.set_name(), remove="10.0.0.2", add="10.0.0.3")


def take_an_interface_from_the_dispatch(world: World) -> None:
    if world.enforcer.iptables:
        world.shell("iptables -D cali-to-wl-dispatch 1")
    else:
        element = f'{{ "{world.web.interface}" }}'
        run(
            world.node.netns,
            *("nft", "delete", "element", "ip", "calico", "filter-cali-to-wl-dispatch"),
            element,
        )


def delete_everything_of_ours(world: World) -> None:
    if world.enforcer.iptables:
        world.shell(*(f"iptables -t {table} -F" for table in ("raw", "filter")))
        world.shell(*(f"iptables -t {table} -X" for table in ("raw", "filter")))
        world.shell("ipset destroy")
    else:
        world.shell("nft delete table ip calico")


def put_another_set_in_place_of_one(world: World) -> None:
    """Of the same name, but of another kind."""
    name = world.set_name()
    if world.enforcer.iptables:
        delete_everything_of_ours(world)
        world.shell(f"ipset create {name} hash:net,port")
    else:
        kind = "{ type inet_service; }"
        changed = f"delete table ip calico\nadd table ip calico\nadd set ip calico {name} {kind}\n"
        run(world.node.netns, "nft", "-f", "-", stdin=changed)


def put_another_set_in_place_of_one_and_use_it(world: World) -> None:
    """So that it can't be deleted while the rule is there, and the chain it is in is ours."""
    put_another_set_in_place_of_one(world)
    name = world.set_name()
    if world.enforcer.iptables:
        chain = CHAIN + world.web.interface
        rule = f"-A {chain} -m set --match-set {name} src,dst -j ACCEPT"
        world.shell(f"iptables -N {chain}", f"iptables {rule}")
    else:
        rule = f"add chain ip calico c\nadd rule ip calico c tcp dport @{name} accept\n"
        run(world.node.netns, "nft", "-f", "-", stdin=rule)


def flush_the_ruleset(world: World) -> None:
    world.shell("nft flush ruleset")


def replace_a_rule(world: World) -> None:
    """By one that does something else, but looks in lists as if it were ours."""
    name = CHAIN + world.web.interface
    if world.enforcer.iptables:
        rules = own_rules(world, name)
        words = shlex.split(rules[-1].replace("-j DROP", "-j ACCEPT"))[2:]
        run(world.node.netns, "iptables", "-R", name, str(len(rules)), *words)
    else:
        name = f"filter-{name}"
        listed = run(world.node.netns, "nft", "-a", "list", "chain", "ip", "calico", name).stdout
        rule = next(line for line in reversed(listed.splitlines()) if " drop " in line)
        text, _, handle = rule.partition(" # handle ")
        changed = text.replace("drop", "accept").strip()
        replaced = f"replace rule ip calico {name} handle {handle} {changed}\n"
        run(world.node.netns, "nft", "-f", "-", stdin=replaced)


def replace_a_hook(world: World) -> None:
    """The same with the rule that leads from the kernel's chain to ours."""
    if world.enforcer.iptables:
        words = shlex.split(own_rules(world, "FORWARD")[0].replace("cali-FORWARD", "ACCEPT"))[2:]
        run(world.node.netns, "iptables", "-R", "FORWARD", "1", *words)
    else:
        name = "filter-FORWARD"
        listed = run(world.node.netns, "nft", "-a", "list", "chain", "ip", "calico", name).stdout
        rule = next(line for line in listed.splitlines() if "jump " in line)
        text, _, handle = rule.partition(" # handle ")
        changed = re.sub("jump [^ ]+", "return", text).strip()
        replaced = f"replace rule ip calico {name} handle {handle} {changed}\n"
        run(world.node.netns, "nft", "-f", "-", stdin=replaced)


def put_the_table_to_sleep(world: World) -> None:
    table = "filter" if world.enforcer.iptables else "calico"
    run(world.node.netns, "nft", "add", "table", "ip", table, "{ flags dormant; }")


def put_everybody_into_a_set(world: World) -> None:
    if world.enforcer.iptables:
        for half in ("0.0.0.0/1", "128.0.0.0/1"):
            world.shell(f"ipset add {world.set_name()} {half}")
        world.shell(f"ipset add {world.set_name()} 10.0.0.2/31 nomatch")
    else:
        run(world.node.netns, "nft", "add", "element", "ip", "calico", world.set_name(), "{ * }")


def lead_an_unknown_interface_somewhere(world: World) -> None:
    if world.enforcer.iptables:
        world.shell("iptables -I cali-to-wl-dispatch -o cali+ -j ACCEPT")
    else:
        element = "{ * : accept }"
        chain = "filter-cali-to-wl-dispatch"
        run(world.node.netns, "nft", "add", "element", "ip", "calico", chain, element)


def drop_what_nobody_judges(world: World) -> None:
    if world.enforcer.iptables:
        world.shell("iptables -A cali-FORWARD -j DROP")
    else:
        run(
            world.node.netns,
            *("nft", "chain", "ip", "calico", "filter-FORWARD", "{ policy drop; }"),
        )


def own_rules(world: World, chain: str) -> list[str]:
    """The rules of a chain of iptables."""
    listed = run(world.node.netns, "iptables", "-S", chain).stdout.splitlines()
    return [line for line in listed if line.startswith("-A")]


STRANGERS = (
    flush_a_chain,
    replace_a_rule,
    replace_a_hook,
    put_the_table_to_sleep,
    put_everybody_into_a_set,
    lead_an_unknown_interface_somewhere,
    drop_what_nobody_judges,
    add_a_rule,
    break_several,
    delete_and_add_a_member,
    take_an_interface_from_the_dispatch,
    delete_everything_of_ours,
    put_another_set_in_place_of_one,
    put_another_set_in_place_of_one_and_use_it,
    flush_the_ruleset,
)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_a_stranger_changes_is_put_right(
    world: World, stranger: Callable[[World], None]
) -> None:
    before = world.kernel()
    # What a stranger takes away may be missed by a packet that is on its way through the rules.
    lossless = stranger in (flush_a_chain, add_a_rule, break_several)
    address = world.web.address
    with Flow(world.client.netns, world.web.netns, address, 5001) as good:
        eventually(lambda: good.sent > 100)
        with world.nobody_looks():
            stranger(world)
        eventually(lambda: world.is_mended(before))
        sent = good.sent
        eventually(lambda: good.sent > sent + 100)
        arrived = good.finish(0 if lossless else sent + 1)
        after = set(range(sent + 1, good.sent))
        assert arrived >= (set(range(good.sent)) if lossless else after)
    with Listener(world.web.netns, 80):
        assert is_dropped(world.guest.netns, address, 80)
    assert world.node.errors() == {}


def test_it_is_put_right_while_the_datastore_is_locked(world: World) -> None:
    """What is moved takes its time, and strangers know nothing of it."""
    before = world.kernel()
    info = {
        "apiVersion": V3,
        "kind": "ClusterInformation",
        "metadata": {"name": "default"},
        "spec": {"datastoreReady": False},
    }
    lock = world.node.put(info)
    world.node.settle()
    with world.nobody_looks():
        delete_everything_of_ours(world)
    eventually(lambda: world.is_mended(before))
    ignored = world.node.put(policy("ignored", selector="all()"))
    world.node.settle()
    world.shell("ip route del 10.0.0.1")
    eventually(lambda: world.is_mended(before))
    with Listener(world.web.netns, 80):
        assert is_dropped(world.guest.netns, world.web.address, 80)
        assert reaches(world.client.netns, world.web.address, 80)
    for key in (ignored, lock):
        world.node.delete(key)
    world.node.settle()
    assert world.node.errors() == {}


def test_what_began_meanwhile_ends(world: World) -> None:
    """A connection that policy forbids, made while nothing stood in its way.

    Somebody else has the kernel track connections, as kube-proxy does; else it knew of none.
    """
    rules = (
        "table ip others {\nchain c {\ntype filter hook forward priority 10\nct state new\n}\n}\n"
    )
    run(world.node.netns, "nft", "-f", "-", stdin=rules)
    before = world.kernel()
    ended = "flows that policy forbids"
    told = world.node.log.read_text().count(ended)
    with Listener(world.web.netns, 80) as listener:
        with world.node.paused():
            delete_everything_of_ours(world)
            guest = _connect(world.guest, world.web.address)
            client = _connect(world.client, world.web.address)
            ends = [listener.tcp.accept()[0] for _ in range(2)]
        with guest, client, ends[0], ends[1]:
            eventually(lambda: world.is_mended(before))
            eventually(lambda: world.node.log.read_text().count(ended) > told)
            for end in (guest, client, *ends):
                end.sendall(b"still there?")
            of_client, of_guest = ends[::-1] if _is_of(ends[0], guest) else ends
            assert client.recv(100) == of_client.recv(100) == b"still there?"
            time.sleep(0.3)
            for end in (guest, of_guest):
                end.setblocking(False)
                with pytest.raises(BlockingIOError):
                    end.recv(100)
    world.shell("nft delete table ip others")


def _connect(pod: Pod, address: str) -> socket.socket:
    with inside(pod.netns.fd):
        made = socket.socket()
    made.settimeout(60)
    made.connect((address, 80))
    return made


def _is_of(server: socket.socket, client: socket.socket) -> bool:
    return bool(server.getpeername() == client.getsockname())


def test_routes_and_settings_are_put_right(world: World) -> None:
    before = world.kernel()
    path = f"net.ipv4.conf.{world.web.interface}.rp_filter"
    world.shell(f"ip route del {world.web.address}", f"sysctl -qw {path}=0")
    world.shell("sysctl -qw net.ipv4.ip_forward=0")
    eventually(lambda: world.is_mended(before))

    def values() -> list[str]:
        return run(world.node.netns, "sysctl", "-n", path, "net.ipv4.ip_forward").stdout.split()

    eventually(lambda: values() == ["1", "1"])


def test_others_tables_are_no_reason_to_look(world: World) -> None:
    log = world.node.log.read_text()
    with Nftables(4, "kube-proxy", netns_fd=world.node.netns.fd) as other:
        for number in range(200):
            transaction = other.transaction()
            transaction.create_table()
            transaction.create_chain(f"calico-{number}")
            other.commit(transaction)
        world.node.settle()
        transaction = other.transaction()
        transaction.delete_table()
        other.commit(transaction)
    assert "somebody else" not in world.node.log.read_text()[len(log) :]


def test_who_never_leaves_it_alone_does_not_keep_it_from_its_work(world: World) -> None:
    before = world.kernel()
    for _ in range(30):
        add_a_rule(world)
    deny = [{"action": "Deny"}]
    extra = policy("extra", selector="app == 'web'", types=["Ingress"], ingress=deny, order=1)
    key = world.node.put(extra)
    world.node.settle()
    with Listener(world.web.netns, 80):
        eventually(lambda: is_dropped(world.client.netns, world.web.address, 80))
    world.node.delete(key)
    world.node.settle()
    eventually(lambda: world.is_mended(before))


def test_nobody_else_changed_anything(namespace: Namespace) -> None:
    """So that there is no need to look."""

    def members(_: SetKey) -> frozenset[Member]:
        return frozenset()

    with (
        inside(namespace.fd),
        contextlib.closing(NftablesDataplane(settings(), members)) as own,
        Nftables(4, "other") as other,
    ):
        assert not own.untouched()
        own.read()
        assert own.untouched()
        key = ChainKey(4, Table.FILTER, "cali-x")
        own.want(Delta(chains={key: Chain("cali-x", ())}))
        assert own.apply_chains(0.0) and own.untouched()
        transaction = other.transaction()
        transaction.create_table()
        other.commit(transaction)
        assert not own.untouched()
        own.read()
        assert own.untouched()


def test_a_set_of_a_strangers_that_stays_lets_nothing_through(namespace: Namespace) -> None:
    """Of our name, but of another type, and in use: it is not asked, whatever comes meanwhile."""
    set_id = "s:denied"
    key, name = SetKey(4, set_id), names.set_name(set_id, 4)
    members: set[Member] = {parse_net("127.0.0.2")}
    denied = ChainRule(Drop(), Condition(packet=Match(dst_sets=(set_id,))))
    hook = HookKey(4, Hook(Table.FILTER, "OUTPUT"))

    def change(*came: Member, created: bool = False) -> Delta:
        return Delta(sets={key: SetDelta(SetKind.NET, frozenset(came), _NONE, created, False)})

    def reached() -> list[int]:
        with socket.socket(type=socket.SOCK_DGRAM) as sender:
            return [number for number in (2, 3, 4) if _is_sent(sender, f"127.0.0.{number}")]

    run(namespace, "ipset", "create", name, "hash:net,port")
    rule = ("FORWARD", "-m", "set", "--match-set", name, "src,dst", "-j", "ACCEPT")
    run(namespace, "iptables", "-A", *rule)
    with (
        inside(namespace.fd),
        contextlib.closing(
            IptablesDataplane(settings(), lambda _: frozenset(members), "nft")
        ) as own,
    ):
        later = itertools.count(1000.0, 1000.0)

        def apply(now: float) -> bool:
            for step in (own.fill_sets, own.apply_chains, own.trim_sets):
                step(now)
            return own.next_retry() is None

        own.read()
        delta = change(*members, created=True)
        delta.chains[ChainKey(4, Table.FILTER, "cali-x")] = Chain("cali-x", (denied,))
        delta.hooks[hook] = (ChainRule(Jump("cali-x")),)
        own.want(delta)
        apply(100.0)
        assert reached() == []
        members.add(parse_net("127.0.0.3"))
        own.want(change(parse_net("127.0.0.3")))
        apply(100.0)
        assert reached() == []
        run(namespace, "iptables", "-D", *rule)
        eventually(lambda: apply(next(later)))
        assert reached() == [4]
        assert list(own.problems()) == []


def _is_sent(sender: socket.socket, address: str) -> bool:
    """Whether a packet leaves."""
    try:
        sender.sendto(b"", (address, 80))
    except PermissionError:  # dropped in OUTPUT
        return False
    return True


def test_a_table_goes_while_it_is_read(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maps are gone when their elements are asked for; it is all there again at once."""
    name = ChainKey(4, Table.FILTER, "cali-x"), ChainKey(4, Table.FILTER, "cali-y")
    target, dispatch = Chain("cali-x", ()), Dispatch("cali-y", Side.IN, (("cali1", "cali-x"),), ())
    list_command = ("nft", "list", "table", "ip", "calico")

    def go(nftables: Nftables) -> TableState:
        state = read(nftables)
        if state.exists:
            transaction = nftables.transaction()
            transaction.delete_table()
            nftables.commit(transaction)
        return state

    with (
        inside(namespace.fd),
        contextlib.closing(NftablesDataplane(settings(), lambda _: frozenset())) as own,
    ):
        own.read()
        own.want(Delta(chains=dict(zip(name, (target, dispatch), strict=True))))
        assert own.apply_chains(0.0)
        before = run(namespace, *list_command).stdout
        with monkeypatch.context() as patched:
            read = Nftables.read
            patched.setattr(Nftables, "read", go)
            own.read()
        assert own.apply_chains(0.0)
        assert run(namespace, *list_command).stdout == before
        assert list(own.problems()) == []
