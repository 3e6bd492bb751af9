"""All of BGP on this node but the waiting: resources and events in; sessions, routes,
announcements out.

What is done depends on the state, never on the order in which it came about. ``reconcile``
works out what changed and brings the speaker and the kernel towards it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from api.errors import Problem
from api.net import V4, Net, format_address, host_net
from bird_glue.adj_rib_in import AdjRibIn
from bird_glue.advertise import LearnedRoute, Speaking, announcements, own_routes
from bird_glue.choice import Choice, choose
from bird_glue.decision import Guard, Session
from bird_glue.detector import Detector, Failure, Watch, failure
from bird_glue.drops import Drops
from bird_glue.engine import EXABGP, Engine, EngineEvent, Intent, Restarted, TooMany
from bird_glue.engines import Engines
from bird_glue.fib import Fib
from bird_glue.keepsake import Keepsake, Passwords
from bird_glue.limits import Resting
from bird_glue.messages import Down, EndOfRib, Opened, Up, Updated, is_link_local
from bird_glue.nexthops import Topology
from bird_glue.peers import Peer, PeerType, desired_peers
from bird_glue.peerstatus import PeerStatuses
from bird_glue.pools import Pools
from bird_glue.resources import Resources
from bird_glue.rib import Rib
from bird_glue.secrets import SecretRead
from bird_glue.services import SERVICE_KINDS
from bird_glue.sessions import Sessions, listen, plan_sessions
from bird_glue.settings import Cluster, Local, ObjectProblem, local_settings, node_addresses
from bird_glue.status import BgpStatus
from bird_glue.tracker import ESTABLISHED, Tracker
from bird_glue.ways import Ways
from datastore.follower import Update

_log = logging.getLogger(__name__)

_LOCKED = ObjectProblem(
    "ClusterInformation",
    "default",
    Problem(
        "spec.datastoreReady",
        False,
        "true: the datastore is being moved, what is in force stays until"
        " manxctl datastore migrate unlock",
    ),
)
SESSIONS_SECONDS = 10.0  # how long sessions wait for Secrets and workloads at the start
SERVICES_SECONDS = 10.0  # how long announcements wait for services at the start
HOLD_SECONDS = 120.0  # how long routes of an earlier run are kept for peers that don't come


class Core:
    """``engine``: which one where no resource says: ``exabgp``, ``bird`` or ``auto``.

    ``silent``: whether an address on a link was asked for and didn't answer.

    ``source_of``: the address the kernel would speak from to another.
    """

    def __init__(
        self,
        node: str,
        router_id: str,
        engines: Engines,
        engine: str,
        fib: Fib,
        detector: Detector,
        resting: Resting,
        keepsake: Keepsake,
        passwords: Passwords,
        *,
        silent: Callable[[Net], bool],
        source_of: Callable[[Net], Net | None],
        pod_cidrs: bool = False,
    ) -> None:
        self._node = node
        self._router_id = router_id
        self._engines = engines
        self._default_engine = engine
        self._fib = fib
        self._detector = detector
        self._resting = resting
        self._keepsake = keepsake
        self._passwords = passwords
        self._restored = False
        self._silent = silent
        self._source_of = source_of
        self._resources = Resources(node, pod_cidrs=pod_cidrs)
        self._routes = AdjRibIn()
        self._rib = Rib(self._routes)
        self._drops = Drops()
        self._tracker = Tracker(self._diagnose)
        self._statuses = PeerStatuses(self._routes, self._rib, fib, self._tracker, detector)
        self._topology = Topology()
        self._local: Local | None = None
        self._sessions = Sessions()
        self._blocks: tuple[Net, ...] = ()
        self._pools = Pools()
        self._problems: list[ObjectProblem] = []
        self._in_sync = False
        self._configure_due = False
        self._intent: Intent | None = None
        self._blocks_due = False  # nothing else has changed
        self._advertise_due = False
        self._hold_until: float | None = None
        self._ways = Ways()
        self._groups: set[str] = set()  # of GROUPS, those that are known
        self._services_until: float | None = None
        self._sessions_until: float | None = None
        self.wanted_secrets: frozenset[str] = frozenset()  # those that sessions need
        self._workload_peers: list[Peer] = []

    @property
    def _engine(self) -> Engine:
        return self._engines.current

    @property
    def blocks(self) -> tuple[Net, ...]:
        """The blocks of this node."""
        return self._blocks

    @property
    def needs(self) -> frozenset[str]:
        """The groups of ``resources.GROUPS`` that are to be followed."""
        return self._resources.needs if self._in_sync else frozenset()

    @property
    def peering_addresses(self) -> dict[str, frozenset[Net]] | None:
        """By interface: what workloads of this node call. None: not known yet."""
        if self._local is None:
            return None
        found: dict[str, frozenset[Net]] = {}
        for peer in self._workload_peers:
            if peer.source is not None:
                found[peer.interface] = found.get(peer.interface, frozenset()) | {peer.source}
        return found

    def secret(self, read: SecretRead) -> None:
        """A Secret was read, or could not be."""
        self._passwords.take(read)
        self._configure_due = True

    def group_in_sync(self, group: str) -> None:
        """All objects of a group are known."""
        self._groups.add(group)
        self._configure_due = True

    def update(self, update: Update) -> None:
        """A resource changed."""
        was_locked = self._resources.locked
        if self._resources.update(update):
            if self._resources.locked and not was_locked and self._local is not None:
                self._keepsake.save(self._resources.in_force())
            elif was_locked and not self._resources.locked:
                self._keepsake.forget()
            if update.key.kind in SERVICE_KINDS:
                self._advertise_due = True
            elif update.key.kind == "BlockAffinity":
                self._blocks_due = True
            else:
                self._configure_due = True

    def in_sync(self) -> None:
        """All resources are known."""
        self._in_sync = True
        self._configure_due = True
        if not self._resources.locked:
            self._keepsake.forget()

    def forget(self) -> None:
        """Nothing of this node is in force any more, and no next agent needs to know what was."""
        self._engines.forget()
        self._keepsake.forget()
        self._passwords.forget()

    def set_topology(self, topology: Topology) -> None:
        """The kernel's routes or addresses are these."""
        self._drops.look()
        if topology.pods != self._topology.pods:
            self._topology.pods, self._topology.names = topology.pods, topology.names
            self._advertise_due = True
            if self._workload_peers:  # their routes lead to pods
                self._rib.set_topology(self._topology)
        if not topology.same(self._topology):
            for peer in tuple(self._routes.peers):
                before, after = self._topology.resolve(peer), topology.resolve(peer)
                if before and before.direct and not (after and after.direct):
                    self._routes.unplugged(peer)
            self._topology = topology
            self._rib.set_topology(topology)
            self._fib.set_topology(topology)
            self._configure_due = True

    def session(self, event: EngineEvent, now: float) -> None:
        """Something happened to a session."""
        if isinstance(event, Restarted):
            self._routes.restarted(now)
            self._tracker.lost_all(time.time())
            return
        if isinstance(event, TooMany):
            self._rest(event.peer, now)
            return
        self._tracker.note(event)
        match event:
            case Opened():
                self._routes.opened(event)
            case Up(peer=peer, time=since):
                self._routes.up(peer, now)
                known = self._detector.get(peer)
                if known and known.failed_at > since:  # while no agent was there to see it
                    self.failed(failure(peer, known))
            case Down(peer=peer):
                graceful = not event.notified and not event.removed
                self._routes.down(peer, now, graceful=graceful)
            case Updated(sent=False):
                if not self._routes.updated(event, self._resting.limit):
                    self._rest(event.peer, now)
            case EndOfRib(sent=False, peer=peer, version=version):
                self._routes.end_of_rib(peer, version)

    def failed(self, found: Failure) -> None:
        """A peer is dead, or the way to it is: nothing goes there any more.

        What failed before the session began is history.
        """
        reports = self._engine.report()
        known = reports.get(found.peer) or self._tracker.get(found.peer)
        if known.state == ESTABLISHED and found.time < known.since:
            return
        if self._engine.programs:  # as AdjRibIn does it
            ends = known.state == ESTABLISHED or found.independent
        else:
            ends = self._routes.failed(found.peer, independent=found.independent)
        if ends:
            self._tracker.failed(found.peer, found.info)
            self._engine.fail(found.peer, found.info)

    def _rest(self, peer: Net, now: float) -> None:
        """It told more than any peer may."""
        why = self._resting.send(peer, now)
        _log.error("%s: %s", format_address(*peer[:2]), why)
        self._tracker.failed(peer, why)
        if not self._engine.programs:  # else it has ended the session itself
            self._routes.failed(peer, independent=True)
            self._engine.fail(peer, why)
        self._configure_due = True

    def reconcile(self, now: float) -> None:
        """Bring the speaker and the kernel to what should be."""
        if not self._in_sync:
            return
        if self._resources.locked and self._local is None:
            if not self._restored:
                self._restored = True
                self._resources.restore(self._keepsake.load())
            if not self._resources.restored:
                return
        if self._configure_due or any(time <= now for time in self._ends()):
            self._configure_due = not self._configure(now)
        elif self._blocks_due:
            self._take_blocks()
        if self._local is None:
            return
        self._routes.expire(now)
        changes = self._rib.flush()
        self._fib.learned(changes)
        self._let_go(now)
        self._fib.apply(now)
        if changes and self._tells_on(self._local):
            self._advertise_due = True
        if self._advertise_due and self._knows_services(now):
            self._advertise_due = False
            self._advertise(self._local)
        for event in self._engine.step(now):
            self.session(event, now)
        self._configure_due |= self._engines.hopeless

    def next_due(self, now: float) -> float | None:
        """When to call ``reconcile`` though nothing happens."""
        if self._local is None:
            return self._sessions_until
        due = [self._engine.next_due(now), self._routes.next_deadline(), self._fib.next_retry()]
        if self._fib.holding:
            due += [self._hold_until, self._routes.next_settled(now)]
        due += self._ends()
        if self._advertise_due:
            due.append(self._services_until)
        return min((time for time in due if time is not None), default=None)

    def _ends(self) -> list[float]:
        """When ways to peers that are not wanted any more may go, and peers have rested."""
        return [*self._ways.ends(), *self._resting.ends()]

    def _knows_services(self, now: float) -> bool:
        """Whether to announce: not before services are known, lest those of an earlier run be
        withdrawn for a moment; but other routes can't wait for them for long.
        """
        if "services" in self._groups or "services" not in self.needs:
            return True
        if self._services_until is None:
            self._services_until = now + SERVICES_SECONDS
        return now >= self._services_until

    def _let_go(self, now: float) -> None:
        """Routes of an earlier run go when all peers have told theirs, or time is up."""
        if not self._fib.holding or self._hold_until is None:
            return
        if self._routes.complete(now) or now >= self._hold_until:
            self._fib.release()
            self._advertise_due = True

    def _waits(self, peers: list[Peer], now: float) -> bool:
        """Whether to wait for Secrets and workloads: at the start, lest sessions that run are
        ended because they are not known yet; but the other sessions can't wait for long.
        """
        names = (peer.password.name for peer in peers if peer.password)
        self.wanted_secrets = frozenset(name for name in names if name)
        known = "workloads" in self._groups or "workloads" not in self.needs
        known &= self.wanted_secrets <= self._passwords.known.keys()
        if self._local is not None or known:
            return False
        if self._sessions_until is None:
            self._sessions_until = now + SESSIONS_SECONDS
        if now < self._sessions_until:
            return True
        for name in self.wanted_secrets - self._passwords.known.keys():
            self._passwords.take(SecretRead(name, problem="no answer yet"))
        return False

    def _configure(self, now: float) -> bool:
        """Resources or addresses changed: work out the sessions and all that is said.

        Returns whether it could be done now.
        """
        cluster = self._resources.cluster()
        local = local_settings(cluster, self._node, self._router_id)
        self._problems = []
        if local is None or not self._resources.usable:
            if local is None:
                problem = Problem("metadata.name", self._node, "a Node object with this name")
                self._problems.append(ObjectProblem("Node", self._node, problem))
            return True  # what is in force stays
        if self._hold_until is None:
            self._hold_until = now + HOLD_SECONDS
        workloads = [known for _, known in sorted(self._resources.workloads.known.items())]
        peers, problems = desired_peers(cluster, local, workloads)
        if self._waits(peers, now):
            return False
        self._workload_peers = [peer for peer in peers if peer.type is PeerType.WORKLOAD]
        hosts = self._topology.hosts
        filters = self._resources.filters()
        secrets = self._passwords.known
        self._sessions = plan_sessions(peers, local, hosts, self._source_of, filters, secrets)
        used = (peer.password for peer in self._sessions.peers.values() if peer.password)
        self._passwords.keep(used)
        self._resting.leave_out(self._sessions, now)
        self._problems = problems + self._sessions.problems
        self._local = local
        self._blocks = self._resources.blocks()
        self._pools = self._resources.pools(local.program_unencapsulated)
        neighbors = self._sessions.neighbors
        intent = Intent(
            listen(local, hosts),
            neighbors,
            sessions={
                address: Session(
                    neighbor.external,
                    frozenset((local.asn, neighbor.local_as)),
                    max(0, self._sessions.peers[address].allowed_own_as),
                    self._sessions.filters[address],
                    neighbor.extended_next_hop,
                )
                for address, neighbor in neighbors.items()
            },
            speaking={address: self._speaking(address, local) for address in neighbors},
            guard=Guard(
                local.router_id,
                local.node.cluster_id,
                self._blocks,
                # each pod's link has its own link-local ones, which no route goes to anyhow
                frozenset(host for host in hosts if not is_link_local(host)),
                frozenset(net for net in self._topology.subnets if not is_link_local(net)),
                self._neighbours(cluster),
            ),
            pools=self._pools,
            blocks=self._blocks,
            metrics=local.metrics,
            ignored_interfaces=local.ignored_interfaces,
            receive_limit=self._resting.limit,
        )
        self._choose_engine(cluster, intent, now)
        self._routes.set_peers({} if self._engine.programs else intent.sessions)
        if self._topology.configure(self._sessions.ways, local.ignored_interfaces):
            self._rib.set_topology(self._topology)
        self._problems += self._ways.update(self._sessions, self._topology, now)
        self._put_in_force(intent)
        self._detector.configure(self._watches())
        self._tracker.set_neighbors(neighbors, time.time())
        return True

    def _take_blocks(self) -> None:
        """As ``_configure``, where nothing but the blocks of this node may have changed."""
        self._blocks_due = False
        blocks = self._resources.blocks()
        if self._intent is None or blocks == self._blocks:
            return
        self._blocks = blocks
        guard = replace(self._intent.guard, blocks=blocks)
        self._put_in_force(replace(self._intent, guard=guard, blocks=blocks))

    def _put_in_force(self, intent: Intent) -> None:
        self._intent = intent
        self._blocks_due = False
        self._rib.set_guard(intent.guard)
        self._fib.configure(
            pools=intent.pools,
            metrics=intent.metrics,
            blocks=intent.blocks,
            ways=self._ways.known,
            selected=self._rib.selected,
        )
        self._engine.configure(intent)
        self._advertise_due = True

    def _choose_engine(self, cluster: Cluster, intent: Intent, now: float) -> None:
        """Have the one that is wanted run, and know who writes learned routes."""
        nodes = {host: n.name for n in cluster.nodes.values() for host, _ in node_addresses(n)}
        clients = {
            nodes.get(address, address)
            for address, peer in self._sessions.peers.items()
            if peer.cluster_id is not None
        }
        choice = choose(
            cluster,
            self._node,
            self._default_engine,
            clients=len(clients),
            current=self._engine.name,
            why_not_bird=lambda: self._engines.why_not_bird(intent),
        )
        self._problems += choice.problems
        if choice == Choice(EXABGP):
            self._engines.forgive()
        if self._engines.choose(choice.engine):
            self._hold_until = now + HOLD_SECONDS
            self.session(Restarted(), now)
        if self._engine.programs:
            self._fib.give(self._engines.former_metrics)
        elif self._engines.bird_was_here:
            self._fib.take_back()

    def _neighbours(self, cluster: Cluster) -> frozenset[Net]:
        """On this node's links: peers, gateways, and other nodes."""
        nodes = cluster.nodes.values()
        hosts = {host for node in nodes for host, _ in node_addresses(node)}
        gateways = self._sessions.ways.values()
        return self._topology.neighbours({*hosts, *gateways, *self._sessions.neighbors})

    def _watches(self) -> dict[Net, Watch]:
        """Whose failure is to be seen at once: of all peers that take part."""
        found = {}
        for address, neighbor in self._sessions.neighbors.items():
            resolution = self._topology.resolve(address)
            found[address] = Watch(
                peer=address,
                local=neighbor.local,
                active=self._sessions.peers[address].is_node,
                multihop=resolution is not None and not resolution.direct,
                least_ttl=256 - neighbor.ttl_security if neighbor.ttl_security else 0,
            )
        return found

    def _advertise(self, local: Local) -> None:
        own = own_routes(
            self._blocks,
            self._resources.announced_services(self._node),
            self._pools,
            self._topology,
            local.priorities,
            local.ignored_interfaces,
        )
        learned = [] if self._engine.programs or not self._tells_on(local) else self._learned()
        cluster_id = local.node.cluster_id
        speaking = {address: self._speaking(address, local) for address in self._sessions.neighbors}
        # a reflector that forgot everything must hear its peers before it says "that is all"
        complete = cluster_id is None or not self._fib.holding
        wanted = announcements(own, learned, speaking, cluster_id)
        self._engine.advertise(wanted, mark_end=complete)

    def _speaking(self, address: Net, local: Local) -> Speaking:
        neighbor, peer = self._sessions.neighbors[address], self._sessions.peers[address]
        return Speaking(
            asn=neighbor.local_as,
            external=neighbor.external,
            priority=local.priorities[address.version],
            cluster_id=peer.cluster_id,
            next_hop_self=peer.next_hop_self,
            next_hop_keep=peer.next_hop_keep,
            filters=self._sessions.filters[address],
            communities=local.communities,
            workload=peer.type is PeerType.WORKLOAD,
            ipv4_priority=local.priorities[V4] if neighbor.extended_next_hop else None,
        )

    def _tells_on(self, local: Local) -> bool:
        """Whether what is told depends on what was learned."""
        return (
            local.node.cluster_id is not None
            or bool(self._workload_peers)
            or any(self._sessions.filters.values())
        )

    def _learned(self) -> list[LearnedRoute]:
        return [
            LearnedRoute(
                net,
                selection.best,
                self._routes.peers[selection.best.peer].router_id,
                self._pools.exports_learned(net),
                self._topology.interface(selection.hops),
            )
            for net, selection in self._rib.selected.items()
        ]

    def _diagnose(self, peer: Net) -> str:
        """Why a connection to a peer can't be made, if the kernel knows."""
        address = format_address(*peer[:2])
        if self._source_of(peer) is None:
            return f"no route to {address}"
        resolution = self._topology.resolve(peer)
        for hop in resolution.hops if resolution else ():
            if hop.gateway is not None and self._silent(host_net(peer.version, hop.gateway)):
                return f"no answer from {format_address(peer.version, hop.gateway)} on its link"
        self._drops.look()
        neighbor = self._sessions.neighbors.get(peer)
        why = self._drops.why(neighbor) if neighbor else ""
        return why and f"no answer from {address}; {why}"

    def status(self) -> BgpStatus:
        """What there is to tell."""
        local = self._local
        found = [_LOCKED] if self._resources.locked else []
        found += self._resources.problems + self._problems
        problems = [str(problem) for problem in found]
        problems += self._statuses.problems(self._sessions, self._engine)
        if self._engine.problem:
            problems.append(self._engine.problem)
        if self._detector.problem:
            problems.append(self._detector.problem)
        problems += [f"route not programmed: {text}" for text in self._fib.errors.values()]
        started, configured = self._engines.times
        return BgpStatus(
            node=self._node,
            asn=local.asn if local else 0,
            router_id=format_address(V4, local.router_id) if local else "",
            in_sync=self._in_sync,
            holding=self._fib.holding or self._engine.recovering,
            engine=self._engine.name,
            pid=self._engine.pid,
            started=started,
            configured=configured,
            blocks=[str(block) for block in self._blocks],
            peers=self._statuses.of(self._sessions, self._engine),
            problems=problems,
        )

    def learned_routes(self) -> list[dict[str, Any]]:
        """Own blocks and all that peers told, as CalicoNodeStatus lists routes.

        ``FIB`` are those that packets follow; of an engine that ``programs``, which says which
        path is best, of several that share the traffic only this one.
        """
        static = {"learnedFrom": {"sourceType": "Static"}}
        own = [{"type": "FIB", "destination": str(block)} | static for block in self._blocks]
        return own + self._statuses.learned(self._sessions, self._engine, self._pools)
