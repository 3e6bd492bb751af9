"""BGP's error codes in words (RFC 4271 4.5, RFC 4486, RFC 5492, RFC 6608, RFC 8538, RFC 9384)."""

from __future__ import annotations

from api.net import V4, Net, format_address

_CODES = {
    1: "message header error",
    2: "OPEN message error",
    3: "UPDATE message error",
    4: "hold timer expired",
    5: "unexpected message",
    6: "session closed",
    7: "ROUTE-REFRESH message error",
}
_SUBCODES = {
    (1, 1): "connection not synchronized",
    (1, 2): "bad message length",
    (1, 3): "bad message type",
    (2, 1): "unsupported BGP version",
    (2, 2): "wrong AS number",
    (2, 3): "bad BGP identifier (router ID)",
    (2, 4): "unsupported optional parameter",
    (2, 6): "unacceptable hold time",
    (2, 7): "unsupported capability",
    (2, 8): "no supported AFI/SAFI",
    (3, 1): "malformed attribute list",
    (3, 2): "unrecognized well-known attribute",
    (3, 3): "missing well-known attribute",
    (3, 4): "attribute flags error",
    (3, 5): "attribute length error",
    (3, 6): "invalid ORIGIN",
    (3, 8): "invalid NEXT_HOP",
    (3, 9): "optional attribute error",
    (3, 10): "invalid network field",
    (3, 11): "malformed AS_PATH",
    (5, 1): "unexpected message in OpenSent",
    (5, 2): "unexpected message in OpenConfirm",
    (5, 3): "unexpected message in Established",
    (6, 1): "maximum number of prefixes reached",
    (6, 2): "administrative shutdown",
    (6, 3): "peer de-configured",
    (6, 4): "administrative reset",
    (6, 5): "connection rejected",
    (6, 6): "other configuration change",
    (6, 7): "connection collision",
    (6, 8): "out of resources",
    (6, 9): "hard reset",
    (6, 10): "BFD down",
}


def notification(code: int, subcode: int) -> str:
    """What a NOTIFICATION says: ``wrong AS number``."""
    words = _SUBCODES.get((code, subcode)) or _CODES.get(code)
    return words or f"error {code}/{subcode}"


def same_router_id(router_id: int) -> str:
    """Why an OPEN is refused for its BGP identifier, in one AS (RFC 6286 2.2)."""
    shown = format_address(V4, router_id)
    return f"the peer has our router ID, {shown}: each needs one of its own"


def refused(peer: Net, port: int) -> str:
    """Why a connection to a peer is not made."""
    return (
        f"connection to {format_address(*peer[:2])} port {port} refused, or closed at once: "
        "it doesn't speak BGP there, or doesn't know us as a peer"
    )
