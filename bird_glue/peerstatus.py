"""The sessions of a node for ``status``: what was planned, what came of it, what it brought."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from api.net import Net, format_address
from bird_glue.adj_rib_in import AdjRibIn
from bird_glue.detector import Detector, describe
from bird_glue.engine import Engine, LearnedPath, Report
from bird_glue.fib import Fib
from bird_glue.peers import PeerType
from bird_glue.pools import Pools
from bird_glue.rib import Rib
from bird_glue.sessions import Sessions
from bird_glue.status import PeerStatus
from bird_glue.tracker import ESTABLISHED, Tracker
from datastore.interface import JSON


@dataclass(frozen=True, slots=True)
class PeerStatuses:
    """Asks all who know something of a peer."""

    routes: AdjRibIn
    rib: Rib
    fib: Fib
    tracker: Tracker
    detector: Detector

    def of(self, sessions: Sessions, engine: Engine) -> list[PeerStatus]:
        """All sessions. What an engine that decides by itself reports, it knows better."""
        reports = engine.report()
        used: Counter[Net] = Counter()
        installed: Counter[Net] = Counter()
        for net, selection in self.rib.selected.items():
            is_installed = self.fib.installed(net)
            for path in selection.paths:
                used[path.peer] += 1
                installed[path.peer] += is_installed
        found = []
        for address in sessions.peers:
            status = self._one(sessions, address, used[address], installed[address])
            sent, intended = engine.sent(address), engine.intended(address)
            status = replace(status, announced=sent, intended=intended)
            report = reports.get(address)
            found.append(_reported(status, report) if report else status)
        return found

    def problems(self, sessions: Sessions, engine: Engine) -> Iterator[str]:
        """What an engine can't do for sessions, or has not done."""
        for address, why in engine.rejected.items():
            if (peer := sessions.peers.get(address)) is not None:
                who = f"{' '.join(peer.owner)}: session with {format_address(*address[:2])}"
                yield f"{who}: {engine.name} refuses it: {why}"
        for address in sessions.peers:
            if count := engine.adrift(address):
                yield (
                    f"session with {format_address(*address[:2])}: {count} prefixes are not"
                    " announced as they should be: they are told again"
                )

    def learned(self, sessions: Sessions, engine: Engine, pools: Pools) -> list[JSON]:
        """All that peers told, as CalicoNodeStatus lists routes."""
        found: list[JSON] = []
        for net, address, next_hop, used in sorted([*engine.learned(), *self._paths()]):
            if (peer := sessions.peers.get(address)) is None:
                continue
            mesh = peer.type is PeerType.MESH
            found.append(
                {
                    "type": "FIB" if used and pools.programs(net) else "RIB",
                    "destination": str(net),
                    "gateway": format_address(*next_hop[:2]),
                    "learnedFrom": {
                        "sourceType": "NodeMesh" if mesh else "BGPPeer",
                        "peerIP": format_address(*address[:2]),
                    },
                }
            )
        return found

    def _paths(self) -> Iterator[LearnedPath]:
        for net, paths in self.routes.routes.items():
            selection = self.rib.selected.get(net)
            used = set(selection.paths) if selection and self.fib.installed(net) else set()
            for path in paths.values():
                yield LearnedPath(net, path.peer, path.next_hop, path in used)

    def _one(self, sessions: Sessions, address: Net, used: int, installed: int) -> PeerStatus:
        neighbor, peer = sessions.neighbors[address], sessions.peers[address]
        tracked = self.tracker.get(address)
        told = self.routes.peers.get(address)
        return PeerStatus(
            address=format_address(*address[:2]),
            port=neighbor.port,
            type=peer.type.value,
            asn=neighbor.remote_as,
            state=tracked.state,
            since=tracked.since,
            info=tracked.info,
            received=len(told.nets) if told else 0,
            used=used,
            installed=installed,
            announced=0,
            refused=dict(Counter(self.rib.refusals(address).values())),
            bfd=describe(self.detector.get(address)),
        )


def _reported(status: PeerStatus, report: Report) -> PeerStatus:
    """``status.info`` is what the kernel knows of a peer that isn't there."""
    info = report.info or status.info
    if report.said and report.said not in info:
        info = f"{info}; before that: {report.said}"
    return replace(
        status,
        state=report.state,
        since=report.since,
        info="" if report.state == ESTABLISHED else info,
        received=report.received,
        used=report.used,
        installed=report.installed,
        refused=dict(report.refused),
    )
