"""The network configuration, validated: what comes on stdin.

CNI spec 1.1.0, section 1. Unknown configuration keys are left alone, as the spec
demands; a known one of the wrong type or out of range is refused with code 7.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Any, Self, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.errors import Problem
from api.net import parse_interface, parse_net
from cni.attachment import NAME_LENGTH
from cni.errors import (
    DECODING_FAILURE,
    INCOMPATIBLE_VERSION,
    CniError,
    invalid_configuration,
)

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
OLDEST = VERSIONS[0]  # which is meant where none is named; libcni then writes ""
NEWEST = VERSIONS[-1]
VALID_ATTACHMENTS = "cni.dev/valid-attachments"
# The first version of the spec that knows the command.
SINCE = {"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}

# Seconds that an ADD waits for the pod's policy at most, unless told otherwise; and as long as
# it may be told: the client gives up after 90.
POLICY_WAIT = 10
LONGEST_WAIT = 60

IPAM_TYPES = ("manx-ipam", "calico-ipam")  # our own
_OFTEN_SEEN_BYTES = 16 << 10  # of a configuration that is worth remembering

_EXECUTABLE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
M = TypeVar("M", bound=BaseModel)

_log = logging.getLogger(__name__)


def _switch(value: object) -> object:
    """Calico writes "true" and "false" where JSON has a word of its own."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _named(version: Any) -> Any:
    """The version of the spec that is meant."""
    return OLDEST if version == "" else version


def _mtu(value: int) -> int:
    """0 stands for what the uplink carries; 68 is the least of IPv4 (RFC 791)."""
    if value and not 68 <= value <= 65535:
        raise PydanticCustomError("mtu", "expected 0, or 68 to 65535")
    return value


