"""The buttons that end a run or let it go on, each clicked in a real Chromium over the real app, which one fixture serves for all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from filelock import Timeout
from gradio_client import Client
from playwright.sync_api import Browser, Page, expect
from serving import Served, free_port, go, open_page, served, set_number

from qlora_ui import services
from qlora_ui.errors import UserError
from qlora_ui.events import Asked, Phase, Resumed
from qlora_ui.jobs import Jobs
from qlora_ui.runs import Run, Workspace
from qlora_ui.ui import app as ui

pytestmark = pytest.mark.browser
MINUTE = 60_000


class Place:
    """One served app, its workspace, and a script's way to it."""

    def __init__(self, app: Served) -> None:
        self.app, self.workspace = app, Workspace.open(app.home)
        self.rows = str(tiny.tiny_rows(self.workspace.uploads / "rows.json"))
        self.client = Client(app.url, verbose=False)

    def start(self, **values: object) -> Run:
        """A run that would go on for hours."""
        config = tiny.tiny_config(self.rows, **{"max_steps": 100_000, **values})
        settings = {name: value for name, value in config.values().items() if name != "data"}
        return self.workspace.get(self.client.predict("starter", self.rows, json.dumps(settings), api_name="/start_training"))

    def discard(self) -> None:
        """So that the next test finds no run."""
        for run in self.workspace.all():
            self.client.predict(run.id, api_name="/discard_training")
        self.workspace.lease().acquire(timeout=60).lock.release()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("buttons-home")
    tiny.tiny_model(Workspace.open(home).models / tiny.NAME)
    with served(home) as app:
        yield Place(app)


@pytest.fixture
def run(place: Place) -> Iterator[Run]:
    yield place.start()
    place.discard()


@pytest.fixture
def page(browser: Browser, place: Place, run: Run) -> Iterator[Page]:
    """A page that shows the run in its steps, a checkpoint behind it."""
    opened = open_page(browser, place.app.url)
    until_saved(opened, run)
    yield opened
    assert opened.faults == []  # type: ignore[attr-defined]
    opened.context.close()


def until_saved(page: Page, run: Run) -> None:
    says(page, r"training \d+/")
    for _ in range(600):
        if run.checkpoints():
            return
        page.wait_for_timeout(50)
    pytest.fail("no checkpoint")


def says(page: Page, pattern: str) -> None:
    expect(page.locator("#status-line")).to_contain_text(re.compile(pattern), timeout=2 * MINUTE)


def paused(page: Page) -> None:
    page.locator("#pause-button").click()
    says(page, r"Paused at step \d+ of 100000")


def test_pause_rests_and_resume_goes_on_in_the_same_place_whichever_page_and_however_often_clicked(
    browser: Browser, place: Place, run: Run, page: Page
) -> None:
    other = open_page(browser, place.app.url)
    says(other, r"training \d+/")
    at = page.locator("#pause-button").bounding_box()
    page.locator("#pause-button").dblclick()
    for seen in (page, other):
        says(seen, r"Paused at step \d+ of 100000")
        expect(seen.locator("#pause-button")).to_have_count(0)
        expect(seen.locator("#stop-button")).to_be_enabled()
    assert [event.wish for event in tiny.events_of(run, Asked)] == ["pause"]
    assert page.locator("#resume-button").bounding_box() == at

    other.locator("#resume-button").dblclick()
    for seen in (page, other):
        says(seen, r"training \d+/")
        expect(seen.locator("#resume-button")).to_have_count(0)
        expect(seen.locator("#run-message")).to_have_text("")
    assert len(tiny.events_of(run, Resumed)) == 1
    place.client.predict(run.id, "{}", api_name="/resume_training")  # too late, and no error
    assert len(tiny.events_of(run, Resumed)) == 1
    other.context.close()


def test_stop_and_keep_ends_a_run_in_its_steps_with_an_adapter(run: Run, page: Page) -> None:
    page.locator("#stop-button").dblclick()
    says(page, r"Stopped at step \d+ of 100000, adapter saved")
    expect(page.locator("#stop-button")).to_be_disabled()
    expect(page.locator("#chat-with-button")).to_be_enabled()
    expect(page.locator("#resume-button")).to_be_enabled()
    assert run.adapter.is_dir()
    page.locator("#chat-with-button").click()
    expect(page.locator("#run-select input")).to_have_value(run.id)


def test_stop_and_keep_makes_the_adapter_of_a_run_that_rests(run: Run, page: Page) -> None:
    paused(page)
    assert not run.adapter.exists()
    page.locator("#stop-button").click()
    says(page, r"Stopped at step \d+ of 100000, adapter saved")
    assert run.adapter.is_dir()


def test_discard_asks_once_and_deletes_only_when_told_so(browser: Browser, place: Place, run: Run, page: Page) -> None:
    other = open_page(browser, place.app.url)
    before = page.locator("#tabs").bounding_box()
    page.locator("#discard-button").dblclick()
    expect(page.locator("#discard-question")).to_contain_text(re.compile(rf"Delete {run.name} with its \d checkpoints? and log\?"))
    assert page.locator("#tabs").bounding_box() == before
    expect(page.locator("#stop-button")).to_be_hidden()
    page.locator("#discard-cancel").click()
    expect(page.locator("#discard-question")).to_have_count(0)
    assert run.state() == "running"

    page.locator("#discard-button").click()
    says(other, r"training \d+/")
    other.locator("#discard-button").click()
    page.locator("#discard-confirm").click()
    says(page, "No run yet")
    assert not run.folder.exists()
    other.locator("#discard-confirm").click()  # the run is gone already
    says(other, "No run yet")
    for seen in (page, other):
        expect(seen.locator("#run-message")).to_have_text("")
        for button in ("pause", "stop", "discard", "chat-with"):
            expect(seen.locator(f"#{button}-button")).to_be_disabled()
    other.context.close()


