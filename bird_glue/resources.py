"""The resources that decide about BGP on this node, as they are in the datastore."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TypeVar

from api.bgp import BGPConfiguration, BGPPeer
from api.bgpfilter import BGPFilter
from api.clusterinformation import is_locked
from api.errors import InvalidObjectError, Problem
from api.ipam import BlockAffinity
from api.ippool import IPPool
from api.kubernetes import KubernetesNode
from api.metadata import Resource
from api.net import Net, parse_net
from api.node import Node
from api.registry import dump, key_parts, known_part, parse_as
from bird_glue.filters import Filter, compile_filter
from bird_glue.pools import Pools, pool_policy
from bird_glue.services import (
    EXCLUDED,
    SERVICE_KINDS,
    ServiceRanges,
    Services,
    service_ranges,
)
from bird_glue.settings import Cluster, ObjectProblem
from bird_glue.workloads import WORKLOAD_KINDS, Workloads
from datastore.follower import Update
from datastore.interface import JSON, Key

_log = logging.getLogger(__name__)

# The lock comes first: what is told after it waits for its end.
KINDS = (
    *("ClusterInformation", "Node", "BGPConfiguration", "BGPPeer", "BGPFilter"),
    *("IPPool", "BlockAffinity"),
)
# What there may be much of and few clusters need for BGP: followed only then.
GROUPS = {"services": SERVICE_KINDS, "workloads": WORKLOAD_KINDS}
_FOLLOWED_IN_GROUPS = frozenset(kind for kinds in GROUPS.values() for kind in kinds)
_CLUSTER = Key("ClusterInformation", "default")
_CONFIGURATION = Key("BGPConfiguration", "default")
# A field that only a newer Calico knows costs no more than itself, or the element of a list that it
# is in. (In a BGPPeer or a BGPFilter it could be a condition anywhere, without which more would be
# told, or to others.)
_KNOWN_PART_COUNTS = frozenset(("Node", "BGPConfiguration", "IPPool", "BlockAffinity"))
_CONFIRMED = ("confirmed", "")  # "" is an old spelling

R = TypeVar("R", bound=Resource)


def _given_to(node: KubernetesNode) -> list[Net]:
    """The ranges that Kubernetes gave a node. Raises InvalidObjectError."""
    given = node.spec.pod_cidrs or [node.spec.pod_cidr or ""]
    try:
        return [parse_net(text, strict=False) for text in given if text]
    except ValueError as error:
        problem = Problem("spec.podCIDRs", given, "CIDRs such as 10.0.0.0/24")
        raise InvalidObjectError("Node", node.name, [problem]) from error


def _parsed(key: Key, value: JSON) -> Resource:
    """Raises InvalidObjectError."""
    parsed = parse_as(key.kind, value)
    if isinstance(parsed, KubernetesNode):
        _given_to(parsed)
    return parsed


def _known_part(key: Key, value: JSON) -> Resource | None:
    """What is known of an object that as a whole is not valid; None where that isn't either."""
    if key.kind not in _KNOWN_PART_COUNTS:
        return None
    try:
        return _parsed(key, dict(known_part(key.kind, value)))
    except InvalidObjectError:
        return None


