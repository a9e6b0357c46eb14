"""People at the chat, each simulated by what their page sends to the real app and hears from it. Needs no browser."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from gradio_client.utils import apply_diff
from serving import Served


@dataclass
class Heard:
    """What came back for one question. `seconds` are since it was sent: of the first words, of a wish to stop, of the end."""

    words: str = ""
    note: str = ""
    places: list[int] = field(default_factory=list)
    began: float | None = None
    asked_to_stop: float | None = None
    ended: float = 0.0


class Person:
    """One page. What it sends for each field is what the field holds, but for those that are given by the elem_id."""

    def __init__(self, client: httpx.AsyncClient, config: dict[str, Any], number: int) -> None:
        self._client, self.session = client, f"person{number}"
        self._parts = {part["id"]: part for part in config["components"]}
        self._dependencies = config["dependencies"]

    def _event(self, elem_id: str) -> dict[str, Any]:
        """What a click on that button calls."""
        return next(
            dependency
            for dependency in self._dependencies
            if any(event == "click" and self._elem_id(part) == elem_id for part, event in dependency["targets"])
        )

    def _elem_id(self, part: int) -> str:
        return str(self._parts.get(part, {}).get("props", {}).get("elem_id") or "")

    def _call(self, dependency: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        data = [given.get(self._elem_id(part), self._parts[part]["props"].get("value")) for part in dependency["inputs"]]
        return {"data": data, "fn_index": dependency["id"], "session_hash": self.session, "event_data": None, "trigger_id": None}

    async def ask(self, given: dict[str, Any], stop_after: float | None = None, leave_after: float | None = None) -> Heard:
        """Send, and hear the answer to its end; stop it, or close the page, so many seconds after the first words.

        Negative: so long after it was sent, words or not.
        """
        send, heard, since = self._event("chat-send"), Heard(), time.perf_counter()
        (await self._client.post("/gradio_api/queue/join", json=self._call(send, given))).raise_for_status()
        async with contextlib.aclosing(self._outputs(send)) as outputs:
            async for shown in outputs:
                now = time.perf_counter() - since
                self._note(heard, shown, now)
                for after, leaves in ((stop_after, False), (leave_after, True)):
                    due = after is not None and (-after if after < 0 else (heard.began or 1e9) + after)
                    if due and now >= due and heard.asked_to_stop is None:
                        heard.asked_to_stop = now
                        if leaves:
                            return heard
                        stop = self._call(self._event("chat-stop"), given)
                        (await self._client.post("/gradio_api/run/predict", json=stop)).raise_for_status()
        heard.ended = time.perf_counter() - since
        return heard

    def _note(self, heard: Heard, shown: dict[str, Any], now: float) -> None:
        if isinstance(shown.get("chat-note"), str):
            heard.note = shown["chat-note"]
            if place := re.search(r"(\d+) (people are|person is) before you", heard.note):
                heard.places.append(int(place[1]))
        turns = shown.get("chat-tuned")
        if isinstance(turns, list) and turns and turns[-1]["role"] == "assistant":
            heard.words = "".join(part["text"] for part in turns[-1]["content"])
            if heard.words and heard.began is None:
                heard.began = now

    async def _outputs(self, dependency: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What is shown in each field from update to update, by elem_id. Gradio sends only how it differs from before."""
        names = [self._elem_id(part) for part in dependency["outputs"]]
        before: list[Any] | None = None
        async with self._client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            async for line in stream.aiter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                data = message.get("output", {}).get("data") if message.get("output") else None
                if message.get("msg") == "process_generating" and data:
                    before = data if before is None else [apply_diff(old, diff) for old, diff in zip(before, data, strict=True)]
                    yield dict(zip(names, before, strict=True))
                elif message.get("msg") == "process_completed":
                    if data:
                        yield dict(zip(names, data, strict=True))
                    if not message.get("success", True):
                        raise AssertionError(f"the handler failed: {message}")
                    return


@contextlib.asynccontextmanager
async def people(app: Served, count: int) -> AsyncIterator[list[Person]]:
    """So many pages of an app."""
    limits = httpx.Limits(max_connections=3 * count, max_keepalive_connections=3 * count)
    async with httpx.AsyncClient(base_url=app.url, limits=limits, timeout=httpx.Timeout(30, read=600)) as client:
        config = (await client.get("/config")).raise_for_status().json()
        yield [Person(client, config, number) for number in range(count)]
