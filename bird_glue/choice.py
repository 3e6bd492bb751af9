"""Which engine runs on a node.

The annotation ``projectcalico.org/BGPEngine`` of the BGPConfiguration ``node.<name>``, else of
``default``, else the environment says ``exabgp``, ``bird`` or ``auto``. With ``auto`` it is
ExaBGP, but BIRD on a reflector with many clients, which costs ExaBGP and us seconds. A BIRD
that doesn't take its configuration, or doesn't stay up, is not chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from api.errors import Problem
from bird_glue.engine import BIRD, EXABGP
from bird_glue.settings import Cluster, ObjectProblem

ANNOTATION = "projectcalico.org/BGPEngine"
AUTO = "auto"
CHOICES = (AUTO, EXABGP, BIRD)
MANY_CLIENTS = 50
FEW_CLIENTS = 40  # that it doesn't change with every node that comes and goes


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine, and what was wished but can't be."""

    engine: str
    problems: tuple[ObjectProblem, ...] = ()


def choose(
    cluster: Cluster,
    node: str,
    default: str,
    *,
    clients: int,
    current: str,
    why_not_bird: Callable[[], str],
) -> Choice:
    """The engine of a node. ``default``: of the environment; ``clients``: that it reflects to.

    ``current``: the one it has. ``why_not_bird``: what BIRD lacks to run; empty if it would.
    """
    problems = []
    for name, text in (*_wishes(cluster, node), ("", default)):
        owner = ("BGPConfiguration", name) if name else ("Node", node)
        where = f"metadata.annotations[{ANNOTATION}]" if name else "MANX_BGP_ENGINE"
        if text not in CHOICES:
            problem = Problem(where, text, "one of " + ", ".join(CHOICES))
            problems.append(ObjectProblem(*owner, problem))
            continue
        wanted = text
        if text == AUTO:
            many = clients > MANY_CLIENTS or (current == BIRD and clients >= FEW_CLIENTS)
            wanted = BIRD if many else EXABGP
            where, text = "spec.bgp.routeReflectorClusterID", f"{clients} clients"
            owner = ("Node", node)
        if wanted == BIRD and (why := why_not_bird()):
            problem = Problem(where, text, why)
            problems.append(ObjectProblem(*owner, problem))
            wanted = EXABGP
        return Choice(wanted, tuple(problems))
    return Choice(EXABGP, tuple(problems))


def _wishes(cluster: Cluster, node: str) -> Iterator[tuple[str, str]]:
    for name in (f"node.{node}", "default"):
        found = cluster.configurations.get(name)
        if found and ANNOTATION in found.metadata.annotations:
            yield name, found.metadata.annotations[ANNOTATION]
