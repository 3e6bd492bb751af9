"""Why an address could not be given. Every message says what to do about it."""

from __future__ import annotations


class IpamError(Exception):
    """No address. Nothing of the request is left behind."""


class NoPoolError(IpamError):
    """No pool may be used for the request."""


class PoolExhaustedError(IpamError):
    """Every pool that may be used is full."""


class BlockLimitError(IpamError):
    """The node's blocks are full, and it may not claim another."""


class AddressInUseError(IpamError):
    """The address that was asked for belongs to somebody."""


class AddressUnusableError(IpamError):
    """The address that was asked for lies in no pool, or in a block this node may not use."""


class ContentionError(IpamError):
    """Others changed the same objects again and again, more often than we tried."""
