"""The planner on the Train tab in a real Chromium: it follows fields and card, stays in sight, and is legible at both sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from playwright.sync_api import Browser, Page, expect
from serving import go, open_page, served, set_number

from qlora_ui.runs import Workspace

pytestmark = pytest.mark.browser


def choose(page: Page, field: str, option: str) -> None:
    page.locator(f"{field} input").click()
    page.get_by_role("option", name=option).click()


def test_the_planner_follows_fields_and_card_in_both_themes_at_both_sizes(browser: Browser, home: Path, tmp_path: Path) -> None:
    with served(home) as app:
        page = open_page(browser, app.url)
        go(page, "Train")
        expect(page.locator("#memory-verdict")).to_contain_text(re.compile(r"about [\d.]+ of [\d.]+ GiB free here"))
        choose(page, "#memory-card", "T4 · 16 GB")
        expect(page.locator("#memory-verdict")).to_contain_text("of 14.6 GiB on T4")
        page.locator(".memory-terms summary").click()
        term = page.locator(".memory-terms tr", has_text="adapter").locator("td")
        before = term.inner_text()
        set_number(page, "lora_r", 64)
        expect(term).not_to_have_text(before)  # and it is still open to be read
        expect(page.locator("#memory-plan")).to_be_in_viewport()
        page.locator("#model-input input").fill("somebody/unknown")
        page.locator("#model-input input").press("Enter")
        expect(page.locator("#memory-verdict")).to_contain_text("The shape of somebody/unknown is not on this machine")
        page.get_by_role("button", name="Ask the Hub for its shape").click()
        expect(page.locator("#memory-verdict")).to_contain_text("The Hugging Face Hub could not be asked")
        choose(page, "#preset-select", "Guanaco 33B")
        expect(page.locator("#memory-verdict")).to_contain_text("Does not fit about 27.1 of 14.6 GiB on T4")
        expect(page.locator("#memory-plan .advice")).to_contain_text("Use a larger GPU")
        expect(page.locator("#memory-plan .advice")).to_be_in_viewport()
        page.screenshot(path=tmp_path / "planner-1280-light.png")
        assert page.faults == []  # type: ignore[attr-defined]

        page.emulate_media(color_scheme="dark")
        page.goto(f"{app.url}/?__theme=dark")
        page.set_viewport_size({"width": 390, "height": 844})
        go(page, "Train")
        page.locator("#memory-plan .memory-bar").scroll_into_view_if_needed()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=tmp_path / "planner-390-dark.png")
        assert page.faults == []  # type: ignore[attr-defined]


def test_a_step_is_measured_and_the_plan_follows_what_it_took(browser: Browser, home: Path) -> None:
    tiny.tiny_model(Workspace.open(home).models / tiny.NAME)
    with served(home) as app:
        page = open_page(browser, app.url)
        go(page, "Train")
        page.locator("#model-input input").fill(tiny.NAME)
        page.locator("#model-input input").press("Enter")
        set_number(page, "max_seq_len", 128)
        verdict = page.locator("#memory-verdict")
        expect(verdict).to_contain_text("about", timeout=60_000)
        measure = page.get_by_role("button", name="Measure one step")
        measure.click()
        expect(page.get_by_role("button", name="Cancel measuring")).to_be_visible()
        expect(verdict).to_contain_text("measured", timeout=60_000)
        expect(measure).to_be_visible()
        expect(page.locator("#train-plan")).to_contain_text("s a step measured here")
        set_number(page, "lora_r", 64)
        expect(verdict).to_contain_text("about")
        set_number(page, "lora_r", 16)
        expect(verdict).to_contain_text("measured")
        assert page.faults == []  # type: ignore[attr-defined]
