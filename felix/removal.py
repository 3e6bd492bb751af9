"""Taking felix off a node: nothing of what it put into the kernel stays.

Policy is enforced no more then, so this is for a node without pods, or whose pods are another's.
"""

from __future__ import annotations

from contextlib import closing

from api.net import V4, V6
from felix import backends, conntrack_ended
from felix.network import Network
from felix.settings import settings


def remove_everything() -> list[str]:
    """Remove it, in the calling thread's network namespace; what could not be, in words.

    Settings of the kernel stay as they are: nobody tells whether others count on them by now. So do
    tracked connections. Raises OSError.
    """
    problems = backends.settle_others(None, settings())
    if backends.has_nftables():
        for version in (V4, V6):
            with closing(conntrack_ended.Ended(version)) as ended:
                ended.release(ended.held())
    with closing(Network()) as network:
        network.read()
        network.apply(0.0)
        problems += (f"{what}: {message}" for what, message in network.problems())
    return problems
