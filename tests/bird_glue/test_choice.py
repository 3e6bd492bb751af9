"""Which engine runs."""

from __future__ import annotations

import pytest

from api.bgp import BGPConfiguration
from bird_glue.choice import ANNOTATION, FEW_CLIENTS, MANY_CLIENTS, Choice, choose
from bird_glue.settings import Cluster

LACKS = "BIRD 2 on this machine"


def configuration(name: str, text: str) -> BGPConfiguration:
    metadata = {"name": name, "annotations": {ANNOTATION: text}}
    return BGPConfiguration.model_validate(
        {"apiVersion": "projectcalico.org/v3", "kind": "BGPConfiguration", "metadata": metadata}
    )


def chosen(
    *,
    default: str = "auto",
    clients: int = 0,
    current: str = "exabgp",
    lacks: str = "",
    **annotations: str,
) -> Choice:
    names = {"cluster": "default", "node": "node.n1", "other": "node.n2"}
    found = {names[key]: configuration(names[key], text) for key, text in annotations.items()}
    return choose(
        Cluster({}, {}, found),
        "n1",
        default,
        clients=clients,
        current=current,
        why_not_bird=lambda: lacks,
    )


@pytest.mark.parametrize(
    ("choice", "engine"),
    [
        (chosen(), "exabgp"),
        (chosen(clients=MANY_CLIENTS), "exabgp"),
        (chosen(clients=MANY_CLIENTS + 1), "bird"),
        (chosen(clients=MANY_CLIENTS, current="bird"), "bird"),
        (chosen(clients=FEW_CLIENTS, current="bird"), "bird"),
        (chosen(clients=FEW_CLIENTS - 1, current="bird"), "exabgp"),
        (chosen(clients=MANY_CLIENTS + 1, default="exabgp"), "exabgp"),
        (chosen(default="bird"), "bird"),
        (chosen(default="bird", cluster="exabgp"), "exabgp"),
        (chosen(cluster="exabgp", node="bird", other="exabgp"), "bird"),
        (chosen(other="bird"), "exabgp"),
        (chosen(default="bird", node="auto"), "exabgp"),
    ],
)
def test_who_says_something_first(choice: Choice, engine: str) -> None:
    assert choice == Choice(engine)


def test_wishes_that_cannot_be_are_named() -> None:
    without = chosen(cluster="bird", lacks=LACKS)
    assert without.engine == "exabgp"
    assert str(without.problems[0]) == (
        f"BGPConfiguration default: metadata.annotations[{ANNOTATION}]: 'bird': "
        "BIRD 2 on this machine"
    )
    many = chosen(clients=99, lacks=LACKS)
    assert many.engine == "exabgp"
    assert "Node n1: spec.bgp.routeReflectorClusterID: '99 clients'" in str(many.problems[0])
    wrong = chosen(node="frr", cluster="bird")
    assert wrong.engine == "bird"  # the next that says something
    assert "'frr': one of auto, exabgp, bird" in str(wrong.problems[0])
    assert "Node n1: MANX_BGP_ENGINE: 'x'" in str(chosen(default="x").problems[0])
