"""Locks by name."""

from __future__ import annotations

import threading

import pytest

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


def test_several_in_whatever_order() -> None:
    locks = KeyedLocks()
    rounds = [0]

    def work(names: str) -> None:
        for _ in range(200):
            with locks.hold_all(names):
                rounds[0] += 1

    threads = [threading.Thread(target=work, args=(names,)) for names in ("abc", "cba", "bca")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert rounds == [600]
    assert not locks._locks


def test_those_that_are_free() -> None:
    locks = KeyedLocks(lambda: pytest.fail("waits"))
    with locks.hold("b"):
        with locks.hold_free(["a", "b", "c", "a"]) as free:
            assert free == {"a", "c"}
            with locks.hold_free("abcd") as others:
                assert others == {"d"}
        with locks.hold_all("ac"):
            pass
    assert not locks._locks
