"""How work ends before its end: at its owner's wish, or for want of memory. Knows nothing of the rest but the person's errors."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

from qlora_ui.errors import UserError

Result = TypeVar("Result")


class Cancelled(Exception):
    """The owner asked to stop; raised at the next safe point of whatever was running, and no error."""


class OutOfMemory(Exception):
    """An allocation failed. Nothing of the attempt is held any more, so whoever began it may begin it again with less."""


class Diverged(UserError):
    """Loss or gradients were not finite in too many steps in a row, of which `first_step` was the first."""

    def __init__(self, message: str, *, first_step: int) -> None:
        super().__init__(message, field="learning_rate")
        self.first_step = first_step


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
