"""What ExaBGP is run as."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from api.net import parse_net
from bird_glue.config import Listen, Neighbor, environment, render
from kernel.netns import Namespace, inside
from tests.bird_glue.rawpeer import RawPeer
from tests.support.netns import connect, eventually, fresh_namespace, run

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


OWN, PEERS = "172.31.1.1", ("172.31.1.2", "172.31.1.3")
HOLD_SECONDS = 6
# ExaBGP as it is always run, but for the number of turns that sessions had, which is in a file
COUNTING = """
import os, runpy, sys
from exabgp.reactor.peer import Peer
counter, turns, run = os.open("turns", os.O_WRONLY | os.O_CREAT), 0, Peer.run
def counted(peer):
    global turns
    turns += 1
    os.pwrite(counter, b"%d" % turns, 0)
    return run(peer)
Peer.run = counted
program = sys.argv.pop(1)
sys.argv[0] = program
runpy.run_path(program, run_name="__main__")
"""


@contextlib.contextmanager
def exabgp(directory: Path) -> Iterator[Namespace]:
    """Run it with sessions for PEERS, which call; in the namespace next to theirs."""
    own = parse_net(OWN)
    sessions = [
        Neighbor(
            parse_net(peer), own, 64512, 64512, own.address, passive=True, hold_seconds=HOLD_SECONDS
        )
        for peer in PEERS
    ]
    configuration = directory / "exabgp.conf"
    configuration.write_text(render(sessions, directory / "exabgp.sock")[0])
    program = Path(__file__).parents[2] / "bird_glue" / "exabgp_main.py"
    settings = environment(Listen((OWN,)), directory / "exabgp.log")
    with fresh_namespace() as near, fresh_namespace() as far:
        connect(near, "eth0", far, "eth0", [f"{OWN}/24", f"{PEERS[0]}/24"])
        run(far, "ip", "address", "add", f"{PEERS[1]}/24", "dev", "eth0")
        with inside(near.fd), (directory / "out").open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", COUNTING, str(program), str(out.fileno()), configuration],
                cwd=directory,
                env=os.environ | settings,
                stdout=out,
                stderr=out,
                pass_fds=(out.fileno(),),
            )
        try:
            yield far
        finally:
            process.terminate()
            process.wait(30)


def call(namespace: Namespace, peer: str, hold: int) -> RawPeer:
    """A session, as soon as somebody listens."""
    made: list[RawPeer] = []

    def answered() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            made.append(RawPeer(namespace, peer, OWN, 64512, hold=hold))
        return bool(made)

    eventually(answered)
    return made[0]


def test_sessions_get_turns_when_there_is_something_to_do(tmp_path: Path) -> None:
    """Not in each round of ExaBGP's loop, of which there are thirteen to a KEEPALIVE here.

    That of ours is due, the peer's comes in, and then there are two to see that nothing is left to
    do. When no more of a peer's come, its hold timer expires all the same.
    """
    with exabgp(tmp_path) as namespace, call(namespace, PEERS[0], HOLD_SECONDS) as peer:

        def turns() -> int:
            return int((tmp_path / "turns").read_text())

        eventually(lambda: peer.keepalives >= 2)
        before, heard = turns(), peer.keepalives
        eventually(lambda: peer.keepalives >= heard + 2)
        assert turns() - before <= 8 * (peer.keepalives - heard)
        with call(namespace, PEERS[1], 3) as other:
            other.silent = True
            assert other.ended.wait(60)
            assert other.notifications == [(4, 0)]
        assert not peer.ended.is_set()
