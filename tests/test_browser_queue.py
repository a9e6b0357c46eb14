"""The queue and a sweep in a real Chromium over the real app: put in line, ordered, trained without a click, compared with one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from serving import go, open_page, served, set_number
from test_runs_tab import past_run

from qlora_ui.queueing import Queue
from qlora_ui.runs import Workspace

pytestmark = pytest.mark.browser
MINUTE = 60_000


def add(page: Page, lora_r: int, said: str) -> None:
    set_number(page, "lora_r", lora_r)
    page.locator("#queue-add").click()
    expect(page.locator("#start-message")).to_contain_text(said)


def looked_at(page: Page, folder: Path, name: str) -> None:
    """Light and dark, wide and narrow: nothing is wider than the page."""
    for scheme, width in (("light", 1280), ("light", 390), ("dark", 1280), ("dark", 390)):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")
        page.set_viewport_size({"width": width, "height": 900})
        page.screenshot(path=folder / f"{name}-{scheme}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.body.classList.remove('dark')")
    page.set_viewport_size({"width": 1280, "height": 900})


def test_queued_runs_train_in_their_order_without_a_click_and_a_sweep_opens_in_one(
    browser: Browser, tiny_workspace: Workspace, rows: Path, tmp_path: Path
) -> None:
    uploaded = Path(shutil.copy(rows, tiny_workspace.uploads))
    first = past_run(tiny_workspace, uploaded, max_steps=2)
    with served(tiny_workspace.root) as app:
        page = open_page(browser, app.url)
        page.goto(f"{app.url}/?run={first.id}")
        page.locator("#run-clone").click()
        expect(page.locator("#train-plan")).to_contain_text("2 steps of 2 rows")
        add(page, 2, "In line as number 1. The queue is held: start it on the Runs tab.")
        add(page, 3, "In line as number 2.")
        page.locator("#sweep button").first.click()
        values = page.locator("#sweep-values-1 :is(input, textarea)")
        expect(values).to_have_value("1e-4, 2e-4")
        values.fill("0.01, 0.02")
        values.blur()
        expect(page.locator("#sweep-plan")).to_contain_text("2 runs, 4 steps in all.")
        for steps in (3, 2):  # it follows the form too
            set_number(page, "max_steps", steps)
            expect(page.locator("#sweep-plan")).to_contain_text(f"2 runs, {2 * steps} steps in all.")
        page.locator("#sweep-add").scroll_into_view_if_needed()
        looked_at(page, tmp_path, "sweep")
        page.locator("#sweep-add").click()
        expect(page.locator("#sweep-plan")).to_contain_text("In line. 2 runs")

        go(page, "Runs")
        waiting = page.locator("#queue ol li")
        expect(waiting).to_have_count(4)
        page.get_by_role("button", name="Move learning-rate-0.01 up", exact=True).click()
        expect(waiting.nth(1)).to_contain_text("learning-rate-0.01")
        waiting.nth(2).get_by_role("button", name=re.compile("^Remove")).click()
        expect(waiting).to_have_count(4)
        waiting.nth(2).get_by_role("button", name=re.compile("^Remove")).click()
        expect(waiting).to_have_count(3)
        app.kill()  # nothing is lost, and nothing starts by itself
    assert [entry.name for entry in Queue.of(tiny_workspace).entries()] == ["", "learning-rate-0.01", "learning-rate-0.02"]

    with served(tiny_workspace.root) as app:
        page = open_page(browser, app.url)
        go(page, "Runs")
        queue = page.locator("#queue")
        expect(queue.locator(".state-of-queue")).to_have_text("3 wait. Held: nothing begins until you start the queue.")
        looked_at(page, tmp_path, "queue")
        page.get_by_role("button", name="Start the queue", exact=True).click()
        expect(queue.locator(".state-of-queue")).to_have_text(re.compile("Going: the next begins when the device is free"))
        expect(queue.locator(".state-of-queue")).to_have_text(re.compile("Nothing waits. Going"), timeout=2 * MINUTE)
        expect(queue.locator(".ended li")).to_have_count(3, timeout=MINUTE)
        for place in range(3):
            expect(queue.locator(".ended li").nth(place)).to_contain_text("Finished: 2 steps, adapter saved")
        page.get_by_role("button", name="Hold the queue", exact=True).click()
        expect(page.get_by_role("button", name="Start the queue", exact=True)).to_be_disabled()

        page.get_by_role("button", name=re.compile("^Compare the runs of")).click()
        results = page.locator(".sweep-results tbody tr")
        expect(results).to_have_count(2)
        expect(page.locator(".sweep-results tr.best")).to_have_count(1)
        expect(results.first).to_contain_text(re.compile("best"))
        expect(page.locator("#runs-shown svg polyline")).to_have_count(4)
        looked_at(page, tmp_path, "results")
        assert page.faults == []  # type: ignore[attr-defined]
    _, *trained = reversed(tiny_workspace.all())
    assert [(run.config().adapter.lora_r, run.config().optimization.learning_rate) for run in trained] == [(2, 0.01), (3, 0.01), (3, 0.02)]
    assert [run.name for run in trained] == ["rows-starter", "learning-rate-0.01", "learning-rate-0.02"]
