"""Turns are taken in the order in which they were asked for, one at a time, and given back whatever happens."""

from __future__ import annotations

import threading
import time

import pytest

from orchestrator.service.store.turns import Turns


def test_threads_come_in_the_order_in_which_they_asked():
    turns, order = Turns(), list[int]()
    threads = [threading.Thread(target=lambda n=n: come(n)) for n in range(20)]

    def come(number: int) -> None:
        with turns:
            order.append(number)

    with turns:
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(turns._line) < number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(20))


def test_there_is_never_more_than_one_inside():
    turns, inside, most = Turns(), list[int](), list[int]()

    def work() -> None:
        for _ in range(200):
            with turns:
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 1600
    assert set(most) == {1}


def test_a_thread_that_would_wait_for_itself_is_told_and_keeps_its_turn():
    turns = Turns()
    with turns:
        with pytest.raises(RuntimeError, match="has its turn already"), turns:
            raise AssertionError("it came in twice")
        other = threading.Thread(target=lambda: turns.__enter__(), daemon=True)
        other.start()
        other.join(0.05)
        assert other.is_alive()
    other.join()


def test_a_turn_is_given_back_by_whoever_fails():
    turns = Turns()
    with pytest.raises(ValueError, match="broken"), turns:
        raise ValueError("broken")
    with turns:
        pass
