"""How work is stopped at its owner's wish. Knows nothing of anything else in this project."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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
