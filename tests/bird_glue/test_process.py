"""What ExaBGP is run as."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from bird_glue.exabgp_main import LONGEST_PAUSE, call_again_soon
call_again_soon()
import exabgp.reactor.peer
delay = exabgp.reactor.peer.Delay()
for _ in range(50):
    delay.increase()
assert 1 < delay._next <= LONGEST_PAUSE, delay._next
delay.reset()
assert delay._next == 0
"""


def test_a_peer_is_called_again_soon_however_long_it_was_away() -> None:
    """Of its own accord ExaBGP lets up to a minute pass, which nothing in its settings bounds."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=30)
