"""Types of single fields, with Calico's checks: addresses, names, ports, protocols, durations.

Every refusal is a ``PydanticCustomError`` whose message says what would be right.
"""

from __future__ import annotations

import ipaddress
import math
import re
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, get_args

from annotated_types import MaxLen
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError, PydanticKnownError, core_schema

from api.net import Net, parse_as_number, parse_interface, parse_net

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
LABEL_RE = re.compile(_LABEL)
SUBDOMAIN_RE = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_QUALIFIED_RE = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")
_INTERFACE_RE = re.compile(r"[a-zA-Z0-9_.-]{1,15}")
_INTERFACE_FILTER_RE = re.compile(r"[a-zA-Z0-9:._+-]{1,15}")
_IGNORED_INTERFACE_RE = re.compile(r"[a-zA-Z0-9_.*-]{1,15}")
_CONTAINER_ID_RE = re.compile(r"[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?")
_PORT_NAME_RE = re.compile(r"(?!.*--)(?=.*[a-z])[a-z0-9](?:[-a-z0-9]{0,13}[a-z0-9])?")
_MAC_RE = re.compile(r"[0-9a-fA-F]{2}(?:([:-])[0-9a-fA-F]{2})(?:\1[0-9a-fA-F]{2}){4}")
_TIMESTAMP_RE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[-+]\d\d:\d\d)", re.ASCII
)
_DURATION_RE = re.compile(r"[-+]?(?:0|(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+)")
_DURATION_PART_RE = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")

SUBDOMAIN = (
    "a DNS subdomain: at most 253 lower-case letters, digits, '-' and '.', "
    "each part beginning and ending with a letter or digit"
)
LABEL = (
    "a DNS label: at most 63 lower-case letters, digits and '-', "
    "beginning and ending with a letter or digit"
)
QUALIFIED_NAME = (
    "[DNS subdomain/]name, the name at most 63 letters, digits, '-', '_', '.', "
    "beginning and ending with a letter or digit"
)

PORT_NAME = "a port name: at most 15 lower-case letters, digits and single '-', at least one letter"

