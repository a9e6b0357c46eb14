"""One thread does what many ask for, in the order in which they asked. Knows nothing of models or Gradio."""

from __future__ import annotations

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

News = TypeVar("News")
Work = Callable[[Callable[[News], None], Callable[[], bool]], None]
"""Tells its news with the first, and ends soon after the second says that it should."""
LOOK_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Nothing new. So many others are before you; at 0 it is your turn."""

    before: int


@dataclass(frozen=True, kw_only=True)
class _End:
    error: BaseException | None


class _Turn(Generic[News]):
    def __init__(self, work: Work[News]) -> None:
        self.work = work
        self.news: queue.SimpleQueue[News | _End] = queue.SimpleQueue()
        self.stopped = threading.Event()

    def take(self) -> None:
        """Whatever is raised is for who asked, and so this always comes to its end."""
        error: BaseException | None = None
        try:
            self.work(self.news.put, self.stopped.is_set)
        except BaseException as raised:  # noqa: BLE001 - who asked raises it
            error = raised
        if error is not None:
            traceback.clear_frames(error.__traceback__)  # else all that the work had in its hands lives as long as the error
        self.news.put(_End(error=error))


class Turns:
    """A line of people before the one thing that they share. Who comes first is served first, and who leaves is skipped."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._line: deque[_Turn[object]] = deque()  # the first of it is at work
        self._lock = threading.Lock()

    def ask(self, work: Work[News]) -> Iterator[News | Waiting]:
        """Stand in line, then yield the news of the work. Raises what the work raises.

        Yields at least every fifth of a second, so that a page that is gone is noticed while it waits. Closing the generator leaves
        the line, or asks the work to end; whoever is next waits for that, and the closing does not.
        """
        turn = _Turn(work)
        with self._lock:
            self._line.append(turn)  # type: ignore[arg-type]
            if len(self._line) == 1:
                threading.Thread(target=self._serve, name=self._name, daemon=True).start()
        try:
            yield Waiting(before=self._before(turn))
            while True:
                try:
                    news = turn.news.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    yield Waiting(before=self._before(turn))
                    continue
                if not isinstance(news, _End):
                    yield news
                elif news.error is None:
                    return
                elif isinstance(news.error, Exception):
                    raise news.error
                else:  # it was meant for a thread or a process, and would end the reader's
                    raise RuntimeError(f"{type(news.error).__name__}: {news.error}".rstrip(": ")) from news.error
        finally:
            turn.stopped.set()

    def _before(self, turn: _Turn[News]) -> int:
        with self._lock:
            line = [other for other in self._line if other is turn or not other.stopped.is_set()]
            return line.index(turn) if turn in line else 0  # type: ignore[arg-type]

    def _serve(self) -> None:
        """Until nobody is left."""
        while True:
            with self._lock:
                turn = self._line[0]
            if not turn.stopped.is_set():
                turn.take()
            with self._lock:
                self._line.popleft()
                if not self._line:
                    return
