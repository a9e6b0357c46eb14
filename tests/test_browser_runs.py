"""Runs watched in a real Chromium over the real app, each app its own: closed tabs, real 4-bit training."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
from gradio_client import Client
from playwright.sync_api import Browser, Page, expect
from serving import go, open_page, served, set_number, upload

from qlora_ui.events import AdapterSaved, Step
from qlora_ui.runs import Workspace

pytestmark = pytest.mark.browser
MINUTE = 60_000


def points(page: Page) -> int:
    return int(page.locator("#loss-plot").get_attribute("data-points") or 0)


def wait_for_points(page: Page, at_least: int) -> None:
    page.wait_for_function(
        "least => Number(document.querySelector('#loss-plot')?.dataset.points || 0) >= least", arg=at_least, timeout=MINUTE * 2
    )


def test_a_person_trains_the_starter_model_and_talks_to_it_beside_its_base(browser: Browser, starter_home: Path, tmp_path: Path) -> None:
    rows = json.loads(tiny.tiny_rows(tmp_path / "rows.json", 40).read_text("utf-8"))
    rows.append({"instruction": "Row without an answer", "output": ""})
    (tmp_path / "my rows.json").write_text(json.dumps(rows), "utf-8")
    with served(starter_home) as app:
        page = open_page(browser, app.url)
        upload(page, tmp_path / "my rows.json")
        expect(page.locator("#data-summary")).to_contain_text("41 rows: 40 kept, 1 dropped")
        expect(page.locator("#data-preview")).to_contain_text("Question 0: which word is 0?")
        page.get_by_text("As tokens").click()
        expect(page.locator("#data-preview .row-card mark").first).to_contain_text("The answer is", timeout=MINUTE)
        page.get_by_role("button", name="Use this data", exact=True).click()

        expect(page.locator("#train-data")).to_contain_text("rows.json, 40 rows")
        set_number(page, "max_steps", 60)
        expect(page.locator("#train-plan")).to_contain_text("60 steps of 4 rows")
        page.locator("#start-button").click()
        wait_for_points(page, 1)
        grown = points(page)
        wait_for_points(page, grown + 2)
        expect(page.locator("#status-line")).to_contain_text("training")
        expect(page.locator("#log-box")).to_contain_text("NF4 with double quantization")
        page.locator("#start-button").click()
        expect(page.locator("#start-message")).to_contain_text("is training already")
        assert len(os.listdir(starter_home / "runs")) == 1

        before = points(page)
        page.reload()
        go(page, "Train")
        wait_for_points(page, before)
        expect(page.locator("#log-box")).to_contain_text("loss")
        other = open_page(browser, app.url)
        go(other, "Train")
        wait_for_points(other, before)
        assert other.locator("#status-line").inner_text().split(" · ")[0] == page.locator("#status-line").inner_text().split(" · ")[0]

        other.locator("#stop-button").click()
        stopped = re.compile(r"Stopped at step \d+ of 60, adapter saved")
        expect(page.locator("#status-line")).to_contain_text(stopped, timeout=MINUTE)
        expect(other.locator("#status-line")).to_contain_text(stopped, timeout=MINUTE)

        page.locator("#chat-with-button").click()
        page.locator("#compare-switch input").check()
        page.locator("#chat-input textarea").fill("Question 3: which word is 3?")
        page.locator("#chat-send").click()
        expect(page.locator("#chat-note")).to_contain_text("tokens/s", timeout=MINUTE)
        page.locator("#chat-stop").click()
        expect(page.locator("#chat-send")).to_be_enabled()
        page.locator("#chat-input textarea").fill("And 4?")
        page.locator("#chat-input textarea").press("Enter")
        expect(page.locator("#chat-tuned")).to_contain_text("And 4?")
        expect(page.locator("#chat-note")).to_contain_text("tokens/s", timeout=MINUTE)
        for side in ("#chat-tuned", "#chat-base"):
            expect(page.locator(f"{side} .bot").last).to_contain_text(re.compile(r"\w"))
        page.locator("#chat-clear").click()  # in the middle of the answer
        expect(page.locator("#chat-send")).to_be_enabled(timeout=MINUTE)
        expect(page.locator("#chat-tuned")).not_to_contain_text("And 4?")
        assert page.faults == other.faults == []  # type: ignore[attr-defined]


def test_a_closed_tab_does_not_stop_the_run(browser: Browser, tiny_workspace: Workspace, rows: Path) -> None:
    uploads = shutil.copy(rows, tiny_workspace.uploads)
    settings = {name: value for name, value in tiny.tiny_config(uploads, max_steps=12).values().items() if name != "data"}
    with served(tiny_workspace.root) as app:
        page = open_page(browser, app.url)
        client = Client(app.url, verbose=False)
        run_id = client.predict("starter", uploads, json.dumps(settings), api_name="/start_training")
        page.context.close()
        again = open_page(browser, app.url)
        expect(again.locator("#status-line")).to_contain_text("Finished: 12 steps, adapter saved", timeout=2 * MINUTE)
        assert client.predict(run_id, api_name="/run_status")["state"] == "finished"
    run = tiny_workspace.get(run_id)
    assert len(tiny.events_of(run, Step)) == 12
    assert len(tiny.events_of(run, AdapterSaved)) == 1
