"""What the API server is told of single values that ``api`` checks in Python.

Keys are the validators themselves. Patterns are Go's (RE2); rules are CEL on ``self``, whose
messages are those of the validators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from api import (
    bgp,
    bgpfilter,
    clusternetworkpolicy,
    felix,
    fields,
    kubernetes,
    policy,
)
from api.fields import DSCP_NAMES, PROTOCOLS

Schema = dict[str, Any]
Validator = Callable[..., Any]

LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
DOMAIN_LABEL = "[a-zA-Z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?"
# no two '-' side by side, none at an end, at least one letter
PORT_NAME = "([0-9]+-)*[0-9]*[a-z][a-z0-9]*(-[a-z0-9]+)*"
DURATION_PARTS = r"(([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+"
OVER_9999 = "[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
OVER_999999999 = (
    "[1-3][0-9]{9}|4[01][0-9]{8}|42[0-8][0-9]{7}|429[0-3][0-9]{6}|4294[0-8][0-9]{5}"
    "|42949[0-5][0-9]{4}|429496[0-6][0-9]{3}|4294967[01][0-9]{2}|42949672[0-8][0-9]|429496729[0-5]"
)
BYTE = "0*([1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-5])"  # 1 to 255
BITS_16 = f"0*([0-9]{{1,4}}|{OVER_9999})"
BITS_32 = f"0*([0-9]{{1,9}}|{OVER_999999999})"
PLAIN_16 = f"(0|[1-9][0-9]{{0,3}}|{OVER_9999})"  # without leading zeros
PLAIN_32 = f"(0|[1-9][0-9]{{0,8}}|{OVER_999999999})"
ANY_COMMUNITY = f"{BITS_16}:{BITS_16}|{BITS_32}:{BITS_32}:{BITS_32}"
PORT_NUMBER = f"0*([1-9][0-9]{{0,3}}|{OVER_9999})"

MAX_IP = 45  # characters of an address
MAX_CIDR = 43
MOST = 1000  # of most values in one object, for a rule
MOST_RULES = 1024  # of a policy, in each direction
MOST_NETS = MOST_RULES * 256

INT_OR_STRING: Schema = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "x-kubernetes-int-or-string": True,
}

# Everything the parser takes, and some of what it does not: nobody counts parentheses here.
SPACE = r"[ \t]*"
WORD = "[A-Za-z0-9_./-]+"
TEXT = "(\"[^\"]*\"|'[^']*')"
COMPARISON = (
    rf"{WORD}{SPACE}((==|!=|contains|(starts|ends){SPACE}with){SPACE}{TEXT}"
    rf"|(not{SPACE})?in{SPACE}\{{{SPACE}({TEXT}{SPACE},{SPACE})*({TEXT}{SPACE})?\}})"
)
OPERAND = rf"[!( \t]*((all|global)\({SPACE}\)|has\({SPACE}{WORD}{SPACE}\)|{COMPARISON})[) \t]*"
SELECTOR = rf"^({SPACE}|{OPERAND}((&&|\|\|){OPERAND})*)$"

# Two errors are an error, too: a pattern that cannot be compiled refuses the object.
IS_REGEXP = "''.matches(self) || !''.matches(self)"
FAMILY = "(isIP(self) ? ip(self).family() : cidr(self).ip().family())"
STRICT = "[cidr(self)].all(c, c.masked() == c)"

AFTER_COLON = "int(self.substring(self.lastIndexOf(':') + 1))"
PEER_IP = (
    r"self.matches(r'^([0-9.]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}$')"
    " ? isIP(self.startsWith('[') ? self.substring(1, self.indexOf(']')) : self.split(':')[0])"
    f" && {AFTER_COLON} > 0 && {AFTER_COLON} < 65536 : isIP(self)"
)
AS_NUMBER = (
    "type(self) == int ? self >= 0 && self <= 4294967295"
    " : self.matches('^[0-9]{1,10}$') ? int(self) <= 4294967295"
    " : self.matches('^[0-9]{1,5}[.][0-9]{1,5}$') && self.split('.').all(n, int(n) <= 65535)"
)
PROTOCOL = (
    f"type(self) == int ? self >= 1 && self <= 255 : self in {list(PROTOCOLS)}"
    " || self.matches('^[0-9]{1,9}$') && int(self) >= 1 && int(self) <= 255"
)
NUMBERED_PORT = (
    "type(self) == int ? self >= 1 && self <= 65535"
    " : self.matches('^[0-9]{1,9}(:[0-9]{1,9})?$')"
    " && self.split(':').all(n, int(n) >= 1 && int(n) <= 65535)"
    f" && int(self.split(':')[0]) <= {AFTER_COLON}"
)
PORT = f"{NUMBERED_PORT} || size(self) <= 15 && self.matches('^{PORT_NAME}$')"
DSCP = (
    f"type(self) == int ? self >= 0 && self <= 63 : self.upperAscii() in {list(DSCP_NAMES)}"
    " || self.matches('^[0-9]{1,2}$') && int(self) <= 63"
)
COMMUNITY = (
    "self.matches('^[0-9]+:[0-9]+(:[0-9]+)?$') && self.split(':').all(n, int(n)"
    " <= (self.split(':').size() == 2 ? 65535 : 4294967295))"
)


class Value(NamedTuple):
    """How a value is checked: in words people read, or where there may be too many, cheaply.

    The API server refuses rules whose worst case would take too long. ``most`` is how many
    values of this kind an object may hold for ``exact`` to be used.
    """

    exact: Schema
    cheap: Schema
    most: int


Entry = tuple[Validator, Value]


def _func(annotated: Any) -> Validator:
    """The last validator of a field's type."""
    marks = get_args(annotated)
    return next(m.func for m in reversed(marks) if isinstance(m, AfterValidator | BeforeValidator))


