"""A route as a peer is to be told it, in no engine's language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from api.net import Net
from bird_glue.messages import Attributes


class Announcement(NamedTuple):
    """``next_hop`` None: the address this node speaks to the peer from.

    The AS path is without our own number; who speaks eBGP puts that in front.
    """

    next_hop: Net | None
    attributes: Attributes


Announcements = Mapping[Net, Announcement]  # by prefix
