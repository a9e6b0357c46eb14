"""The Runs tab: past runs found, compared, named, deleted, in a real Chromium; and the rows behind it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from playwright.sync_api import Browser, expect
from serving import go, open_page, served

from qlora_ui import labels, services
from qlora_ui.errors import UserError
from qlora_ui.events import Finished, HeldOut, Phase, Planned, Step, Stopped
from qlora_ui.overview import spark
from qlora_ui.progress import Progress
from qlora_ui.runs import Run, Workspace
from qlora_ui.ui import runs_tab
from qlora_ui.ui.comparison import Shown, comparison, picture, ticks

ATTACK = "<img src=x onerror=\"document.body.dataset.broken='yes'\">"


def past_run(workspace: Workspace, rows: Path, *, steps: int = 20, floor: float = 1.0, **values: object) -> Run:
    """A run that came to its end: its loss falls to about `floor`."""
    run = tiny.tiny_run(workspace, rows, **values)
    run.append(Planned(total_steps=steps, train_rows=8, held_out_rows=2, tokens=80, trained_tokens=40))
    run.append(Phase(name="training"))
    for number in range(1, steps + 1):
        run.append(
            Step(step=number, loss=floor + 1 / number, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=9.0, memory_gib=1.0, epoch=0.1)
        )
        if number % 5 == 0:
            run.append(HeldOut(step=number, loss=floor + 0.2 + 1 / number))
    run.append(Finished(step=steps))
    return run


def test_a_row_says_what_a_run_is_and_is_not_made_again_until_its_events_grow(workspace: Workspace, rows: Path) -> None:
    run = past_run(workspace, rows, steps=50, floor=0.5)
    asked: list[str] = []

    def progress(of: Run) -> Progress:
        asked.append(of.id)
        return services.Watch().progress(of)

    overview = services.Overview(workspace, progress)
    (row,) = overview.rows()
    assert (row.id, row.title, row.state, row.model, row.step, row.total_steps) == (run.id, run.name, "finished", "tiny", 50, 50)
    assert row.best_loss == pytest.approx(0.72)
    assert row.size_bytes >= run.size()
    assert len(row.spark) <= 40
    assert row.spark[0] > row.spark[-1]
    assert overview.rows() == [row]
    assert asked == [run.id]
    run.append(Stopped(step=50, total_steps=50, adapter_saved=False))
    assert overview.rows()[0].state == "stopped"
    run.discard()
    assert overview.rows() == []


def test_a_label_is_kept_beside_the_run_and_one_too_long_is_a_sentence(workspace: Workspace, rows: Path) -> None:
    run = past_run(workspace, rows)
    labels.save(run, labels.Label(title="The good one", notes="r 64\nwas better"))
    assert labels.load(run) == labels.Label(title="The good one", notes="r 64\nwas better")
    assert labels.title(run) == "The good one"
    with pytest.raises(UserError, match="title of a run may have 80 characters, these are 81"):
        labels.Label(title="x" * 81)
    (run.folder / labels.NAME).write_text("{")
    assert labels.title(run) == run.name


def test_only_settings_that_differ_stand_side_by_side_and_all_text_is_escaped(workspace: Workspace, rows: Path) -> None:
    one, other = past_run(workspace, rows, lora_r=4), past_run(workspace, rows, lora_r=8, floor=2.0)
    made = services.build(workspace, services.WarmUp())
    seen = [replace(runs_tab.shown(made, run), title=ATTACK) for run in (one, other)]
    html = comparison(seen)
    assert "LoRA rank" in html or "Rank" in html
    assert "Learning rate" not in html
    assert "<img" not in html
    assert "One setting differs." in html
    assert html.count("<polyline") == 4
    assert "No loss yet" in picture([Shown(title="new", progress=Progress("new"), settings={})])


def test_a_run_whose_settings_cannot_be_read_still_shows_its_curve_and_can_be_deleted(workspace: Workspace, rows: Path) -> None:
    made, run, other = services.build(workspace, services.WarmUp()), past_run(workspace, rows), past_run(workspace, rows)
    run.config_path.write_text('{"version":', "utf-8")
    actions, _, _, _, words, chosen, _ = runs_tab.show(made, [run.id])
    assert actions["visible"]
    assert chosen == run.id
    assert "config.json is damaged" in words
    assert "<polyline" in words
    assert "config.json is damaged" in runs_tab.show(made, [run.id, other.id])[4]
    assert "config.json is damaged" in runs_tab.take_script(made, run.id)[0]
    runs_tab.discard(made, run.id)
    assert not run.folder.exists()


@pytest.mark.parametrize("values", [range(3), range(40), range(401)])
def test_a_spark_line_has_at_most_forty_points(values: range) -> None:
    line = spark([(step, float(step)) for step in values])
    assert 1 <= len(line) <= 40
    assert line == sorted(line)


def test_ticks_are_round_and_within_the_range() -> None:
    assert ticks(0.13, 2.2) == [0.5, 1.0, 1.5, 2.0]
    assert ticks(0, 1875) == [0, 500, 1000, 1500]


@pytest.mark.browser
def test_runs_are_found_compared_named_linked_and_deleted(browser: Browser, workspace: Workspace, rows: Path) -> None:
    first, second = past_run(workspace, rows, lora_r=4), past_run(workspace, rows, lora_r=8, floor=2.0)
    with served(workspace.root) as app:
        page = open_page(browser, app.url)
        go(page, "Runs")
        table, shown = page.locator("#runs-table"), page.locator("#runs-shown")
        expect(table.locator("tbody tr")).to_have_count(2)
        expect(table.locator("tbody tr").first).to_contain_text("20 / 20")

        for run in (first, second):
            table.locator(f'tr[data-run="{run.id}"] input').check()
        expect(shown).to_contain_text("One setting differs.")
        expect(shown.locator("svg polyline")).to_have_count(4)

        table.locator(f'tr[data-run="{first.id}"] button').click()
        expect(shown).to_contain_text("Finished: 20 steps")
        expect(page).to_have_url(re.compile(re.escape(f"run={first.id}")))
        page.locator("#run-title input, #run-title textarea").fill(ATTACK)
        page.locator("#run-notes textarea").fill("the better one")
        page.locator("#run-notes textarea").blur()
        expect(table.locator(f'tr[data-run="{first.id}"] .title')).to_have_text(ATTACK)
        table.locator("input[type=search]").fill("better one")
        expect(table.locator("tbody tr")).to_have_count(1)
        assert labels.load(first) == labels.Label(title=ATTACK, notes="the better one")

        linked = browser.new_context().new_page()
        linked.goto(f"{app.url}/?run={second.id}")
        expect(linked.locator("#runs-shown")).to_contain_text("Finished: 20 steps")
        linked.locator("#run-clone").click()
        expect(linked.locator("#field-lora_r input")).to_have_value("8")

        with linked.expect_download() as saved:
            linked.locator("#settings-save").click()
        written = Path(saved.value.path()).read_text("utf-8")
        assert "lora_r: 8" in written
        mine = re.sub("data: .*", f"data: {workspace.uploads / 'gone.json'}", written.replace("lora_r: 8", "lora_r: 16"))
        (workspace.root / "mine.yaml").write_text(mine, "utf-8")
        with linked.expect_file_chooser() as chosen:
            linked.locator("#settings-load").click()
        chosen.value.set_files(workspace.root / "mine.yaml")
        expect(linked.locator("#field-lora_r input")).to_have_value("16")
        expect(linked.locator("#train-plan")).to_contain_text("gone.json: check the path")
        linked.locator("#start-button").click()
        expect(linked.locator("#start-message")).to_contain_text("gone.json: check the path")

        page.locator("#run-script").click()
        expect(page.locator("#runs-message")).to_contain_text("has no adapter and no checkpoint yet")

        page.locator("#run-delete").click()
        expect(page.locator("#run-delete-question")).to_contain_text("with its log?")
        page.locator("#run-delete-cancel").click()
        expect(page.locator("#run-delete-question")).to_be_hidden()
        assert first.folder.is_dir()
        page.locator("#run-delete").click()
        page.locator("#run-delete-confirm").click()
        expect(table.locator(".said")).to_have_text("0 of 1 runs")
        assert not first.folder.exists()
        linked.goto(f"{app.url}/?run={first.id}")
        expect(linked.locator("#runs-shown")).to_contain_text(f"There is no run '{first.id}' here")
        assert page.evaluate("document.body.dataset.broken") is None
        assert page.faults == []  # type: ignore[attr-defined]