def _expected(annotated: Any) -> str:
    """What a validator says would be right."""
    try:
        _func(annotated)("\0")
    except PydanticCustomError as error:
        return error.message()
    raise TypeError(f"{annotated!r} refuses nothing")


def _cel(
    annotated: Any,
    rule: str,
    cheap: Schema | None = None,
    *,
    says: str = "",
    most: int = MOST,
    **both: Any,
) -> Entry:
    """A rule, and without rules what ``cheap`` says; ``both`` holds in either case."""
    checks = [{"rule": rule, "message": says or _expected(annotated)}]
    exact = {"x-kubernetes-validations": checks} | both
    return _func(annotated), Value(exact, (cheap or {}) | both, most)


def _text(annotated: Any, pattern: str, length: int) -> Entry:
    rule = f"self.matches(r'^({pattern})$')"
    return _cel(annotated, rule, {"pattern": f"^({pattern})$"}, maxLength=length)


def _address(annotated: Any, version: int) -> Entry:
    rule = f"isIP(self) && ip(self).family() == {version}"
    return _cel(annotated, rule, {"format": f"ipv{version}"}, maxLength=MAX_IP)


def _mixed(
    annotated: Any, rule: str, bounds: tuple[int, int], pattern: str, length: int, most: int = MOST
) -> Entry:
    """A number within bounds, or text."""
    cheap = {"minimum": bounds[0], "maximum": bounds[1], "pattern": f"^({pattern})$"}
    return _cel(annotated, rule, cheap, most=most, maxLength=length, **INT_OR_STRING)


def _plain(annotated: Any, schema: Schema) -> Entry:
    return _func(annotated), Value(schema, schema, 0)


