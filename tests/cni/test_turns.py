"""Turns: so many work at once, and who waits lets another."""

from __future__ import annotations

import threading

from cni.turns import Turns
from tests.support.netns import eventually


def test_no_more_than_so_many_and_who_gives_up_lets_another() -> None:
    turns = Turns(2)
    working: list[int] = []
    leave = [threading.Event() for _ in range(4)]

    def work(number: int) -> None:
        turns.take()
        turns.take()  # it has one already
        working.append(number)
        leave[number].wait(20)
        turns.give_up()
        turns.give_up()  # it has none any more

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(working) == 2)
    first = working[0]
    leave[first].set()
    threads[first].join(20)
    eventually(lambda: len(working) == 3)
    for event in leave:
        event.set()
    for thread in threads:
        thread.join(20)
    assert sorted(working) == [0, 1, 2, 3]
