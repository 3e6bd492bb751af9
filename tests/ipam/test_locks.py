"""Locks by name."""

from __future__ import annotations

import threading

from ipam.locks import KeyedLocks


def test_who_finds_a_lock_held_says_so_before_waiting() -> None:
    waiting = threading.Event()
    locks = KeyedLocks(waiting.set)
    order: list[str] = []

    def second() -> None:
        with locks.hold("a"):
            order.append("second")

    thread = threading.Thread(target=second)
    with locks.hold("a"):
        with locks.hold("b"):
            assert not waiting.is_set()
        thread.start()
        assert waiting.wait(20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]
    assert not locks._locks  # none is kept that nobody wants
