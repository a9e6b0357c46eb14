"""The sample answers on the page in a real Chromium: side by side, under a slider, newest first, and redrawn only for news."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from playwright.sync_api import Browser, Request, Route, expect
from serving import go, open_page, served

from qlora_ui.events import Phase, Planned, Sample
from qlora_ui.runs import Run, Workspace

pytestmark = pytest.mark.browser
ATTACK = "<img src=x onerror=\"document.body.dataset.broken='yes'\">"


def answer(run: Run, step: int, said: str) -> None:
    for prompt in ("Who are you?", f"What is 2? {ATTACK}"):
        run.append(Sample(step=step, prompt=prompt, base=f"base to {prompt}", adapter=said))


def test_samples_are_followed_and_an_older_step_stays_while_it_is_looked_at(
    browser: Browser, workspace: Workspace, rows: Path, tmp_path: Path
) -> None:
    run = tiny.tiny_run(workspace, rows)
    run.append(Planned(total_steps=50, train_rows=8, held_out_rows=2, tokens=80, trained_tokens=40))
    run.append(Phase(name="training"))
    with run.lock().acquire(), served(workspace.root) as app:
        page = open_page(browser, app.url)
        go(page, "Train")
        panel, slider = page.locator("#samples"), page.locator("#samples input")
        expect(panel).to_contain_text("before the first step, at the end")
        expect(slider).to_be_disabled()
        height = panel.bounding_box()["height"]  # type: ignore[index]
        answer(run, 0, "nothing yet")
        answer(run, 10, "better")
        expect(panel.locator("output")).to_have_text("after step 10")
        expect(panel.locator("article")).to_have_count(2)
        expect(panel.locator("article").first).to_have_text(
            re.compile("Who are you.*base.*base to Who are you.*adapter.*better", re.DOTALL)
        )
        assert page.evaluate("document.body.dataset.broken") is None

        answer(run, 20, "best")
        expect(panel.locator("output")).to_have_text("after step 20")
        slider.focus()
        slider.press("Home")
        expect(panel.locator("output")).to_have_text("before step 1")
        expect(panel).to_contain_text("nothing yet")
        page.evaluate("document.querySelector('#samples article').mark = 'mine'")
        answer(run, 30, "best of all")
        expect(slider).to_have_attribute("max", "3")
        expect(panel.locator("output")).to_have_text("before step 1")
        assert page.evaluate("document.querySelector('#samples article').mark") == "mine"  # nothing was drawn again
        slider.press("End")
        expect(panel).to_contain_text("best of all")
        answer(run, 40, "the last")
        expect(panel).to_contain_text("the last")  # at its end it follows
        assert panel.bounding_box()["height"] == height  # type: ignore[index]
        go(page, "Data")
        go(page, "Train")
        expect(panel.locator("output")).to_have_text("after step 40")
        panel.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / "samples-1280-light.png")

        go(page, "Runs")
        page.locator(f'#runs-table tr[data-run="{run.id}"] button').click()
        expect(page.locator("#run-samples output")).to_have_text("after step 40")
        page.locator("#run-samples input").focus()
        page.locator("#run-samples input").press("ArrowLeft")
        expect(page.locator("#run-samples")).to_contain_text("best of all")

        page.goto(f"{app.url}/?__theme=dark")
        page.set_viewport_size({"width": 390, "height": 844})
        go(page, "Train")
        expect(page.locator("#samples output")).to_have_text("after step 40")
        page.locator("#samples").scroll_into_view_if_needed()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=tmp_path / "samples-390-dark.png")
        assert page.faults == []  # type: ignore[attr-defined]


def test_a_run_that_is_chosen_while_anothers_samples_are_fetched_shows_its_own(browser: Browser, workspace: Workspace, rows: Path) -> None:
    first, second = tiny.tiny_run(workspace, rows), tiny.tiny_run(workspace, rows)
    for run, said in ((first, "of the first"), (second, "of the second")):
        answer(run, 10, said)
    held: list[Route] = []

    def asks_for_the_first(request: Request) -> bool:
        told = request.post_data or ""
        return "rounds" in told and first.id in told

    with served(workspace.root) as app:
        page = open_page(browser, app.url)
        go(page, "Runs")
        page.route(
            re.compile("component_server"), lambda route: held.append(route) if asks_for_the_first(route.request) else route.continue_()
        )
        with page.expect_request(asks_for_the_first):
            page.locator(f'#runs-table tr[data-run="{first.id}"] button').click()
        page.locator(f'#runs-table tr[data-run="{second.id}"] button').click()
        expect(page.locator("#runs-table tr.chosen")).to_have_attribute("data-run", second.id)
        expect(page).to_have_url(re.compile(second.id))
        page.wait_for_function("id => document.querySelector('#run-samples') && window.samplesShown?.chosen?.run === id", arg=second.id)
        held[0].continue_()
        expect(page.locator("#run-samples")).to_contain_text("of the second")
