"""What a pod's annotations say about its traffic, as ``spec.qosControls`` of its endpoint.

Names, bounds, defaults and what goes with what are Calico's
(libcalico-go/lib/backend/k8s/conversion). ``kubernetes.io/ingress-bandwidth`` and
``egress-bandwidth`` count where Calico's own are absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from pydantic import TypeAdapter, ValidationError

from api.errors import Problem
from api.fields import DSCP

PREFIX = "qos.projectcalico.org/"
_KUBERNETES = {
    "ingressBandwidth": "kubernetes.io/ingress-bandwidth",
    "egressBandwidth": "kubernetes.io/egress-bandwidth",
}
_DIRECTIONS = ("ingress", "egress")

DEFAULT_BURST = 4 << 30  # bits
DEFAULT_PACKET_BURST = 5  # packets

# What follows "ingress" and "egress": least, most, what the numbers are.
_BOUNDS: Mapping[str, tuple[int, int, str]] = {
    "Bandwidth": (10**3, 10**15, "bits a second, from 1k to 1P"),
    "Burst": (10**3, (2**32 - 1) * 8, "bits, from 1k to 34359738360"),
    "Peakrate": (1010, 1010 * 10**12, "bits a second, from 1.01k to 1.01P"),
    "Minburst": (10**3, 10**8, "bytes, from 1k to 100M"),
    "PacketRate": (1, 10**4, "packets a second, from 1 to 10k"),
    "PacketBurst": (1, 10**4, "packets, from 1 to 10k"),
    "MaxConnections": (1, 2**32 - 1, "connections, from 1 to 4294967295"),
}
_NEEDS = {"Burst": "Bandwidth", "Minburst": "Peakrate", "PacketBurst": "PacketRate"}

# kubernetes/apimachinery, pkg/api/resource: a decimal number and what to multiply it by.
_QUANTITY = re.compile(
    r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)(?:([mkMGTPE]|[KMGTPE]i)?|[eE]([+-]?[0-9]{1,2}))"
)
_SUFFIXES = {
    "": Fraction(1),
    "m": Fraction(1, 1000),
    **{suffix: Fraction(1000 ** (power + 1)) for power, suffix in enumerate("kMGTPE")},
    **{f"{suffix}i": Fraction(1024 ** (power + 1)) for power, suffix in enumerate("KMGTPE")},
}
_LONGEST = 32  # characters

_dscp: TypeAdapter[int | str] = TypeAdapter(DSCP)


def quantity(text: str) -> int:
    """A Kubernetes quantity such as ``10M`` or ``1.5Gi``, rounded up. Raises ValueError."""
    found = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise ValueError(f"{text!r}: expected a quantity such as 10M or 1Gi")
    number, suffix, exponent = found.groups()
    factor = Fraction(10) ** int(exponent) if exponent else _SUFFIXES[suffix or ""]
    value = Fraction(number.rstrip(".")) * factor
    return -(-value.numerator // value.denominator)


def controls(annotations: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """``spec.qosControls`` as JSON, empty when nothing is limited, and what is wrong.

    What is wrong is left out of the result.
    """
    result: dict[str, Any] = {}
    problems: list[Problem] = []
    for direction in _DIRECTIONS:
        for name in _BOUNDS:
            _read(direction + name, name, annotations, result, problems)
        problems += _contradictions(direction, annotations, result)
        if f"{direction}Bandwidth" in result:
            result.setdefault(f"{direction}Burst", DEFAULT_BURST)
        if f"{direction}PacketRate" in result:
            result.setdefault(f"{direction}PacketBurst", DEFAULT_PACKET_BURST)
    if (text := annotations.get(f"{PREFIX}dscp")) is not None:
        try:
            result["dscp"] = _dscp.validate_python(text)
        except ValidationError:
            expected = "expected 0 to 63, or a name such as EF, AF11, CS1 (RFC 4594)"
            problems.append(Problem(f"{PREFIX}dscp", text, expected))
    return result, problems


def _read(
    field: str,
    name: str,
    annotations: Mapping[str, str],
    result: dict[str, Any],
    problems: list[Problem],
) -> None:
    for annotation in (PREFIX + field, _KUBERNETES.get(field, "")):
        text = annotations.get(annotation)
        if text is None:
            continue
        least, most, what = _BOUNDS[name]
        try:
            value = quantity(text)
        except ValueError:
            value = -1
        if least <= value <= most:
            result[field] = value
        else:
            problems.append(Problem(annotation, text, f"expected {what}"))
        return


def _contradictions(
    direction: str, annotations: Mapping[str, str], result: dict[str, Any]
) -> Iterator[Problem]:
    def drop(name: str, expected: str) -> Problem:
        del result[direction + name]
        annotation = f"{PREFIX}{direction}{name}"
        return Problem(annotation, annotations[annotation], expected)

    bandwidth = result.get(f"{direction}Bandwidth")
    peak = result.get(f"{direction}Peakrate")
    if peak is not None and (bandwidth is None or peak <= bandwidth):
        yield drop("Peakrate", f"expected more than {direction}Bandwidth, which is {bandwidth}")
    for name, needed in _NEEDS.items():
        if direction + name in result and direction + needed not in result:
            yield drop(name, f"expected {PREFIX}{direction}{needed} beside it")
