"""The live loss plot, in a real browser against a real `Progress`."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from qlora_ui.events import HeldOut, Planned, Step
from qlora_ui.progress import Progress
from qlora_ui.ui.plots import loss_plot

with contextlib.suppress(ImportError):  # the tests without a browser still run
    from playwright.sync_api import Browser, Page, expect

CANVAS = "document.querySelector('#loss-plot canvas')"


@dataclass
class Runs:
    """Two runs of 120 steps that grow when told to, and what was asked and sent: (run, stride, count, held_out_count, sent)."""

    runs: dict[str, Progress] = field(default_factory=dict)
    calls: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    answer: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def grow(self, run_id: str, steps: int, total_steps: int = 120) -> None:
        if run_id not in self.runs:
            self.runs[run_id] = Progress(run_id)
            self.runs[run_id].add(Planned(total_steps=total_steps, train_rows=8, held_out_rows=2, tokens=80, trained_tokens=40))
        run = self.runs[run_id]
        for step in range(run.step + 1, run.step + 1 + steps):
            loss = 1 + math.exp(-step / 20) + 0.2 * math.sin(7 * step)
            run.add(Step(step=step, loss=loss, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=9.0, memory_gib=1.0, epoch=0.1))
            if step % 10 == 0:
                run.add(HeldOut(step=step, loss=1.1 + math.exp(-step / 25)))

    def curves(self, run_id: str, rewinds: int, stride: int, count: int, held_out_count: int) -> dict[str, Any]:
        found = asdict(self.runs.get(run_id, Progress("")).curves_since(rewinds, stride, count, held_out_count))
        self.calls.append((run_id, stride, count, held_out_count, len(found["train"])))
        return self.answer(found)


def test_server_function_is_named_and_unpacks_what_the_page_sends() -> None:
    runs = Runs()
    runs.grow("a", 25)
    with gr.Blocks(analytics_enabled=False):
        plot = loss_plot(runs.curves)
    found = plot.loss_points(["a", 0, 1, 20, 2])
    assert [step for step, _ in found["train"]] == [21, 22, 23, 24, 25]
    assert found["held_out"] == []
    assert not found["restart"]
    assert json.dumps(found)


def test_template_does_not_depend_on_the_value_or_gradio_would_wipe_the_canvas() -> None:
    with gr.Blocks(analytics_enabled=False):
        plot = loss_plot(Runs().curves)
    for template in (plot.html_template, plot.css_template):
        assert "{{" not in template
        assert "${" not in template
        assert "`" not in template


@pytest.fixture
def runs() -> Runs:
    runs = Runs()
    runs.grow("a", 40)
    runs.grow("b", 5)
    return runs


@pytest.fixture
def problems() -> list[str]:
    """What the browser's console called an error; a test that provokes one takes it out."""
    return []


