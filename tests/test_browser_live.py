"""An open page while a run goes on: what it shows follows by itself, in place, and survives its server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from playwright.sync_api import Browser, Page, expect
from serving import go, open_page, served

from qlora_ui.events import Finished, Log, Phase, Planned, Step
from qlora_ui.runs import Run, Workspace

pytestmark = pytest.mark.browser
MINUTE = 60_000
ATTACK = "<img src=x onerror=\"document.body.dataset.broken='yes'\">"


def take_step(run: Run, number: int) -> None:
    run.append(Step(step=number, loss=1 + 1 / number, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=9.0, memory_gib=1.0, epoch=0.1))


def says(page: Page, words: str) -> None:
    expect(page.locator("#status-line .status")).to_contain_text(words, timeout=MINUTE)


def test_a_page_follows_a_run_in_place_and_goes_on_after_a_restart_of_its_server(
    browser: Browser, workspace: Workspace, rows: Path
) -> None:
    run = tiny.tiny_run(workspace, rows)
    run.adapter.mkdir()  # it can be chosen in the chat: a choice that the restarted server has not heard of
    run.append(Planned(total_steps=50, train_rows=8, held_out_rows=2, tokens=80, trained_tokens=40))
    run.append(Phase(name="training"))
    run.append(Log(text=ATTACK))
    for number in range(1, 6):
        take_step(run, number)
    with run.lock().acquire(), served(workspace.root, fresh=True) as app:
        page = open_page(browser, app.url)
        says(page, "training 5/50")
        expect(page.locator("#device-chip details")).to_be_visible(timeout=MINUTE)  # the warm-up has ended: no more news of it
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.evaluate("document.querySelector('#status-line .status').mark = 'mine'")
        take_step(run, 6)
        says(page, "training 6/50")
        assert page.evaluate("document.querySelector('#status-line .status').mark") == "mine"
        assert {re.sub(r".*/gradio_api/", "", url) for url in asked} == {"component_server/"}  # a step redraws nothing through Gradio
        expect(page.locator("#progress .bar")).to_have_attribute("aria-valuenow", "12")

        go(page, "Train")
        expect(page.locator("#tiles")).to_contain_text("6 / 50")
        expect(page.locator("#loss-plot")).to_have_attribute("data-points", "6")
        expect(page.locator("#log-box pre")).to_contain_text("onerror=")
        assert page.evaluate("document.body.dataset.broken") is None
        take_step(run, 7)
        expect(page.locator("#loss-plot")).to_have_attribute("data-points", "7")
        expect(page.locator("#log-box pre")).to_contain_text(re.compile("step 6 .*step 7 ", re.DOTALL))
        page.get_by_text("More curves", exact=True).click()
        expect(page.locator("[data-curve=tokens_per_second][data-points='7']")).to_contain_text("9")
        take_step(run, 8)
        expect(page.locator("[data-curve=learning_rate][data-points='8']")).to_contain_text("1.0e-4")
        expect(page.locator("#tiles time")).to_have_text(re.compile(r"\d\d:\d\d"))
        expect(page.locator("#stop-button")).to_be_enabled()
        assert page.locator("#log-box pre").evaluate("box => box.childNodes.length") == run_lines(run)

        app.kill()
        take_step(run, 9)
        says(page, "The app does not answer. It said last: tiny · training 8/50")
        with served(workspace.root, app.port):
            expect(page.locator("#status-line .status")).to_have_text(re.compile("^tiny · training 9/50"), timeout=MINUTE)
            expect(page.locator("#loss-plot")).to_have_attribute("data-points", "9")
            expect(page.locator("[data-curve=memory_gib]")).to_have_attribute("data-points", "9")
            run.append(Finished(step=9))
            says(page, "Finished: 9 steps")
            expect(page.locator("#stop-button")).to_be_disabled()
        assert page.faults == []  # type: ignore[attr-defined]


def run_lines(run: Run) -> int:
    """Every event so far is one line of the log."""
    return len(run.read()[0])
