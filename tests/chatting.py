"""People at the chat, each simulated by what their page sends to the real app and hears from it. Needs no browser."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from gradio_client.utils import apply_diff
from serving import Served

Result = TypeVar("Result")
PLACE = re.compile(r"(\d+) (?:people are|person is) before you")


@dataclass
class Heard:
    """One question, how it was asked, and what came back. Moments are of `time.perf_counter`; a text for each column.

    `seen` is when the page first said that the question was seen, and Stop could be pressed; `places` are those told since.
    """

    given: dict[str, Any]
    turns: list[Any]
    sent: float
    texts: list[str] = field(default_factory=list)
    note: str = ""
    places: list[int] = field(default_factory=list)
    seen: float | None = None
    began: float | None = None
    asked_to_stop: float | None = None
    left: bool = False
    ended: float = 0.0


class Person:
    """One page. What it sends for each field is what the field holds at first, but for those that are given by elem_id or label."""

    def __init__(self, client: httpx.AsyncClient, config: dict[str, Any], session: str) -> None:
        self._client, self.session = client, session
        self.heard = Heard(given={}, turns=[], sent=0)
        self._parts = {part["id"]: part for part in config["components"]}
        self._dependencies = config["dependencies"]

    async def open(self) -> None:
        """What a page does at first to learn who can be talked to."""
        for dependency in self._dependencies:
            is_first = any(event in ("load", "change") for _, event in dependency["targets"])
            if is_first and "run-select" in map(self._name, dependency["outputs"]):
                await self._send(dependency, {})
                if dependency["queue"]:
                    async for _ in self._shown(dependency):
                        pass

    async def ask(self, given: dict[str, Any], patience: float | None = None, leaves: bool = False) -> Heard:
        """Send, and hear the answer to its end. When the patience, in seconds, is over: press Stop, or be gone."""
        # Of what a press on Send begins, the answer is what goes through Gradio's queue.
        send = next(one for one in self._dependencies if ("chat-send", "click") in self._targets(one) and one["queue"])
        turns = given.get("chat-tuned", [])
        self.heard = heard = Heard(given=given, turns=turns, sent=time.perf_counter())
        await self._send(send, given)
        stopping: asyncio.Task[None] | None = None
        async with contextlib.aclosing(self._shown(send)) as updates, asyncio.TaskGroup() as tasks:
            async for shown in updates:
                self._hear(heard, shown)
                if patience is not None and not leaves and not stopping:
                    stopping = tasks.create_task(self._stop(heard, given, patience))
                if patience is not None and leaves and time.perf_counter() > heard.sent + patience:
                    heard.left = True
                    return heard
            heard.ended = time.perf_counter()
            if stopping:
                stopping.cancel()
        return heard

    async def _stop(self, heard: Heard, given: dict[str, Any], patience: float) -> None:
        await asyncio.sleep(patience)
        stop = next(one for one in self._dependencies if ("chat-stop", "click") in self._targets(one))
        heard.asked_to_stop = time.perf_counter()
        await self._send(stop, given)

    def _hear(self, heard: Heard, shown: dict[str, Any]) -> None:
        heard.seen = heard.seen or time.perf_counter()
        if isinstance(shown.get("chat-note"), str):
            heard.note = shown["chat-note"]
            heard.places += [int(place) for place in PLACE.findall(heard.note)]
        before = len(heard.given.get("chat-tuned", []))
        answers = [words(shown.get(column), before) for column in ("chat-tuned", "chat-base")]
        if answers[0]:
            heard.texts = [answer for answer in answers if answer]
            heard.turns = shown["chat-tuned"]
            heard.began = heard.began or time.perf_counter()

    async def _send(self, dependency: dict[str, Any], given: dict[str, Any]) -> None:
        data = []
        for part in dependency["inputs"]:
            properties = self._parts[part]["props"]
            data.append(given.get(self._name(part), given.get(properties.get("label"), properties.get("value"))))
        call = {"data": data, "fn_index": dependency["id"], "session_hash": self.session, "event_data": None, "trigger_id": None}
        path = "queue/join" if dependency["queue"] else "run/predict"
        (await self._client.post(f"/gradio_api/{path}", json=call)).raise_for_status()

    async def _shown(self, dependency: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """What the fields show, by elem_id, at each update. Gradio sends only how an update differs from the one before."""
        names = [self._name(part) for part in dependency["outputs"]]
        before: list[Any] = []
        async with self._client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            async for line in stream.aiter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                data = (message.get("output") or {}).get("data")
                if message.get("msg") == "process_generating" and data:
                    before = [apply_diff(old, diff) for old, diff in zip(before, data, strict=True)] if before else data
                    yield dict(zip(names, before, strict=True))
                elif message.get("msg") == "process_completed":
                    assert message["success"], message
                    return

    def _targets(self, dependency: dict[str, Any]) -> list[tuple[str, str]]:
        return [(self._name(part), event) for part, event in dependency["targets"]]

    def _name(self, part: int | None) -> str:
        return str(self._parts.get(part, {}).get("props", {}).get("elem_id") or "")


def words(turns: Any, before: int) -> str:
    """The answer that a column ends with, if it does, after so many turns that were there before."""
    if not isinstance(turns, list) or len(turns) < before + 2 or turns[-1]["role"] != "assistant":
        return ""
    return "".join(part["text"] for part in turns[-1]["content"])


@contextlib.asynccontextmanager
async def people(app: Served, count: int) -> AsyncIterator[list[Person]]:
    """So many pages of an app, opened."""
    limits = httpx.Limits(max_connections=4 * count, max_keepalive_connections=4 * count)
    async with httpx.AsyncClient(base_url=app.url, limits=limits, timeout=httpx.Timeout(60, read=600)) as client:
        config = (await client.get("/config")).raise_for_status().json()
        found = [Person(client, config, f"person{number}") for number in range(count)]
        await asyncio.gather(*(person.open() for person in found))
        yield found


async def until(there: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not there():
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def waiting_in_line(app: Served, asked: list[dict[str, Any]]) -> Iterator[None]:
    """Meanwhile people ask this, one after the other is in the line, and then they are all gone."""
    there, over = threading.Event(), threading.Event()

    async def play() -> None:
        async with people(app, len(asked)) as found:
            tasks = [asyncio.create_task(person.ask(given)) for person, given in zip(found, asked, strict=True)]
            await until(lambda: any(person.heard.began for person in found) and all(person.heard.note for person in found))
            there.set()
            await asyncio.to_thread(over.wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(play()), daemon=True)
    thread.start()
    assert there.wait(timeout=60)
    try:
        yield
    finally:
        over.set()
        thread.join()


async def crowd(app: Served, speaker: str, count: int, seconds: float, seed: int, max_new_tokens: int = 32) -> list[Heard]:
    """All of them ask and ask again, each in a conversation of its own with a mark in every question; some lose patience."""
    heard: list[Heard] = []
    async with people(app, count) as all_of_them:
        until = time.perf_counter() + seconds

        async def one(number: int, person: Person) -> None:
            chance, turns = random.Random(f"{seed} {number}"), list[Any]()
            for asked in range(1_000_000):
                if time.perf_counter() > until:
                    return
                mark = f"<{number}.{asked}>"
                given = {
                    "run-select": speaker,
                    "chat-input": f"{mark} which word is {mark}?" + " and so on" * chance.choice([0, 5, 40]),
                    "compare-switch": chance.random() < 0.3,
                    "chat-tuned": turns,
                    "chat-base": turns,
                    "Temperature": 1.0,
                    "Max new tokens": max_new_tokens,
                    "Seed": 1000 * number + asked,
                }
                patience = chance.choice([None, None, None, chance.uniform(0, 3), chance.uniform(0, 3)])
                answer = await person.ask(given, patience, leaves=chance.random() < 0.3)
                heard.append(answer)
                if answer.left:
                    person.session += "'"  # another page of the same person
                    await person.open()
                turns = answer.turns if answer.texts and len(answer.turns) < 6 and not answer.left else []

        async with asyncio.TaskGroup() as tasks:
            for number, person in enumerate(all_of_them):
                tasks.create_task(one(number, person))
    return heard


def play(scene: Coroutine[Any, Any, Result]) -> Result:
    """In a thread of its own: Playwright keeps the main thread's loop."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, scene).result()


def overtaken(heard: list[Heard]) -> list[Heard]:
    """Whom somebody got before who had come later: their place in the line rose."""
    return [one for one in heard if any(after > before for before, after in itertools.pairwise(one.places))]


def squeezed(text: str) -> str:
    """Without white space, which the page may show in another way."""
    return "".join(text.split())