@pytest.fixture
def page(browser: Browser, runs: Runs, problems: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """A page with the plot on run a in the first of two tabs; a text box says `run version`, a box takes the plot away."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    with gr.Blocks(analytics_enabled=False) as blocks:
        say = gr.Textbox(label="say")
        shown = gr.Checkbox(True, label="shown")
        with gr.Tab("Plot"), gr.Column() as column:
            plot = loss_plot(runs.curves)
        with gr.Tab("Other"):
            gr.Textbox(label="other words")
        say.submit(show, say, plot, show_progress="hidden", queue=False)
        shown.change(lambda on: gr.Column(visible=on), shown, column, show_progress="hidden")
        blocks.load(lambda: show("a 1"), None, plot, show_progress="hidden", queue=False)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, run_history=False)
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.set_default_timeout(20_000)
    # Nothing outside this machine; an empty answer, as a refused one would be an error in the console.
    page.route(re.compile(r"^https?://(?!127\.0\.0\.1[:/])"), lambda route: route.fulfill(body=""))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    blocks.close(verbose=False)
    assert problems == []


def show(words: str) -> dict[str, Any]:
    run, version = words.split()
    return {"run": run, "version": int(version)}


def say(page: Page, words: str) -> None:
    box = page.get_by_label("say", exact=True)
    box.fill(words)
    box.press("Enter")


def wait_for_points(page: Page, run: str, points: int) -> None:
    expect(page.locator(f"#loss-plot[data-run='{run}'][data-points='{points}']")).to_be_visible(timeout=20_000)


def zoom_to_the_middle(page: Page) -> str:
    """Drag over a part of the curve and return what the page says about it."""
    canvas = page.locator("#loss-plot canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    across = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.15 * box["width"], across)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], across)
    page.mouse.up()
    shown = page.locator("#loss-plot .reset")
    expect(shown).to_be_visible()
    return shown.inner_text()


@pytest.mark.browser
def test_points_appear_and_a_new_version_brings_only_the_new_ones(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    assert page.locator("#loss-plot").get_attribute("data-held-out") == "4"
    assert page.locator("#loss-plot").get_attribute("data-last-step") == "40"
    runs.grow("a", 12)
    say(page, "a 2")
    wait_for_points(page, "a", 52)
    assert page.locator("#loss-plot").get_attribute("data-held-out") == "5"
    assert runs.calls == [("a", 0, 0, 0, 40), ("a", 1, 40, 4, 12)]


@pytest.mark.browser
def test_another_run_starts_over(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    say(page, "b 1")
    wait_for_points(page, "b", 5)
    assert page.locator("#loss-plot").get_attribute("data-held-out") == "0"
    say(page, "unknown 1")
    wait_for_points(page, "unknown", 0)
    expect(page.get_by_text("The loss curve appears here with the first step.")).to_be_visible()
    assert [call[:4] for call in runs.calls] == [("a", 0, 0, 0), ("b", 0, 0, 0), ("unknown", 0, 0, 0)]


@pytest.mark.browser
def test_points_halved_by_the_server_replace_those_drawn(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    runs.grow("a", 560)
    say(page, "a 2")
    wait_for_points(page, "a", 300)
    expect(page.locator("#loss-plot")).to_have_attribute("data-last-step", "600")
    runs.grow("a", 4)
    say(page, "a 3")
    wait_for_points(page, "a", 302)
    assert runs.calls[-1] == ("a", 2, 300, 60, 2)


@pytest.mark.browser
def test_zoom_survives_an_update_and_the_canvas_stays_the_same(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    page.evaluate(f"{CANVAS}.mark = 'mine'")
    zoomed = zoom_to_the_middle(page)
    runs.grow("a", 10)
    say(page, "a 2")
    wait_for_points(page, "a", 50)
    expect(page.locator("#loss-plot .reset")).to_have_text(zoomed)
    assert page.evaluate(f"{CANVAS}.mark") == "mine"
    page.locator("#loss-plot canvas").dblclick(position={"x": 200, "y": 100})
    expect(page.locator("#loss-plot .reset")).to_be_hidden()


@pytest.mark.browser
def test_a_tab_left_and_visited_again_keeps_points_and_zoom(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    zoomed = zoom_to_the_middle(page)
    page.get_by_role("tab", name="Other", exact=True).click()
    expect(page.locator("#loss-plot")).to_be_hidden()
    runs.grow("a", 10)
    say(page, "a 2")
    expect(page.get_by_label("other words", exact=True)).to_be_visible()
    page.get_by_role("tab", name="Plot", exact=True).click()
    wait_for_points(page, "a", 50)
    expect(page.locator("#loss-plot .reset")).to_have_text(zoomed)
    assert sum(call[4] for call in runs.calls) == 50


@pytest.mark.browser
def test_a_plot_mounted_anew_keeps_points_and_zoom_and_asks_only_for_news(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    zoomed = zoom_to_the_middle(page)
    page.get_by_label("shown", exact=True).uncheck()
    expect(page.locator("#loss-plot")).to_have_count(0)
    runs.grow("a", 10)
    say(page, "a 2")
    page.get_by_label("shown", exact=True).check()
    wait_for_points(page, "a", 50)
    expect(page.locator("#loss-plot .reset")).to_have_text(zoomed)
    assert sum(call[4] for call in runs.calls) == 50


@pytest.mark.browser
def test_arrow_keys_read_the_points_and_escape_shows_everything_again(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    zoom_to_the_middle(page)
    canvas = page.locator("#loss-plot canvas")
    canvas.press("Escape")
    expect(page.locator("#loss-plot .reset")).to_be_hidden()
    canvas.press("End")
    expect(page.locator("#loss-plot .at")).to_have_text("step 40")
    canvas.press("ArrowLeft")
    expect(page.locator("#loss-plot .at")).to_have_text("step 39")
    expect(page.locator("#loss-plot .held span")).to_have_text("held-out at 30")
    loss = dict(runs.runs["a"].train.points)[39]
    expect(page.locator("#loss-plot .raw b")).to_have_text(f"{loss:.3f}")
    expect(page.locator("#loss-plot .spoken")).to_contain_text(f"Step 39: training {loss:.3f}")


@pytest.mark.browser
def test_the_numbers_are_in_the_label_and_in_a_table_filled_when_opened(page: Page, runs: Runs) -> None:
    runs.grow("a", 500)
    say(page, "a 2")
    wait_for_points(page, "a", 540)
    page.wait_for_function(f"{CANVAS}.ariaLabel.startsWith('Loss curve: step 540 of 540, training loss ')")
    rows = page.locator("#loss-plot tbody tr")
    expect(rows).to_have_count(0)
    page.get_by_text("Data as a table", exact=True).click()
    expect(rows.first.locator("th")).to_have_text("540")
    assert 100 < rows.count() <= 200


@pytest.mark.browser
def test_news_during_a_request_are_fetched_after_it_and_never_beside_it(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    asked, let_go = threading.Event(), threading.Event()

    def slow(found: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        assert let_go.wait(20)
        return found

    runs.answer = slow
    runs.grow("a", 2)
    say(page, "a 2")
    assert asked.wait(20)
    runs.grow("a", 3)
    say(page, "a 3")
    say(page, "a 4")
    assert len(runs.calls) == 2
    let_go.set()
    wait_for_points(page, "a", 45)
    assert [call[2:] for call in runs.calls[:3]] == [(0, 0, 40), (40, 4, 2), (42, 4, 3)]


@pytest.mark.browser
def test_a_run_that_was_left_goes_at_once_and_its_late_answer_is_dropped(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    asked, let_go = threading.Event(), threading.Event()

    def slow(found: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        assert let_go.wait(20)
        return found

    runs.answer = slow
    runs.grow("a", 2)
    say(page, "a 2")
    assert asked.wait(20)
    say(page, "b 1")
    wait_for_points(page, "b", 0)
    let_go.set()
    wait_for_points(page, "b", 5)
    assert [call[:4] for call in runs.calls[1:]] == [("a", 1, 40, 4), ("b", 0, 0, 0)]


@pytest.mark.browser
def test_a_failed_request_is_repeated_without_further_news(page: Page, runs: Runs, problems: list[str]) -> None:
    wait_for_points(page, "a", 40)

    def fail_once(found: dict[str, Any]) -> dict[str, Any]:
        runs.answer = dict
        raise OSError("the disk is away")

    runs.answer = fail_once
    runs.grow("a", 2)
    say(page, "a 2")
    wait_for_points(page, "a", 42)
    assert [problem for problem in problems if "500" not in problem] == []
    problems.clear()


@pytest.mark.browser
def test_height_is_the_same_empty_and_full_and_smaller_on_a_phone(page: Page) -> None:
    wait_for_points(page, "a", 40)
    plot = page.locator("#loss-plot")
    full = plot.bounding_box()
    say(page, "unknown 1")
    wait_for_points(page, "unknown", 0)
    assert plot.bounding_box() == full
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function(f"{CANVAS}.clientHeight === 220")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def drawn(page: Page, colour: str) -> int:
    """How many points of the canvas have exactly this colour, as #rrggbb."""
    count: int = page.evaluate(
        f"""colour => {{
            const {{ data }} = {CANVAS}.getContext("2d").getImageData(0, 0, {CANVAS}.width, {CANVAS}.height);
            const [red, green, blue] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
            let count = 0;
            for (let at = 0; at < data.length; at += 4)
                count += data[at] === red && data[at + 1] === green && data[at + 2] === blue && data[at + 3] === 255;
            return count;
        }}""",
        colour,
    )
    return count


@pytest.mark.browser
def test_dark_theme_redraws_the_curve_in_its_own_colours(page: Page) -> None:
    def colours() -> set[str]:
        names = ("--loss-train", "--loss-held")
        return {page.evaluate(f"name => getComputedStyle({CANVAS}).getPropertyValue(name).trim()", name) for name in names}

    wait_for_points(page, "a", 40)
    page.evaluate(f"window.before = {CANVAS}.toDataURL()")
    first = colours()
    assert min(drawn(page, colour) for colour in first) > 0
    page.evaluate("document.body.classList.toggle('dark')")
    page.wait_for_function(f"{CANVAS}.toDataURL() !== window.before")
    second = colours()
    assert len(first | second) == 4
    assert min(drawn(page, colour) for colour in second) > 0
    assert max(drawn(page, colour) for colour in first) == 0


def shown_losses(page: Page) -> str:
    return str(page.evaluate(f"{CANVAS}.toDataURL()"))


@pytest.mark.browser
def test_axis_and_lines_are_chosen_by_buttons_and_survive_news_zoom_and_a_new_mount(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    axis, held_out = (page.get_by_role("button", name=name, exact=True) for name in ("Logarithmic loss axis", "Held-out"))
    orange = page.evaluate(f"getComputedStyle({CANVAS}).getPropertyValue('--loss-held').trim()")
    page.wait_for_function(f"{CANVAS}.width > 300")
    linear = shown_losses(page)
    assert drawn(page, orange) > 0
    axis.press("Enter")
    page.wait_for_function(f"before => {CANVAS}.toDataURL() !== before", arg=linear)
    held_out.click()
    page.wait_for_function("() => window.lossPlotChosen.hidden[0] === 'held'")
    page.mouse.move(0, 0)
    zoomed = zoom_to_the_middle(page)
    runs.grow("a", 10)
    say(page, "a 2")
    wait_for_points(page, "a", 50)
    page.get_by_label("shown", exact=True).uncheck()
    expect(page.locator("#loss-plot")).to_have_count(0)
    page.get_by_label("shown", exact=True).check()
    wait_for_points(page, "a", 50)
    expect(page.locator("#loss-plot .reset")).to_have_text(zoomed)
    expect(axis).to_have_attribute("aria-pressed", "true")
    expect(held_out).to_have_attribute("aria-pressed", "false")
    assert drawn(page, orange) == 0
    page.locator("#loss-plot canvas").press("Home")
    expect(page.locator("#loss-plot .tip .raw")).to_be_visible()
    expect(page.locator("#loss-plot .tip .held")).to_be_hidden()


@pytest.mark.browser
def test_overfitting_is_shaded_when_the_two_newest_evaluations_are_above_the_best(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    plot = page.locator("#loss-plot")
    runs.runs["a"].add(HeldOut(step=41, loss=9.0))
    say(page, "a 2")
    expect(plot).to_have_attribute("data-held-out", "5")
    expect(plot).to_have_attribute("data-overfit-from", "")  # one bad evaluation may be chance
    runs.runs["a"].add(HeldOut(step=42, loss=9.1))
    say(page, "a 3")
    expect(plot).to_have_attribute("data-overfit-from", "40")


@pytest.mark.browser
def test_all_points_are_taken_away_as_csv_and_the_picture_as_png(page: Page, runs: Runs) -> None:
    wait_for_points(page, "a", 40)
    files = {}
    for name in ("Download the points as CSV", "Download the picture as PNG"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        files[download.value.suggested_filename] = Path(download.value.path()).read_bytes()
    assert set(files) == {"a-loss.csv", "a-loss.png"}
    rows = list(csv.DictReader(files["a-loss.csv"].decode().splitlines()))
    assert {int(row["step"]): float(row["training"]) for row in rows} == dict(runs.runs["a"].train.points)
    assert {int(row["step"]): float(row["held_out"]) for row in rows if row["held_out"]} == dict(runs.runs["a"].held_out)
    assert all(row["smoothed"] for row in rows)
    alphas, *colours = (channel.getextrema() for channel in reversed(Image.open(io.BytesIO(files["a-loss.png"])).split()))
    assert alphas == (255, 255)  # with its ground, so that it is legible on any other
    assert all(low != high for low, high in colours)

    runs.grow("a", 2000, total_steps=2040)
    curve = runs.runs["a"].train
    say(page, "a 2")
    wait_for_points(page, "a", len(curve.points))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the points as CSV", exact=True).click()
    assert curve.stride > 1
    assert Path(download.value.path()).read_text().startswith(f"step,training_mean_of_{curve.stride},smoothed,held_out\n")
