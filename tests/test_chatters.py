"""Many people at the real app's chat at once: each in turn, told the place, never another's words; who leaves frees the device."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from chatting import crowd, overtaken, people, play, until, waiting_in_line
from playwright.sync_api import Browser, expect
from serving import Served, go, open_page, served
from training import trained

from qlora_ui.runs import Run, Workspace
from tests.benchmarks.chatters import mixed

LONG = 1024  # tokens, as many as the page allows: this model says about 500, in seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of a model that reads and says more than anybody waits for."""
    home = tmp_path_factory.mktemp("chatters")
    workspace = Workspace.open(home / "home")
    config = tiny.tiny_model(workspace.models / tiny.NAME) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2 * LONG}))
    return trained(workspace, tiny.tiny_rows(home / "rows.json"), max_steps=2, eval_steps=100, save_steps=100)


@pytest.fixture(scope="module")
def app(run: Run) -> Iterator[Served]:
    with served(run.workspace.root) as running:
        play(crowd(running, run.id, count=1, seconds=0.1, seed=0))  # the libraries are imported, the model is loaded
        yield running


def question(run: Run, words: str, tokens: int) -> dict[str, Any]:
    fields = {"run-select": run.id, "chat-input": words, "chat-tuned": [], "chat-base": []}
    return {**fields, "Temperature": 0, "Max new tokens": tokens}


def test_twenty_people_are_answered_in_turn_and_nobody_hears_another(app: Served, run: Run) -> None:
    heard = play(crowd(app, run.id, count=20, seconds=2, seed=1, max_new_tokens=8))
    assert len({one.given["chat-input"].split(">")[0].split(".")[0] for one in heard if one.texts}) > 9
    assert [one for one in heard if not one.ended and not one.left] == []  # nobody waits for ever
    assert {place for one in heard for place in one.places} >= {1, 2, 5}
    assert overtaken(heard) == []
    assert mixed(run, heard) == []


@pytest.mark.parametrize("when", ["answering", "waiting"])
def test_a_page_that_goes_away_frees_the_device_at_once(app: Served, run: Run, when: str) -> None:
    async def scene() -> float:
        async with people(app, 3) as (first, second, last):
            there = [asyncio.create_task(first.ask(question(run, "Go on for ever", LONG)))]
            await until(lambda: first.heard.began)
            if when == "waiting":
                there.append(asyncio.create_task(second.ask(question(run, "And I", LONG))))
                await until(lambda: second.heard.places)
            asked = asyncio.create_task(last.ask(question(run, "Question 3", 4)))
            await until(lambda: last.heard.places)
            for task in there:
                task.cancel()
            gone = time.perf_counter()
            heard = await asked
            assert heard.places[0] == len(there)
            assert heard.began is not None
            return heard.began - gone

    assert play(scene()) < 2  # in which a tiny model does not say all; on an idle machine half a second


@pytest.mark.browser
def test_the_page_says_how_many_are_before_and_stop_leaves_the_line(browser: Browser, app: Served, run: Run) -> None:
    page = open_page(browser, app.url)
    go(page, "Chat")
    note, send, stop = page.locator("#chat-note"), page.locator("#chat-send"), page.locator("#chat-stop")
    expect(page.locator("#run-select input")).to_have_value(re.compile(run.id))
    with waiting_in_line(app, [question(run, "Go on for ever", LONG)] * 2):
        page.locator("#chat-input textarea").fill("Question 1")
        send.click()
        expect(note).to_contain_text("2 people are before you.")
        stop.click()
        expect(send).to_be_enabled()
        expect(note).not_to_contain_text("before you")
        expect(page.locator("#chat-input textarea")).to_have_value("Question 1")
    page.get_by_label("Max new tokens").first.fill("8")
    page.get_by_label("Max new tokens").first.blur()
    send.click()
    expect(note).to_contain_text("tokens/s")
    expect(send).to_be_enabled()
    faster = page.get_by_label("Faster, takes 0.0 GiB")  # it computes in float32, where each CPU gains
    faster.check()
    page.locator("#chat-input textarea").fill("Question 2")
    send.click()
    expect(page.locator("#chat-tuned .bot")).to_have_count(2)
    expect(send).to_be_enabled()
    expect(faster).to_be_checked()
    assert page.faults == []  # type: ignore[attr-defined]
