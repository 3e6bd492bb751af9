"""Which tracked flows policy forbids, as it is now.

A flow is asked about as its first packet would be: from where it began to where it really goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from api.net import Net
from felix import names
from felix.calculate import Calculator
from felix.settings import EndpointToHost
from kernel.conntrack import Flow, Tuple
from kernel.links import Links
from kernel.netlink import NetlinkSocket
from kernel.routes import Routes
from policy import evaluate
from policy.engine import Changes
from policy.evaluator import Evaluator
from policy.model import Action, EndpointId

_UDP = 17

# The flow that began so; None: it is gone.
Find = Callable[[Tuple], Flow | None]


# Flows that are judged as they are, before it is worth while to prepare for many: a quarter of a
# millisecond each, where preparing takes ten or more.
_FEW = 16


class Judge:
    """Judges by what ``calculator`` last calculated. ``find`` looks into the kernel."""

    def __init__(self, calculator: Calculator, find: Find) -> None:
        self._calculator = calculator
        self._find = find
        self._evaluator: Evaluator | None = None  # before there were many
        self._is_prepared = False
        self._news: list[Changes] = []
        self._judged = 0  # since it looked around
        self._surroundings: _Surroundings | None = None

    def note(self, changes: Changes) -> None:
        """What the engine's last flush changed. Must be told of every one."""
        if self._evaluator is not None:
            self._news.append(changes)

    def catch_up(self) -> None:
        """Judge by what was noted. To be called before anything is judged."""
        for changes in self._news:
            assert self._evaluator is not None
            self._evaluator.update(changes)
        self._news.clear()

    def prepare(self) -> Iterator[None]:
        """Get ready for many flows, in steps, once there were more than a few."""
        if self._is_prepared or self._judged < _FEW:
            return
        self._evaluator = Evaluator(self._calculator.engine, in_steps=True)
        yield from self._evaluator.prepare()
        self._is_prepared = True

    def look_around(self) -> None:
        """Forget which addresses are taken, and what is behind the host's interfaces."""
        self._judged = 0
        if self._surroundings is not None:
            self._surroundings.close()
            self._surroundings = None

    def is_stray(self, flow: Flow) -> bool:
        """Whether an end is in a block of this node's, but nobody has that address."""
        taken = self._around.taken(self._calculator)
        return any(
            end not in taken and any(block.contains(end) for block in self._calculator.blocks)
            for end in (flow.original.src, flow.reply.src)
        )

    def forbids(self, flow: Flow) -> bool:
        """Whether policy forbids the flow. What another flow that it allows led to, it allows."""
        if not self.forbids_tuple(flow.original, flow.reply):
            return False
        master = self._find(flow.master) if flow.master else None
        return master is None or self.forbids(master)

    def forbids_tuple(self, began: Tuple, answered: Tuple | None = None) -> bool:
        """Whether policy forbids what began so; ``answered`` None: nothing is translated."""
        dst, port = began.dst, began.dst_port
        if answered is not None:
            dst, port = answered.src, answered.src_port
        owner, guards = self._calculator.owner, self._calculator.guards
        own = self._calculator.host_addresses
        sender, receiver = owner(began.src), owner(dst)
        if sender is None and receiver is None and not guards:
            return False
        from_host = sender is None and began.src in own
        to_host = receiver is None and dst in own
        if from_host and (to_host or receiver is not None):
            return False  # not judged at all
        if to_host and self._calculator.is_for_ipvs(began.dst, began.protocol, began.dst_port):
            return False  # not judged at all with iptables, see ``ipvs_rules``
        settings = self._calculator.settings
        if (from_host or to_host) and (began.protocol, port) == (_UDP, settings.vxlan_port):
            return False  # the nodes' tunnel
        if sender is not None and to_host and settings.endpoint_to_host is EndpointToHost.DROP:
            return True
        entry = exit = None
        if guards and not (sender is not None and to_host):
            entry = self._guard(sender, began.src)
            exit = self._guard(receiver, dst)
        flow = evaluate.Flow(
            src=began.src,
            dst=dst,
            protocol=began.protocol,
            src_port=began.src_port,
            dst_port=port,
            icmp_type=began.icmp_type,
            icmp_code=began.icmp_code,
            src_endpoint=exit if from_host else sender,
            dst_endpoint=entry if to_host and sender is None else receiver,
            entry=None if from_host or to_host else entry,
            exit=None if from_host or to_host else exit,
            original_dst=began.dst if dst != began.dst else None,
            original_dst_port=began.dst_port if port != began.dst_port else None,
        )
        ports = (port, began.dst_port)
        if from_host and any(
            each.spares(began.protocol, ports, dst) for each in settings.failsafe_out
        ):
            return False
        if to_host and any(
            each.spares(began.protocol, ports, began.src) for each in settings.failsafe_in
        ):
            return False
        self._judged += 1
        if self._judged <= _FEW or self._evaluator is None or not self._is_prepared:
            return evaluate.evaluate(self._calculator.engine, flow).action is Action.DENY
        return self._evaluator.evaluate(flow).action is Action.DENY

    def _guard(self, workload: EndpointId | None, address: Net) -> EndpointId | None:
        """The host endpoint of the interface that an address is behind."""
        guards = self._calculator.guards
        if workload is not None:
            return guards.get(names.ANY_INTERFACE)
        found = guards.get(self._around.behind(address))
        return found or guards.get(names.ANY_INTERFACE)

    @property
    def _around(self) -> _Surroundings:
        if self._surroundings is None:
            self._surroundings = _Surroundings()
        return self._surroundings


class _Surroundings:
    """Which addresses are taken, and by which interface the host reaches them."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket()
        self._names: Mapping[int, str] | None = None
        self._behind: dict[Net, str] = {}
        self._taken: frozenset[Net] | None = None

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def taken(self, calculator: Calculator) -> frozenset[Net]:
        """The addresses that somebody in the cluster has, and the host's own."""
        if self._taken is None:
            self._taken = calculator.taken().union(calculator.host_addresses)
        return self._taken

    def behind(self, address: Net) -> str:
        """The interface that packets to an address leave by; empty: none."""
        if self._names is None:
            self._names = {link.index: link.name for link in Links(self._netlink).read().values()}
        if address not in self._behind:
            route = Routes(self._netlink).lookup(address)
            hops = route.hops if route else ()
            self._behind[address] = self._names.get(hops[0].ifindex, "") if hops else ""
        return self._behind[address]