def test_a_run_goes_on_with_the_settings_of_the_form_which_says_what_is_another(run: Run, page: Page) -> None:
    paused(page)
    go(page, "Train")
    button, said = page.locator("#resume-with-button"), page.locator("#resume-differences")
    expect(button).to_be_disabled()
    expect(said).to_contain_text(re.compile(r"lora_r.* are others than in .*, and cannot change on the way"))
    page.locator("#use-run-settings").click()
    expect(page.locator("#field-learning_rate input")).to_have_value("0.01")
    expect(said).to_contain_text("its settings are these")
    set_number(page, "learning_rate", 0.001)
    set_number(page, "max_steps", 90_000)
    expect(said).to_contain_text("learning rate 0.01 → 0.001, max steps 100000 → 90000")
    set_number(page, "lora_r", 8)
    expect(said).to_contain_text("lora_r is 8, but this run began with 4")
    expect(button).to_be_disabled()
    set_number(page, "lora_r", 4)
    expect(button).to_have_text(f"Resume {run.name} with these settings")
    button.dblclick()
    says(page, r"training \d+/90000")
    (resumed,) = tiny.events_of(run, Resumed)
    assert resumed.changes == {"learning_rate": [0.01, 0.001], "max_steps": [100_000, 90_000]}
    expect(page.locator("#start-message")).to_have_text("")


def test_the_switch_trains_in_a_process_of_its_own_and_the_browser_remembers_it(run: Run, page: Page) -> None:
    paused(page)
    go(page, "Train")
    switch = page.locator("#isolated-switch input")
    switch.check()
    page.wait_for_function("(localStorage.getItem('qlora-ui-draft') || '').length > 0")
    page.locator("#resume-button").click()
    says(page, r"training \d+/")
    assert (run.folder / "process.log").is_file()
    page.reload()
    go(page, "Train")
    expect(switch).to_be_checked()
    page.locator("#pause-button").click()
    says(page, r"Paused at step \d+ of 100000")


def test_an_open_page_outlives_its_app_and_goes_on_with_the_run(browser: Browser, tiny_workspace: Workspace) -> None:
    with served(tiny_workspace.root) as app:
        place = Place(app)
        run = place.start()
        page = open_page(browser, app.url)
        until_saved(page, run)
        app.kill()
    last = run.last_step()
    newest = run.checkpoints()[-1]
    with served(tiny_workspace.root, app.port):
        says(page, f"Interrupted at step {last}")
        page.locator("#resume-button").click()
        says(page, r"training \d+/")
        (resumed,) = tiny.events_of(run, Resumed)
        assert (resumed.checkpoint, resumed.changes) == (newest.name, {})
        page.locator("#stop-button").click()
        says(page, "adapter saved")


class Hanging:
    """A training that gives no sign of life until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, run: Run, emit: Callable[[Phase], None], should_stop: Callable[[], bool], checkpoint: Path | None = None) -> None:
        emit(Phase(name="training"))
        self.go.wait(120)


@pytest.fixture
def hanging(workspace: Workspace) -> Iterator[tuple[services.Services, Hanging, threading.Event]]:
    """Services whose training hangs, and which only say that they would restart the app."""
    train, restarted = Hanging(), threading.Event()
    real = services.build(workspace, services.WarmUp())
    yield dataclasses.replace(real, jobs=Jobs(workspace, train), restart=restarted.set), train, restarted
    train.go.set()


def fall_silent(run: Run, seconds: float) -> None:
    at = time.monotonic() - seconds
    os.utime(run.folder / "heartbeat", (at, at))


def test_a_run_without_a_sign_of_life_is_said_and_the_app_can_be_restarted(
    browser: Browser, workspace: Workspace, hanging: tuple[services.Services, Hanging, threading.Event]
) -> None:
    served_here, _, restarted = hanging
    shutil.copy(tiny.tiny_rows(workspace.root / "rows.json"), workspace.uploads)
    built = ui.build(served_here)
    _, url, _ = built.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, **ui.launch_options())
    try:
        run = served_here.start(tiny.tiny_config(workspace.uploads / "rows.json"))
        page = open_page(browser, url)
        says(page, "training")
        expect(page.locator("#restart-button")).to_have_count(0)
        with pytest.raises(UserError, match="gives signs of life"):
            served_here.restart_app(run)
        fall_silent(run, 185)
        says(page, "training · no sign of life for 3 min")
        page.locator("#restart-button").click()
        assert restarted.wait(20)
        with pytest.raises(Timeout):
            run.lock().acquire(timeout=0)
        page.context.close()
    finally:
        built.close()


def test_a_run_whose_process_died_without_a_word_is_settled_by_the_poll(workspace: Workspace, rows: Path) -> None:
    watching = services.build(workspace, services.WarmUp())
    run = tiny.tiny_run(workspace, rows)  # running by its books, its lock free
    run.append(Phase(name="training"))
    run.beat()
    watching.glance()
    assert run.state() == "running"
    fall_silent(run, 5)
    before = watching.glance()
    assert run.state() == "interrupted"
    assert watching.glance() == before
