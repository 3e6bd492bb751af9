"""What the KubeControllersConfiguration ``default`` says of the loops."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from api.clusterinformation import is_locked
from api.controllers import AutoHostEndpointConfig, KubeControllersConfiguration
from api.registry import parse_as
from datastore.interface import JSON, Datastore, Key, NotFoundError

CONFIGURATION = Key("KubeControllersConfiguration", "default")
_CLUSTER_INFORMATION = Key("ClusterInformation", "default")

_PERIOD = 300.0
_GRACE = 900.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Seconds. ``grace`` 0: nothing is collected, only audited. ``idle``: why nothing is done.

    ``hosts``: which host endpoints are to be made; None: nobody says, so all stays as it is.
    """

    period: float = _PERIOD
    grace: float = _GRACE
    idle: str | None = None
    hosts: AutoHostEndpointConfig | None = None


def read_settings(store: Datastore) -> Settings:
    """The settings at this moment. Raises StoreError, InvalidObjectError.

    As in Calico the controllers that run are those the object names; without the object all run.
    """
    if is_locked(_value(store, _CLUSTER_INFORMATION)):
        return Settings(
            idle="ClusterInformation(default): spec.datastoreReady: false: the datastore is being"
            " moved; afterwards: manxctl datastore migrate unlock"
        )
    value = _value(store, CONFIGURATION)
    if not value:
        return Settings()
    configuration: Any = parse_as(CONFIGURATION.kind, value)
    assert isinstance(configuration, KubeControllersConfiguration)
    node = configuration.spec.controllers.node
    if node is None:
        return Settings(idle=f"{CONFIGURATION}: spec.controllers: names no node controller")
    period = _seconds(node.reconciler_period, _PERIOD)
    if period <= 0:
        return Settings(idle=f"{CONFIGURATION}: spec.controllers.node.reconcilerPeriod: 0s")
    grace = max(0.0, _seconds(node.leak_grace_period, _GRACE))
    return Settings(max(1.0, period), grace, hosts=node.host_endpoint or AutoHostEndpointConfig())


def _seconds(duration: timedelta | None, default: float) -> float:
    return default if duration is None else duration.total_seconds()


def _value(store: Datastore, key: Key) -> JSON:
    try:
        return store.get(key).value
    except NotFoundError:
        return {}