Switch = Annotated[bool, BeforeValidator(_switch)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class IpamRoute(_Model):
    """One of ``ipam.routes``: what ``manx-ipam`` under another plugin passes on."""

    dst: str
    gw: str | None = None

    @field_validator("dst")
    @classmethod
    def _is_net(cls, text: str) -> str:
        parse_net(text)
        return text

    @field_validator("gw")
    @classmethod
    def _is_address(cls, text: str | None) -> str | None:
        if text is not None and not parse_net(text).is_host:
            raise PydanticCustomError("address", "expected an address")
        return text


class Ipam(_Model):
    """``ipam``: which families and pools, with Calico's keys; or which other plugin to ask."""

    type: Annotated[str, Field(pattern=f"^{_EXECUTABLE.pattern}$")] = "manx-ipam"
    assign_ipv4: Switch = True
    assign_ipv6: Switch = False
    ipv4_pools: list[str] = Field(default_factory=list)
    ipv6_pools: list[str] = Field(default_factory=list)
    routes: list[IpamRoute] = Field(default_factory=list)

    @property
    def delegated(self) -> bool:
        """Whether another plugin gives the addresses: ``type`` is its executable."""
        return self.type not in IPAM_TYPES

    @model_validator(mode="after")
    def _some_family(self) -> Self:
        if not self.delegated and not self.families:
            raise PydanticCustomError("family", "expected assign_ipv4, assign_ipv6 or both")
        return self

    @property
    def families(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """The IP versions to assign, each with the pools to take from (none named: any)."""
        wanted = ((4, self.assign_ipv4, self.ipv4_pools), (6, self.assign_ipv6, self.ipv6_pools))
        return tuple((version, tuple(pools)) for version, assign, pools in wanted if assign)


class ContainerSettings(_Model):
    """``container_settings``: of the container's own network. The keys are Calico's."""

    allow_ip_forwarding: Switch = False


class FeatureControl(_Model):
    """``feature_control``: what pods may ask for by annotation. The keys are Calico's."""

    ip_addrs_no_ipam: Switch = False
    floating_ips: Switch = False


class Dns(_Model):
    """``dns``: passed on to the runtime in the result."""

    nameservers: list[str] | None = None
    domain: str | None = None
    search: list[str] | None = None
    options: list[str] | None = None


class RuntimeDns(_Model):
    """``runtimeConfig.dns`` (CNI conventions, capability ``dns``)."""

    servers: list[str] | None = None
    searches: list[str] | None = None
    options: list[str] | None = None


class RuntimeConfiguration(_Model):
    """``runtimeConfig``: what the runtime tells of this container, by capability.

    ``ips`` may have lengths of prefixes, which count for nothing here.
    """

    ips: list[str] = Field(default_factory=list)
    mac: str = ""
    dns: RuntimeDns = RuntimeDns()


NOTHING_TOLD = RuntimeConfiguration()


class _Arguments(_Model):
    ips: list[str] = Field(default_factory=list)


class Arguments(_Model):
    """``args``: the older way to say the same, by ``args.cni.ips``."""

    cni: _Arguments = _Arguments()


class ValidAttachment(_Model):
    """One element of ``cni.dev/valid-attachments``."""

    container_id: str = Field(alias="containerID")
    ifname: str


class ResultInterface(_Model):
    """One of a result's ``interfaces``. ``sandbox`` is empty for one of the node's."""

    model_config = ConfigDict(extra="allow")

    name: str
    mac: str | None = None
    mtu: int | None = None
    sandbox: str | None = None


class ResultAddress(_Model):
    """One of a result's ``ips``; ``interface`` counts from 0 in ``interfaces``."""

    model_config = ConfigDict(extra="allow")

    address: str
    interface: int | None = None

    @field_validator("address")
    @classmethod
    def _is_address(cls, text: str) -> str:
        parse_interface(text)
        return text


class Result(_Model):
    """A ``prevResult``: the result of the plugins that ran before, or of the whole ADD."""

    model_config = ConfigDict(extra="allow")

    interfaces: list[ResultInterface] | None = None
    ips: list[ResultAddress] | None = None
    routes: list[dict[str, Any]] | None = None
    dns: dict[str, Any] | None = None


class NetworkConfiguration(_Model):
    """The plugin's configuration object as it arrives on stdin."""

    cni_version: Annotated[str, AfterValidator(_named)] = Field(default=OLDEST, alias="cniVersion")
    name: Annotated[str, Field(max_length=NAME_LENGTH, pattern=f"^{NAME.pattern}$")]
    type: str
    mtu: Annotated[int, AfterValidator(_mtu)] = 0
    ipam: Ipam = Ipam()
    dns: Dns = Dns()
    container_settings: ContainerSettings = ContainerSettings()
    feature_control: FeatureControl = FeatureControl()
    policy_setup_timeout_seconds: Annotated[int, Field(ge=0)] = POLICY_WAIT
    # A Result, RuntimeConfiguration and Arguments where they matter: not for a DEL.
    previous: Any = Field(default=None, alias="prevResult")
    runtime: Any = Field(default=None, alias="runtimeConfig")
    args: Any = None
    valid_attachments: list[ValidAttachment] | None = Field(default=None, alias=VALID_ATTACHMENTS)

    @property
    def policy_wait(self) -> int:
        """Seconds that an ADD waits for the pod's policy; see ``LONGEST_WAIT``."""
        return min(self.policy_setup_timeout_seconds, LONGEST_WAIT)


def find_version(configuration: bytes) -> str:
    """The version to answer in: that of the configuration if we speak it, else the newest.

    Of a configuration without one the oldest.
    """
    try:
        document = orjson.loads(configuration)
    except orjson.JSONDecodeError:
        return NEWEST
    version = _named(document.get("cniVersion", "")) if isinstance(document, dict) else None
    return version if version in VERSIONS else NEWEST


def parse_often(data: bytes, command: str) -> NetworkConfiguration:
    """``parse_configuration``, which for one ADD or DEL after the other has the same to read."""
    often_seen = _OFTEN_SEEN.get(command)
    if often_seen is None or len(data) > _OFTEN_SEEN_BYTES:
        return parse_configuration(data, command)
    return often_seen(data, command)


def parse_configuration(data: bytes, command: str) -> NetworkConfiguration:
    """Validate a network configuration. Raises CniError with code 1, 6 or 7."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise CniError(
            DECODING_FAILURE, f"network configuration on stdin: not JSON: {error}"
        ) from None
    if not isinstance(document, dict):
        raise CniError(
            DECODING_FAILURE,
            f"stdin: {type(document).__name__}: expected a JSON object, the network configuration",
        )
    _check_version(_named(document.get("cniVersion", "")), command)
    parsed = validate(NetworkConfiguration, document)
    if parsed.policy_wait < parsed.policy_setup_timeout_seconds:
        _log.warning(
            "network %s: policy_setup_timeout_seconds: %d: an ADD waits for %d at most",
            parsed.name,
            parsed.policy_setup_timeout_seconds,
            LONGEST_WAIT,
        )
    return parsed


# Apart, since DELs may come with what each ADD returned.
_OFTEN_SEEN = {verb: lru_cache(maxsize=16)(parse_configuration) for verb in ("ADD", "DEL")}


def _check_version(version: object, command: str) -> None:
    """The version must be one that we speak and that has the command."""
    if not isinstance(version, str):
        raise invalid_configuration([Problem("cniVersion", version, "expected text")])
    if version not in VERSIONS:
        raise CniError(
            INCOMPATIBLE_VERSION,
            f"cniVersion: {version!r}: expected one of {', '.join(VERSIONS)}",
        )
    since = SINCE.get(command, OLDEST)
    if VERSIONS.index(version) < VERSIONS.index(since):
        raise CniError(
            INCOMPATIBLE_VERSION, f"cniVersion: {version!r}: {command} exists since {since}"
        )


def validate(model: type[M], document: object, path: str = "") -> M:
    """The document as a model. Raises CniError with code 7; ``path`` is where it lies."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid_configuration(list(_problems(error, path))) from None


def _problems(error: ValidationError, start: str) -> Iterable[Problem]:
    for detail in error.errors(include_url=False):
        path = start
        for step in detail["loc"]:
            path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
        if detail["type"] == "missing":
            yield Problem(path, None, "required")
            continue
        expected = re.sub("^Input should be", "expected", detail["msg"])
        yield Problem(path, detail["input"], re.sub(r"^\w+ should", "expected to", expected))