class Resources:
    """Parsed objects. One that is not valid keeps its last valid version, if it had one.

    ``locked``: the datastore is being moved; until that ends the objects are as they were.
    ``ranges``: of service addresses to announce.
    """

    def __init__(self, node: str, *, pod_cidrs: bool = False) -> None:
        """``pod_cidrs``: the ranges that Kubernetes gave the node are blocks, too."""
        self._node = node
        self._pod_cidrs = pod_cidrs
        self._objects: dict[Key, Resource] = {}
        self._problems: dict[Key, list[ObjectProblem]] = {}
        self._waiting: dict[Key, Update] = {}
        self._restored: set[Key] = set()
        self.locked = False
        self.services = Services(node)
        self.workloads = Workloads(node)
        self.ranges = ServiceRanges()

    @property
    def problems(self) -> list[ObjectProblem]:
        """What is wrong with objects that are not valid."""
        found = [problem for found in self._problems.values() for problem in found]
        return found + self.services.problems + self.workloads.problems

    @property
    def needs(self) -> frozenset[str]:
        """The groups of GROUPS that decide about something here."""
        needed = {"services"} if self.ranges else set()
        if any(peer.spec.local_workload_selector for peer in self._of(BGPPeer).values()):
            needed.add("workloads")
        return frozenset(needed)

    @property
    def usable(self) -> bool:
        """Whether the cluster's BGPConfiguration is known; never guess an AS number."""
        return _CONFIGURATION not in self._problems or _CONFIGURATION in self._objects

    def update(self, update: Update) -> bool:
        """Take in a change; returns whether it matters now."""
        if update.key.kind == _CLUSTER.kind:
            return update.key == _CLUSTER and self._set_locked(is_locked(update.value))
        if self.locked and not (self._restored and update.key.kind in _FOLLOWED_IN_GROUPS):
            self._waiting[update.key] = update
            return False
        return self._take(update)

    def _set_locked(self, locked: bool) -> bool:
        if locked == self.locked:
            return False
        self.locked = locked
        if locked:
            _log.warning("the datastore is locked: what is in force stays")
            return True
        _log.info("the datastore is unlocked: %d changes waited for that", len(self._waiting))
        for key in self._restored - self._waiting.keys():
            self._take(Update(key, None))  # gone before this agent started
        self._restored.clear()
        for update in self._waiting.values():
            self._take(update)
        self._waiting.clear()
        return True

    def in_force(self) -> list[JSON]:
        """The objects, to ``restore`` them elsewhere; without groups."""
        return [dump(found) for found in self._objects.values()]

    @property
    def restored(self) -> bool:
        """Whether the objects are those that were in force when the datastore was locked."""
        return bool(self._restored)

    def restore(self, objects: Iterable[JSON]) -> None:
        """Take in what was in force when the datastore was locked.

        Groups weren't kept: of those what is stored now counts.
        """
        for found in objects:
            try:
                kind, namespace, name = key_parts(found)
            except InvalidObjectError as error:
                _log.error("%s", error)
                continue
            key = Key(kind, name, namespace)
            self._restored.add(key)
            self._take(Update(key, found))
        for key in [key for key in self._waiting if key.kind in _FOLLOWED_IN_GROUPS]:
            self._take(self._waiting.pop(key))

    def _take(self, update: Update) -> bool:
        key, value = update.key, update.value
        if key.kind in SERVICE_KINDS:
            return self.services.update(key, value)
        if key.kind in WORKLOAD_KINDS:
            return self.workloads.update(key, value)
        if key.kind == "BlockAffinity" and value is not None and not self._is_own(value):
            value = None
        if key.kind == "KubernetesNode" and key.name != self._node:
            return False
        if value is None:
            self._problems.pop(key, None)
            if key == _CONFIGURATION:
                self.ranges = ServiceRanges()
            return self._objects.pop(key, None) is not None
        self._problems.pop(key, None)
        try:
            parsed = _parsed(key, value)
        except InvalidObjectError as error:
            problems = [ObjectProblem(key.kind, key.name, problem) for problem in error.problems]
            self._problems[key] = problems
            rest = _known_part(key, value)
            stands = "what it was before stands" if rest is None else "the rest of it is in force"
            _log.error("%s; %s", "; ".join(map(str, problems)), stands)
            if rest is None:
                return True
            parsed = rest
        self._objects[key] = parsed
        if key == _CONFIGURATION and isinstance(parsed, BGPConfiguration):
            self.ranges = service_ranges(parsed.spec)
        return True

    def _is_own(self, value: JSON) -> bool:
        spec = value.get("spec")
        return isinstance(spec, Mapping) and spec.get("node") == self._node

    def _of(self, model: type[R]) -> dict[str, R]:
        found = self._objects.values()
        return {obj.name: obj for obj in found if isinstance(obj, model)}

    def cluster(self) -> Cluster:
        """Nodes, peers and configurations by name."""
        return Cluster(self._of(Node), self._of(BGPPeer), self._of(BGPConfiguration))

    def pools(self, program_unencapsulated: bool) -> Pools:
        """What the IP pools say."""
        found = sorted(self._of(IPPool).items())
        return Pools(
            tuple(pool_policy(pool.spec, program_unencapsulated) for _, pool in found),
            services=tuple(sorted(self.ranges.whole)),
            told_on=self.ranges.reflected,
        )

    def filters(self) -> dict[str, Filter]:
        """The BGPFilters by name, compiled."""
        return {name: compile_filter(found) for name, found in self._of(BGPFilter).items()}

    def blocks(self) -> tuple[Net, ...]:
        """The confirmed blocks of this node, sorted."""
        blocks = {
            affinity.spec.net
            for affinity in self._of(BlockAffinity).values()
            if affinity.spec.state in _CONFIRMED
            and affinity.spec.type != "virtual"
            and not affinity.spec.deleted
        }
        if self._pod_cidrs:
            for node in self._of(KubernetesNode).values():
                blocks.update(_given_to(node))
        return tuple(sorted(blocks))

    def announced_services(self, node: str) -> frozenset[Net]:
        """What a node announces for services."""
        found = self._objects.get(Key("Node", node))
        excluded = found is not None and found.metadata.labels.get(EXCLUDED) == "true"
        return self.services.announced(self.ranges, excluded=excluded)
