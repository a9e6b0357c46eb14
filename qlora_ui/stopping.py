"""How work is stopped at its owner's wish. Knows nothing of anything else in this project."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

Result = TypeVar("Result")


class Cancelled(Exception):
    """The owner asked to stop; raised at the next safe point of whatever was running, and no error."""


def abandonable(call: Callable[[], Result], should_stop: Callable[[], bool]) -> Result:
    """The call's result. It runs in a thread of its own, which is left to itself when asked to stop: then Cancelled is raised.

    For calls that cannot be told to stop and leave nothing behind: an import, a request to a network that hangs.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="abandonable")
    future = pool.submit(call)
    pool.shutdown(wait=False)
    while not wait([future], timeout=0.1).done:
        if should_stop():
            raise Cancelled
    return future.result()


def watched(work: Callable[[Callable[[], bool], Callable[[int], None]], Result]) -> Generator[int, None, Result]:
    """Run `work(should_stop, on_progress)` in a thread and yield its progress four times a second; its result is returned.

    Closing the generator, as a page that goes away does, asks the work to stop. For what can be told to stop.
    """
    stop, done = Event(), [0]

    def on_progress(count: int) -> None:
        done[0] = count

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="watched")
    future = pool.submit(work, stop.is_set, on_progress)
    pool.shutdown(wait=False)
    try:
        while not wait([future], timeout=0.25).done:
            yield done[0]
        return future.result()
    finally:
        stop.set()
