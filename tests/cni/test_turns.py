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


def test_one_computes_and_while_the_kernel_is_slow_the_others_do() -> None:
    turns = Turns(8, alone=True)
    done: list[str] = []
    begun, leave, back = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        turns.compute()
        with turns.aside():  # is not known to be slow yet: nobody else computes
            begun.set()
            leave.wait(20)
        done.append("slow")
        turns.timed(1)
        with turns.aside():  # now it is
            back.wait(20)
        done.append("back")
        turns.rest()

    def other(name: str) -> None:
        turns.compute()
        turns.compute()  # it does already
        done.append(name)
        turns.rest()
        turns.rest()  # it does no more

    threads = [threading.Thread(target=slow)]
    threads[0].start()
    assert begun.wait(20)
    threads += [threading.Thread(target=other, args=(name,)) for name in "ab"]
    for thread in threads[1:]:
        thread.start()
    eventually(lambda: turns.waiting == 2)
    assert done == []
    leave.set()
    eventually(lambda: len(done) == 3)
    assert (done[0], sorted(done[1:])) == ("slow", ["a", "b"])
    back.set()
    for thread in threads:
        thread.join(20)
    assert done[-1] == "back"


def test_who_goes_on_comes_before_who_begins() -> None:
    turns = Turns(8, alone=True)
    turns.timed(1)
    order: list[str] = []
    away, back = threading.Event(), threading.Event()

    def first() -> None:
        turns.compute()
        with turns.aside():
            away.set()
            back.wait(20)
        order.append("goes on")
        turns.rest()

    def second() -> None:
        turns.compute()
        order.append("begins")
        turns.rest()

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert away.wait(20)
    turns.compute()
    threads.append(threading.Thread(target=second))
    threads[1].start()
    eventually(lambda: turns.waiting == 1)
    back.set()
    eventually(lambda: turns.waiting == 2)
    turns.give_up()
    for thread in threads:
        thread.join(20)
    assert order == ["goes on", "begins"]


def test_without_need_nobody_waits() -> None:
    turns = Turns(2)
    turns.compute()
    other = threading.Thread(target=turns.compute)
    other.start()
    other.join(20)
    assert not other.is_alive()
    with turns.aside():
        pass
    turns.rest()
