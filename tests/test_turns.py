"""A line of people before one thing: served in order, told their place, and never stuck."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qlora_ui.turns import Turns, Waiting

Tell = Callable[[Any], None]
ShouldStop = Callable[[], bool]


class Gate:
    """Work that tells `one`, waits for its gate or for its end, and tells `two`."""

    def __init__(self) -> None:
        self.begun, self.open, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, tell: Tell, should_stop: ShouldStop) -> None:
        tell("one")
        self.begun.set()
        while not self.open.wait(0.01) and not should_stop():
            pass
        tell("two")
        self.ended.set()


def at_once(word: str) -> Callable[[Tell, ShouldStop], None]:
    return lambda tell, should_stop: tell(word)


def told(news: Iterator[Any]) -> list[Any]:
    return [one for one in news if not isinstance(one, Waiting)]


def until(news: Iterator[Any], wish: Any) -> None:
    assert next(one for one in news if one == wish) == wish


def test_who_comes_first_is_served_first_and_each_is_told_how_many_are_before() -> None:
    turns, gate, served = Turns("test"), Gate(), list[int]()
    first = turns.ask(gate)
    until(first, "one")
    others = [turns.ask(lambda tell, should_stop, at=at: served.append(at)) for at in range(5)]
    assert [next(other) for other in others] == [Waiting(before=at + 1) for at in range(5)]
    gate.open.set()
    assert told(first) == ["two"]
    for other in reversed(others):
        assert told(other) == []
    assert served == [0, 1, 2, 3, 4]


def test_who_leaves_is_skipped_and_those_behind_move_up() -> None:
    turns, gate, served = Turns("test"), Gate(), list[str]()
    first = turns.ask(gate)
    until(first, "one")
    leaving, staying = turns.ask(lambda *_: served.append("left")), turns.ask(lambda *_: served.append("stayed"))
    assert (next(leaving), next(staying)) == (Waiting(before=1), Waiting(before=2))
    leaving.close()
    until(staying, Waiting(before=1))
    gate.open.set()
    assert told(staying) == []
    assert served == ["stayed"]


def test_closing_asks_the_work_to_end_does_not_wait_for_it_and_the_next_one_does() -> None:
    turns, busy = Turns("test"), threading.Event()

    def stubborn(tell: Tell, should_stop: ShouldStop) -> None:
        tell("begun")
        busy.wait()

    first = turns.ask(stubborn)
    until(first, "begun")
    first.close()  # returns, though the work goes on
    second = turns.ask(at_once("second"))
    assert next(second) == Waiting(before=0)
    assert next(second) == Waiting(before=0)
    busy.set()
    assert told(second) == ["second"]


@pytest.mark.parametrize("error", [ValueError("odd"), IndexError("list index out of range"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_is_raised_reaches_who_asked_as_an_exception_and_the_next_one_is_served(error: BaseException) -> None:
    turns = Turns("test")

    def fail(tell: Tell, should_stop: ShouldStop) -> None:
        raise error

    with pytest.raises(Exception, match=r"\w") as raised:
        told(turns.ask(fail))
    assert raised.value is error or raised.value.__cause__ is error
    assert told(turns.ask(at_once("next"))) == ["next"]


def test_what_the_failed_work_held_is_let_go_while_its_error_is_still_looked_at() -> None:
    turns, held = Turns("test"), list[Any]()

    class Large:
        pass

    def fail(tell: Tell, should_stop: ShouldStop) -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise MemoryError

    with pytest.raises(MemoryError) as raised:
        told(turns.ask(fail))
    gc.collect()
    assert held[0]() is None
    assert raised.value.__traceback__ is not None


def test_a_crowd_with_random_stops_is_served_whole_and_nobody_hears_anothers_words() -> None:
    turns, heard, done = Turns("test"), dict[int, list[Any]](), threading.Barrier(21)

    def words(at: int) -> Callable[[Tell, ShouldStop], None]:
        def work(tell: Tell, should_stop: ShouldStop) -> None:
            for word in range(20):
                if should_stop():
                    return
                tell((at, word))

        return work

    def person(at: int) -> None:
        for _ in range(30):
            news = (one for one in turns.ask(words(at)) if not isinstance(one, Waiting))
            heard.setdefault(at, []).extend(itertools.islice(news, 20 - at))
            news.close()
        done.wait()

    for at in range(20):
        threading.Thread(target=person, args=(at,), daemon=True).start()
    done.wait(timeout=30)
    assert all(heard[at] == [(at, word) for word in range(20 - at)] * 30 for at in range(20))
