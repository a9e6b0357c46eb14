"""From a person's rows to a model on their disk, in one sitting in a real Chromium: train, chat, compare, vote, export, download."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import tiny
from playwright.sync_api import Browser, Page, expect
from serving import go, open_page, served, set_number, upload

from qlora_ui.runs import Workspace

pytestmark = pytest.mark.browser
MINUTE = 60_000


def answered(page: Page, seed: int) -> None:
    expect(page.locator("#chat-note")).to_contain_text(f"seed {seed}", timeout=MINUTE)
    expect(page.locator("#chat-send")).to_be_enabled(timeout=MINUTE)


def test_a_person_trains_chats_compares_votes_and_takes_the_adapter_away(browser: Browser, home: Path, tmp_path: Path) -> None:
    tiny.tiny_model(Workspace.open(home).models / tiny.NAME)
    with served(home, fresh=True) as app:
        page = open_page(browser, app.url)
        upload(page, tiny.tiny_rows(tmp_path / "rows.json", 40))
        expect(page.locator("#data-summary")).to_contain_text("40 rows")
        page.get_by_role("button", name="Use this data", exact=True).click()
        expect(page.locator("#train-data")).to_contain_text("rows.json, 40 rows", timeout=MINUTE)
        page.locator("#model-input input").fill(tiny.NAME)
        page.locator("#model-input input").press("Enter")
        set_number(page, "max_steps", 4)
        expect(page.locator("#train-plan")).to_contain_text("4 steps of 4 rows")
        page.locator("#start-button").click()
        expect(page.locator("#status-line")).to_contain_text("Finished: 4 steps, adapter saved", timeout=2 * MINUTE)

        page.get_by_role("button", name="Chat with it", exact=True).click()
        tuned, base = page.locator("#chat-tuned"), page.locator("#chat-base")
        page.locator("#chat-input textarea").fill("Question 1: which word is 1?")
        page.locator("#chat-input textarea").press("Enter")
        answered(page, seed=0)
        tuned.get_by_label("Retry").last.click()
        answered(page, seed=1)
        tuned.get_by_label("Edit").first.click()
        tuned.locator("textarea").fill("Question 2: which word is 2?")
        tuned.get_by_label("Submit").click()
        expect(tuned.locator(".user").first).to_contain_text("Question 2")
        answered(page, seed=1)
        page.locator("#compare-switch").get_by_label("Compare with base").check()
        page.locator("#chat-input textarea").fill("Question 3: which word is 3?")
        page.locator("#chat-send").click()
        for column in (tuned, base):
            expect(column.locator(".user").last).to_contain_text("Question 3")
            expect(column.locator(".bot")).to_have_count(2, timeout=MINUTE)
        answered(page, seed=1)

        go(page, "Arena")
        expect(page.locator("#arena-contestants .token")).to_have_count(2)
        for number in range(1, 4):
            page.locator("#arena-input textarea").fill(f"Question {number}: which word is {number}?")
            page.locator("#arena-input textarea").press("Enter")
            expect(page.locator("#arena-note")).to_contain_text("Which answer is better?", timeout=MINUTE)
            page.get_by_role("button", name="Left is better", exact=True).click()
            expect(page.locator("#arena-table .headline")).to_have_text("One vote" if number == 1 else f"{number} votes", timeout=MINUTE)

        page.locator("#export-button").click()
        page.locator("#export-start").click()
        expect(page.locator("#export-now")).to_contain_text("its logits differ from those of what was trained by at most 0", timeout=MINUTE)
        with page.expect_download() as taken:
            page.locator("#export-download").click()
        adapter = zipfile.ZipFile(taken.value.path())
        assert adapter.testzip() is None
        name = next(name for name in adapter.namelist() if name.endswith("adapter_config.json"))
        assert json.loads(adapter.read(name))["base_model_name_or_path"].endswith(tiny.NAME)
        assert any(name.endswith("adapter_model.safetensors") for name in adapter.namelist())
        assert page.faults == []  # type: ignore[attr-defined]