PROTOCOLS = {"TCP": 6, "UDP": 17, "ICMP": 1, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
PORT_PROTOCOLS = frozenset((6, 17, 132))  # TCP, UDP, SCTP


def refuse(expected: str) -> PydanticCustomError:
    """An error for a validator to raise: ``expected`` says what would be right."""
    return PydanticCustomError("manx", "{expected}", {"expected": expected})


def is_label(text: str) -> bool:
    """Whether it is a DNS label (RFC 1123), as namespaces and tiers are named."""
    return len(text) <= 63 and LABEL_RE.fullmatch(text) is not None


def is_subdomain(text: str) -> bool:
    """Whether it is a DNS subdomain (RFC 1123), as most resources are named."""
    return len(text) <= 253 and SUBDOMAIN_RE.fullmatch(text) is not None


def is_qualified_name(text: str) -> bool:
    """Whether it can be the key of a label: ``example.com/name`` or ``name``."""
    prefix, slash, name = text.rpartition("/")
    if slash and not is_subdomain(prefix):
        return False
    return len(name) <= 63 and _QUALIFIED_RE.fullmatch(name) is not None


def is_label_value(text: str) -> bool:
    """Whether it can be the value of a label; the empty text can."""
    return not text or (len(text) <= 63 and _QUALIFIED_RE.fullmatch(text) is not None)


def is_port_name(text: str) -> bool:
    """Whether it can be the name of a container's port."""
    return _PORT_NAME_RE.fullmatch(text) is not None


def _check(test: Callable[[str], object], expected: str) -> AfterValidator:
    def validate(text: str) -> str:
        try:
            right = test(text)
        except ValueError:
            right = False
        if not right:
            raise refuse(expected)
        return text

    return AfterValidator(validate)


def _version(text: str, version: int) -> bool:
    return ipaddress.ip_address(text).version == version and "%" not in text


def _is_mac(text: str) -> bool:
    return _MAC_RE.fullmatch(text) is not None


def _cidr(text: str) -> Net:
    if "/" not in text:
        raise ValueError(text)
    return parse_net(text)


Name = Annotated[str, _check(is_subdomain, SUBDOMAIN)]
ContainerId = Annotated[
    str, _check(_CONTAINER_ID_RE.fullmatch, "letters, digits and '-', none at either end")
]
InterfaceName = Annotated[
    str,
    _check(
        lambda text: text == "*" or _INTERFACE_RE.fullmatch(text),
        "an interface name: 1 to 15 letters, digits, '_', '.', '-'",
    ),
]
InterfaceFilter = Annotated[
    str,
    _check(
        _INTERFACE_FILTER_RE.fullmatch,
        "an interface name, or its beginning and '+': 1 to 15 letters, digits, ':', '.', '_', '-'",
    ),
]
IgnoredInterface = Annotated[
    str,
    _check(
        lambda text: text != "*" and _IGNORED_INTERFACE_RE.fullmatch(text),
        "an interface name of 1 to 15 characters; '*' may stand for some of them, not for all",
    ),
]
Mac = Annotated[str, _check(_is_mac, "a MAC address such as ee:ee:ee:ee:ee:ee")]
Ip = Annotated[str, _check(lambda text: "/" not in text and parse_net(text), "an IP address")]
IPv4 = Annotated[str, _check(lambda text: _version(text, 4), "an IPv4 address")]
IPv6 = Annotated[str, _check(lambda text: _version(text, 6), "an IPv6 address")]
Cidr = Annotated[
    str, _check(_cidr, "a CIDR such as 10.0.0.0/24 without bits beyond its prefix length")
]
NetText = Annotated[
    str,
    _check(parse_net, "an IP address, or a CIDR without bits beyond its prefix length"),
]
InterfaceV4 = Annotated[
    str,
    _check(
        lambda text: parse_interface(text)[0].version == 4,
        "an IPv4 address with the length of its network, such as 172.31.1.11/24",
    ),
]
InterfaceV6 = Annotated[
    str,
    _check(
        lambda text: parse_interface(text)[0].version == 6,
        "an IPv6 address with the length of its network, such as fd00:1::11/64",
    ),
]
AnyCidr = Annotated[str, _check(parse_interface, "an IP address or CIDR")]


class Stored:
    """The check of a selector, to give as the context, by those who read what has been stored.

    With it nothing is too long that is ``AtMost`` so long: Calico has had these limits only since
    version 3.34, and what was written before is in force. Without ``check`` it refuses nothing.
    """

    def __init__(self, check: Callable[[str], object] | None = None) -> None:
        self._check = check

    def __call__(self, text: str) -> None:
        """Raises ValueError when ``check`` does."""
        if self._check is not None:
            self._check(text)


stored = Stored()


class AtMost(MaxLen):
    """How long a list may be that is written now."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Refuses a list that is longer, unless it is ``Stored``."""

        def check(value: list[Any], info: ValidationInfo) -> list[Any]:
            if len(value) > self.max_length and not isinstance(info.context, Stored):
                bounds = {"max_length": self.max_length, "actual_length": len(value)}
                raise PydanticKnownError("too_long", {"field_type": "List", **bounds})
            return value

        return core_schema.with_info_after_validator_function(check, handler(source))


class SelectorMark:
    """Marks a field whose text is a selector."""


def _selector(text: str, info: ValidationInfo) -> str:
    if len(text) > 1024 and not isinstance(info.context, Stored):
        raise refuse("a selector of at most 1024 characters")
    if text and info.context is not None:
        try:
            info.context(text)
        except ValueError as error:
            raise refuse(f"a selector: {error}") from None
    return text


SELECTOR = SelectorMark()
# The syntax is the business of a layer above: whoever parses gives its check as the context.
Selector = Annotated[str, AfterValidator(_selector), SELECTOR]
PortName = Annotated[str, _check(is_port_name, PORT_NAME)]


def _is_regexp(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about character classes that may change
            re.compile(text)
    except re.error:
        return False
    return True


Regexp = Annotated[str, _check(_is_regexp, "a regular expression")]


class _AnyCase:
    """Beside a ``Literal``: its values are accepted in any case, and become as written there."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        known = {value.lower(): value for value in get_args(source)}

        def in_our_case(value: object) -> object:
            return known.get(value.lower(), value) if isinstance(value, str) else value

        return core_schema.no_info_before_validator_function(in_our_case, handler(source))


ANY_CASE = _AnyCase()


def parse_port(port: int | str) -> tuple[int, int] | None:
    """First and last number of a validated port or range; None when it is a name."""
    if isinstance(port, int):
        return port, port
    first, colon, last = port.partition(":")
    return (int(first), int(last)) if colon else None


def _port(value: object) -> int | str:
    expected = "a port from 1 to 65535, a range such as 8000:8080, or a port's name"
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise refuse(expected)
    if isinstance(value, str):
        parts = value.split(":")
        if not (len(parts) <= 2 and all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts)):
            if is_port_name(value):
                return value
            raise refuse(f"{expected} ({PORT_NAME})")
        first, last = int(parts[0]), int(parts[-1])
    else:
        first = last = value
    if not 1 <= first <= 65535 or not 1 <= last <= 65535:
        raise refuse(expected)
    if first > last:
        raise refuse("a range whose first port is not greater than its last")
    return first if first == last else f"{first}:{last}"


Port = Annotated[int | str, BeforeValidator(_port)]


def protocol_number(protocol: int | str) -> int:
    """The IP protocol number of a validated protocol: 6 for TCP."""
    return protocol if isinstance(protocol, int) else PROTOCOLS[protocol]


def _protocol(value: object) -> int | str:
    if isinstance(value, str):
        if re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        elif value in PROTOCOLS:
            return value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 255:
        return value
    raise refuse(f"one of {', '.join(PROTOCOLS)}, or a number from 1 to 255")


Protocol = Annotated[int | str, BeforeValidator(_protocol)]


def _as_number(value: object) -> int:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    try:
        return parse_as_number(text if isinstance(text, str) else "")
    except ValueError:
        raise refuse(
            'an AS number from 0 to 4294967295, or in dotted form and in quotes, such as "1.10"'
            " (without them YAML reads the number 1.1)"
        ) from None


AsNumber = Annotated[int, BeforeValidator(_as_number)]

_UNITS = {
    "ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6,
    "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9,
}  # fmt: skip


def _duration(value: object) -> timedelta:
    """Go's notation. Rounded up to whole microseconds, so that nothing becomes zero."""
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str) or not _DURATION_RE.fullmatch(value):
        raise refuse("a duration such as 90s, 1m30s or 500ms")
    nanoseconds = sum(
        Decimal(number) * _UNITS[unit] for number, unit in _DURATION_PART_RE.findall(value)
    )
    if nanoseconds >= 1 << 63:
        raise refuse("a duration of less than 292 years")
    microseconds = math.ceil(nanoseconds / 1000)
    return timedelta(microseconds=-microseconds if value[0] == "-" else microseconds)


def format_duration(duration: timedelta) -> str:
    """As Go writes it: ``1m30s``, ``500ms``."""
    microseconds = duration // timedelta(microseconds=1)
    sign, microseconds = ("-" if microseconds < 0 else ""), abs(microseconds)
    if microseconds == 0:
        return "0s"
    if microseconds < 1000:
        return f"{sign}{microseconds}µs"
    if microseconds < 1_000_000:
        return f"{sign}{_decimal(microseconds, 1000)}ms"
    minutes, rest = divmod(microseconds, 60_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{_decimal(rest, 1_000_000)}s"
    if hours:
        return f"{sign}{hours}h{minutes}m{text}"
    return f"{sign}{minutes}m{text}" if minutes else f"{sign}{text}"


def _decimal(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    digits = len(str(unit)) - 1
    return f"{whole}.{rest:0{digits}}".rstrip("0").rstrip(".")


Duration = Annotated[
    timedelta, BeforeValidator(_duration), PlainSerializer(format_duration, return_type=str)
]


def _is_timestamp(text: str) -> bool:
    return _TIMESTAMP_RE.fullmatch(text) is not None and bool(datetime.fromisoformat(text))


Timestamp = Annotated[str, _check(_is_timestamp, "a time such as 2030-01-31T12:00:00Z (RFC 3339)")]
# A policy's place among others. Written as Go does: 10, not 10.0.
Order = Annotated[float, PlainSerializer(lambda order: int(order) if order.is_integer() else order)]
Number = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # as Go's int
PortNumber = Annotated[int, Field(ge=1, le=65535)]

DSCP_NAMES = {
    "DF": 0, "EF": 46,
    "AF11": 10, "AF12": 12, "AF13": 14, "AF21": 18, "AF22": 20, "AF23": 22,
    "AF31": 26, "AF32": 28, "AF33": 30, "AF41": 34, "AF42": 36, "AF43": 38,
    "CS0": 0, "CS1": 8, "CS2": 16, "CS3": 24, "CS4": 32, "CS5": 40, "CS6": 48,
}  # fmt: skip


def _dscp(value: object) -> int | str:
    if isinstance(value, str):
        if value.upper() in DSCP_NAMES:
            return value.upper()
        if re.fullmatch(r"[0-9]{1,2}", value):
            value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 63:
        return value
    raise refuse("a number from 0 to 63, or a name such as EF, AF11, CS1 (RFC 4594)")


DSCP = Annotated[int | str, BeforeValidator(_dscp)]