IP: Schema = {"anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}
IP_OR_CIDR: Schema = {"anyOf": [*IP["anyOf"], {"format": "cidr"}]}

VALUES: dict[Validator, Value] = dict(
    (
        _text(fields.Name, SUBDOMAIN, 253),
        _text(fields.InterfaceName, r"\*|[a-zA-Z0-9_.-]{1,15}", 15),
        _text(fields.InterfaceFilter, r"[a-zA-Z0-9:._+-]{1,15}", 15),
        _text(fields.IgnoredInterface, r"[a-zA-Z0-9_.*-]{2,15}|[a-zA-Z0-9_.-]", 15),
        _text(fields.PortName, PORT_NAME, 15),
        _text(fields.Duration, rf"[-+]?(0|{DURATION_PARTS})", 64),
        _text(bgpfilter.FilterInterface, r"[a-zA-Z0-9_.*-]{1,15}", 15),
        _text(policy.Path, "/[^? #]*", 1024),
        _text(
            clusternetworkpolicy.DomainName, rf"(\*\.)?({DOMAIN_LABEL}\.)+{DOMAIN_LABEL}\.?", 253
        ),
        _text(felix.OpenstackRegion, LABEL, 46),
        _cel(fields.Ip, "isIP(self)", IP, maxLength=MAX_IP),
        _address(fields.IPv4, 4),
        _address(fields.IPv6, 6),
        _cel(fields.Cidr, STRICT, format="cidr", maxLength=MAX_CIDR, most=MOST_NETS),
        _cel(
            fields.NetText,
            f"isIP(self) || (isCIDR(self) && {STRICT})",
            IP_OR_CIDR,
            maxLength=MAX_CIDR,
        ),
        _cel(fields.AnyCidr, "isIP(self) || isCIDR(self)", IP_OR_CIDR, maxLength=MAX_CIDR),
        _cel(kubernetes.Block, "isCIDR(self)", {"format": "cidr"}, maxLength=MAX_CIDR),
        _cel(bgp.PeerIp, PEER_IP, maxLength=64),
        _cel(bgp.CommunityValue, COMMUNITY, {"pattern": f"^({ANY_COMMUNITY})$"}),
        _plain(
            bgp.CommunityOrName, {"pattern": f"^({ANY_COMMUNITY}|{SUBDOMAIN})$", "maxLength": 253}
        ),
        _plain(
            bgpfilter.PlainCommunity,
            {"pattern": f"^({PLAIN_16}:{PLAIN_16}|{PLAIN_32}:{PLAIN_32}:{PLAIN_32})$"},
        ),
        _cel(
            felix.Interval,
            "!self.startsWith('-')",
            {"pattern": rf"^\+?(0|{DURATION_PARTS})$"},
            says="a duration that is not negative",
        ),
        _plain(felix.NumericPort, {"pattern": "^[0-9]+(:[0-9]+)?$"}),
        _cel(
            felix.AnyCidrV4,
            f"{FAMILY} == 4",
            {"pattern": "^[0-9./]+$"},
            says="an IPv4 address or CIDR",
        ),
        _plain(bgpfilter.CidrV4, {"pattern": "^[0-9./]+$"}),
        _plain(bgpfilter.CidrV6, {"pattern": ":"}),
        _cel(fields.Regexp, IS_REGEXP, says="a regular expression", maxLength=1024),
        _mixed(
            fields.AsNumber, AS_NUMBER, (0, (1 << 32) - 1), rf"{BITS_32}|{BITS_16}\.{BITS_16}", 11
        ),
        _mixed(
            fields.Protocol, PROTOCOL, (1, 255), f"{'|'.join(PROTOCOLS)}|{BYTE}", 10, MOST_RULES
        ),
        _mixed(fields.Port, PORT, (1, 65535), f"{PORT_NUMBER}(:{PORT_NUMBER})?|{PORT_NAME}", 19),
        _mixed(fields.DSCP, DSCP, (0, 63), f"(?i:{'|'.join(DSCP_NAMES)})|[0-5]?[0-9]|6[0-3]", 4),
        _plain(
            kubernetes.NetworkPolicyPortValue,
            {"minimum": 1, "maximum": 65535, "pattern": f"^({PORT_NAME})$", "maxLength": 15}
            | INT_OR_STRING,
        ),
        _plain(fields.Timestamp, {"format": "date-time"}),
        _cel(
            fields.Selector,
            f"self.matches(r'''{SELECTOR}''')",
            {"pattern": SELECTOR},
            says="a selector such as app == 'web' && !has(legacy)",
            most=100,
            maxLength=1024,
        ),
        (bgp.zero_is_default, Value({"minimum": 0}, {"minimum": 0}, 0)),
    )
)

# The API server's budget for one kind is spent on more likely mistakes than in these.
CHEAP = frozenset((("EntityRule", "notNets"),))

# Lists in which a value stands once, as Calico's own CRDs declare them; all others are atomic.
SETS = {
    "BGPConfigurationSpec": ("ignoredInterfaces",),
    "CalicoNodeStatusSpec": ("classes",),
    "EgressPeer": ("networks", "domainNames"),
    "EntityRule": ("nets", "notNets"),
    "HTTPMatch": ("methods",),
    "HostEndpointSpec": ("expectedIPs", "profiles"),
    "HostEndpointTemplate": ("interfaceCIDRs",),
    "IPPoolSpec": ("allowedUses",),
    "IPReservationSpec": ("reservedCIDRs",),
    "NetworkPolicySpec": ("types", "performanceHints"),
    "NetworkSetSpec": ("nets",),
    "ServiceAccountMatch": ("names",),
    "StagedKubernetesNetworkPolicySpec": ("policyTypes",),
}
