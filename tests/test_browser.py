"""What a person brings and sets before Start, in a real Chromium over the real app: one app serves all of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, Page, Route, expect
from serving import Served, go, open_page, served, set_number, upload

from qlora_ui.runs import Workspace

pytestmark = pytest.mark.browser
MINUTE = 60_000


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One app for all of it."""
    home = tmp_path_factory.mktemp("shared-home")
    tiny.tiny_model(Workspace.open(home).models / tiny.NAME)
    with served(home) as running:
        yield running


@pytest.fixture
def page(browser: Browser, app: Served) -> Iterator[Page]:
    opened = open_page(browser, app.url)
    yield opened
    assert opened.faults == []  # type: ignore[attr-defined]
    opened.context.close()


def test_the_api_is_off_unless_it_was_asked_for(app: Served) -> None:
    assert httpx.get(f"{app.url}/v1/models").status_code == 404


BAD_FILES = {
    "empty.json": ("", "is empty"),
    "broken.json": ('[{"instruction": "a", "output"', "broken.json"),
    "no-answers.jsonl": ('{"instruction": "a", "output": ""}\n', "Row 1 of no-answers.jsonl"),
    "columns.csv": ("foo,bar\n1,2\n", "columns: foo, bar"),
}


def test_bad_files_get_one_sentence_beside_the_upload_and_are_not_chosen(page: Page, app: Served, tmp_path: Path) -> None:
    for name, (content, sentence) in BAD_FILES.items():
        (tmp_path / name).write_text(content, "utf-8")
        upload(page, tmp_path / name)
        expect(page.locator("#data-summary .problem")).to_contain_text(sentence)
        assert "Traceback" not in page.locator("body").inner_text()
        expect(page.locator("#data-use")).to_be_disabled()
        go(page, "Train")
        page.locator("#start-button").click()
        expect(page.locator("#start-message .problem")).to_contain_text(re.compile(f"{re.escape(sentence)}|No data set is chosen"))
        assert not os.listdir(app.home / "runs")
        go(page, "Data")
        page.locator("#data-upload").get_by_label("Clear").click()
        expect(page.locator("#data-summary")).to_contain_text("Drop one or more files at the left.")


def test_numbers_out_of_bounds_are_refused_at_their_field(page: Page, app: Served) -> None:
    go(page, "Train")
    set_number(page, "lora_r", 0)
    page.locator("#start-button").click()
    expect(page.locator("#field-lora_r")).to_contain_text("lora_r is 0: it must be a whole number from 1 to 512")
    expect(page.locator("#start-box .problem")).to_contain_text("lora_r is 0")  # once, above the button
    assert not os.listdir(app.home / "runs")
    set_number(page, "lora_r", 8)
    expect(page.locator("#train-plan")).to_contain_text("steps of 4 rows")


def test_what_differs_from_the_preset_is_marked_and_set_back(page: Page) -> None:
    go(page, "Train")
    line, rank = page.locator("#form-differences"), page.locator("#field-lora_r")
    expect(line).to_have_text("All settings are the preset's.")
    height = line.bounding_box()["height"]  # type: ignore[index]
    before = rank.locator("input").input_value()
    rank.locator("input").fill("24")
    expect(line).to_contain_text("1 setting differs from the preset: LoRA rank")  # while it is typed
    set_number(page, "max_steps", 7)
    page.get_by_text("Advanced", exact=True).click()
    page.locator("#field-use_rslora input").check()
    expect(line).to_contain_text("3 settings differ from the preset: LoRA rank, Max steps, rsLoRA")
    assert line.bounding_box()["height"] == height  # type: ignore[index]
    page.get_by_text("As a command", exact=True).click()
    command = page.locator("#settings-command textarea")
    expect(command).to_have_value(re.compile("--preset starter --set lora_r=24 --set use_rslora=true --set max_steps=7$"))

    reset = rank.get_by_role("button", name=f"LoRA rank differs from the preset. Reset it to {before}")
    reset.click()
    expect(rank.locator("input")).to_have_value(before)
    expect(reset).to_have_count(0)
    expect(line).to_contain_text("2 settings differ from the preset: Max steps, rsLoRA")
    page.get_by_role("button", name="Reset all").click()
    expect(line).to_have_text("All settings are the preset's.")
    expect(page.locator("#field-use_rslora input")).not_to_be_checked()
    expect(command).to_have_value(re.compile("--preset starter$"))


def test_a_number_is_checked_while_it_is_typed_and_a_start_leads_to_it(page: Page, app: Served) -> None:
    go(page, "Train")
    rank = page.locator("#field-lora_r")
    box = rank.bounding_box()
    held: list[Route] = []
    page.route(re.compile("/(queue/join|run/predict)"), lambda route: held.append(route))  # the server is not needed for it
    rank.locator("input").fill("600")
    expect(rank.locator(".fault")).to_have_text("lora_r is 600: it must be a whole number from 1 to 512.")
    expect(rank.locator("input")).to_have_attribute("aria-invalid", "true")
    assert rank.bounding_box() == box
    for route in held:
        route.continue_()
    page.unroute_all(behavior="wait")
    rank.locator("input").fill("1.5")
    expect(rank.locator(".fault")).to_have_text("lora_r is 1.5: it must be a whole number from 1 to 512.")
    rank.locator("input").fill("")
    expect(rank.locator(".fault")).to_have_text("lora_r is empty: it must be a whole number from 1 to 512.")
    page.locator("#start-button").click()
    expect(rank.locator("input")).to_be_focused()
    assert not os.listdir(app.home / "runs")
    rank.locator("input").fill("8")
    expect(rank.locator(".fault")).to_have_count(0)


def test_a_rule_between_fields_is_told_at_its_field_wherever_that_is(page: Page) -> None:
    go(page, "Train")
    page.get_by_text("Advanced", exact=True).click()
    page.locator("#field-use_dora input").check()
    page.locator("#field-quant_bits input").click()
    page.get_by_role("option", name="8", exact=True).click()
    expect(page.locator("#field-use_dora .fault")).to_contain_text("use_dora is true, but quant_bits is 8")
    page.get_by_text("Advanced", exact=True).click()
    page.locator("#start-button").click()
    expect(page.locator("#field-use_dora input")).to_be_focused()  # its fold was opened
    page.locator("#field-use_dora input").uncheck()
    expect(page.locator("#field-use_dora .fault")).to_have_count(0)


def test_a_missing_model_fails_with_what_to_do(page: Page, app: Served, tmp_path: Path) -> None:
    client = Client(app.url, verbose=False)
    with pytest.raises(AppError, match="There is no preset 'nonsense'"):
        client.predict("nonsense", "", "{}", api_name="/start_training")
    run_id = client.predict("starter", "", json.dumps({"model": "no-such-model"}), api_name="/start_training")
    expect(page.locator("#status-line")).to_contain_text("There is no model 'no-such-model' on this machine", timeout=MINUTE)
    assert client.predict(run_id, api_name="/run_status")["state"] == "failed"
    shutil.rmtree(app.home / "runs" / run_id)


def test_paths_outside_the_workspace_are_refused_from_the_page(app: Served, tmp_path: Path) -> None:
    client = Client(app.url, verbose=False)
    with pytest.raises(AppError, match="outside the workspace"):
        client.predict("starter", str(tiny.tiny_rows(tmp_path / "rows.json")), "{}", api_name="/start_training")
    with pytest.raises(AppError, match="outside the workspace"):
        client.predict("starter", "", json.dumps({"model": str(tmp_path)}), api_name="/start_training")


def test_values_are_shown_as_text_and_never_run(page: Page, tmp_path: Path) -> None:
    attack = "<img src=x onerror=\"document.body.dataset.broken='yes'\"><script>document.body.dataset.broken='yes'</script>"
    rows = [{"instruction": attack, "output": attack}, {"instruction": "a", "output": "", attack: "b"}]
    (tmp_path / "attack.json").write_text(json.dumps(rows), "utf-8")
    upload(page, tmp_path / "attack.json")
    expect(page.locator("#data-preview")).to_contain_text("onerror=")
    assert page.evaluate("document.body.dataset.broken") is None


def test_what_was_set_but_not_started_survives_a_reload(page: Page, tmp_path: Path) -> None:
    upload(page, tiny.tiny_rows(tmp_path / "kept.json", 15))
    expect(page.locator("#data-summary")).to_contain_text("15 rows")
    go(page, "Train")
    expect(page.locator("#train-data")).to_contain_text("kept.json, 15 rows")
    before = page.evaluate("localStorage.getItem('qlora-ui-draft')")
    with page.expect_response(lambda answer: "/run/" in answer.url and ",24," in (answer.request.post_data or "")):
        set_number(page, "lora_r", 24)
    page.wait_for_function("before => localStorage.getItem('qlora-ui-draft') !== before", arg=before)
    page.reload()
    expect(page.locator("#data-summary")).to_contain_text("15 rows")
    go(page, "Train")
    expect(page.locator("#field-lora_r input")).to_have_value("24")
    expect(page.locator("#train-data")).to_contain_text("kept.json, 15 rows")


def test_an_idle_page_asks_once_a_second_and_redraws_nothing(page: Page) -> None:
    expect(page.locator("#device-chip details")).to_be_visible(timeout=MINUTE)  # the warm-up has ended
    go(page, "Train")
    page.evaluate(
        "() => { window.redrawn = 0; new MutationObserver(seen => window.redrawn += seen.length)"
        ".observe(document.querySelector('#train-panel'), {subtree: true, childList: true, characterData: true}) }"
    )
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for _ in range(5):
        with page.expect_response(re.compile("component_server")) as answer:
            pass
        assert len(answer.value.body()) < 2000
    assert page.evaluate("window.redrawn") == 0
    assert len(asked) <= 7


def test_every_field_has_a_label_and_every_knob_is_on_the_form(page: Page) -> None:
    from qlora_ui.config import KNOBS
    from qlora_ui.ui.form import ELSEWHERE

    go(page, "Train")
    page.get_by_text("Advanced", exact=True).click()
    for knob in KNOBS.values():
        if knob.name not in ELSEWHERE:
            expect(page.locator(f"#field-{knob.name}").get_by_label(knob.title).first).to_be_visible()


def choose(page: Page, field: str, option: str) -> None:
    page.locator(f"{field} input").click()
    page.locator(field).get_by_role("option", name=option, exact=True).click()


def test_a_wrong_guess_is_corrected_by_mapping_and_the_preview_follows(page: Page, tmp_path: Path) -> None:
    rows = [{"question": f"Answer {n}.", "answer": f"Question {n}?", "id": n} for n in range(6)] + [
        {"question": "", "answer": "Why?", "id": 7}
    ]
    (tmp_path / "swapped.json").write_text(json.dumps(rows), "utf-8")
    upload(page, tmp_path / "swapped.json")
    expect(page.locator("#data-summary")).to_contain_text("Format: Question and answer")
    expect(page.locator("#data-preview .turn.user").first).to_contain_text("Answer 0.")
    choose(page, "#data-slot-0", "answer")
    choose(page, "#data-slot-2", "question")
    expect(page.locator("#data-preview .turn.user").first).to_contain_text("Question 0?")
    expect(page.locator("#data-preview .turn.assistant").first).to_contain_text("Answer 0.")
    expect(page.locator("#data-summary")).to_contain_text("7 rows: 6 kept, 1 dropped")
    with page.expect_download() as download:
        page.locator("#data-dropped").click()
    (dropped,) = Path(download.value.path()).read_text().splitlines()
    assert json.loads(dropped) == {"row": 7, "reason": "has no answer: 'answer' is empty", "values": rows[6]}


def test_rows_of_no_known_format_can_be_mapped_from_their_columns(page: Page, tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text("ask;reply\nHi?;Hello.\nAnd?;So.\n")
    upload(page, tmp_path / "odd.csv")
    expect(page.locator("#data-summary .problem")).to_contain_text("no known format; columns: ask, reply")
    expect(page.locator("#data-use")).to_be_disabled()
    choose(page, "#field-data_format", "Alpaca")
    expect(page.locator("#data-summary .problem")).to_contain_text("has no column 'instruction'")
    choose(page, "#data-slot-0", "ask")
    choose(page, "#data-slot-2", "reply")
    expect(page.locator("#data-summary")).to_contain_text("2 rows: 2 kept")
    expect(page.locator("#data-use")).to_be_enabled(timeout=MINUTE)
    go(page, "Train")
    choose(page, "#preset-select", "7B on a free Colab T4")  # has a split of its own set held out, which files have not
    expect(page.locator("#field-max_seq_len input")).to_have_value("512")
    go(page, "Data")
    expect(page.locator("#data-summary")).to_contain_text("2 rows: 2 kept")
    expect(page.locator("#data-slot-2 input")).to_have_value("reply")
    page.locator("#data-source").get_by_text("Bundled", exact=True).click()  # other rows begin unmapped
    expect(page.locator("#data-summary")).to_contain_text("252 rows: 252 kept")


def test_columns_by_the_thousand_do_not_stop_the_page_and_can_be_mapped_by_name(page: Page, tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text(",".join(f"c{n}" for n in range(10_000)) + "\n" + ",".join(f"cell {n}" for n in range(10_000)))
    upload(page, tmp_path / "wide.csv")
    expect(page.locator("#data-summary .problem")).to_contain_text("columns: c0, c1")
    choose(page, "#field-data_format", "Alpaca")
    for slot, column, said in (("#data-slot-0", "c7000", "no column 'output'"), ("#data-slot-2", "c9000", "1 row")):
        page.locator(f"{slot} input").fill(column)
        page.locator(f"{slot} input").press("Enter")
        expect(page.locator("#data-summary")).to_contain_text(said, timeout=MINUTE)
    expect(page.locator("#data-preview .turn.user")).to_contain_text("cell 7000")
    expect(page.locator("#data-preview .turn.assistant")).to_contain_text("cell 9000")


def use_tiny_model(page: Page) -> None:
    """So that tokens can be counted without the starter model."""
    go(page, "Train")
    page.locator("#model-input input").fill(tiny.NAME)
    page.locator("#model-input input").press("Enter")
    go(page, "Data")


def test_the_line_in_the_histogram_moves_with_the_max_length_of_either_tab(page: Page, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "completion": "word " * (2 * n + 1)} for n in range(30)]
    (tmp_path / "lengths.json").write_text(json.dumps(rows), "utf-8")
    use_tiny_model(page)
    upload(page, tmp_path / "lengths.json")
    line = page.locator("#data-lengths .line")
    expect(line).to_contain_text("max length 256", timeout=MINUTE)
    expect(page.locator("#data-lengths i.cut")).to_have_count(0)
    before = line.bounding_box()
    page.locator("#data-max-len input").fill("64")
    page.locator("#data-max-len input").blur()
    expect(line).to_contain_text("max length 64")
    expect(page.locator("#data-lengths i.cut").first).to_be_visible()
    expect(page.locator("#data-lengths")).to_contain_text("are longer and cut at their end")
    after = line.bounding_box()
    assert before is not None
    assert after is not None
    assert after["x"] < before["x"] - 50
    choose(page, "#data-order", "Longer than max length")
    page.get_by_text("As tokens").click()
    expect(page.locator("#data-preview .row-card s.cut").filter(has_text="word").first).to_be_visible()
    choose(page, "#field-long_rows", "drop")
    expect(page.locator("#data-lengths")).to_contain_text("are longer and left out")
    go(page, "Train")
    expect(page.locator("#field-max_seq_len input")).to_have_value("64")
    set_number(page, "max_seq_len", 96)
    go(page, "Data")
    expect(line).to_contain_text("max length 96")
    page.locator("#data-suggest").click()
    expect(page.locator("#data-suggest")).to_be_hidden()
    expect(page.locator("#data-summary")).to_contain_text("trained")


def test_the_reading_of_a_large_file_can_be_cancelled(page: Page, tmp_path: Path) -> None:
    with (tmp_path / "large.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": f"Question {n}?", "completion": f"Answer {n}. " * 20}) + "\n" for n in range(40_000))
    use_tiny_model(page)
    upload(page, tmp_path / "large.jsonl")
    expect(page.locator("#data-summary progress")).to_be_visible(timeout=MINUTE)
    page.locator("#data-cancel").click(timeout=MINUTE)
    expect(page.locator("#data-summary")).to_contain_text("Cancelled. Choose the data again to read it.")
    expect(page.locator("#data-cancel")).to_be_hidden()
    page.locator("#data-source").get_by_text("Bundled", exact=True).click()
    expect(page.locator("#data-summary")).to_contain_text("252 rows: 252 kept")
    expect(page.locator("#data-use")).to_be_enabled(timeout=MINUTE)


def test_a_newer_choice_ends_the_reading_of_an_older_one(page: Page, tmp_path: Path) -> None:
    with (tmp_path / "large.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": f"Question {n}?", "completion": f"Answer {n}. " * 20}) + "\n" for n in range(40_000))
    use_tiny_model(page)
    upload(page, tmp_path / "large.jsonl")
    expect(page.locator("#data-cancel")).to_be_visible(timeout=MINUTE)
    page.locator("#data-source").get_by_text("Bundled", exact=True).click()
    expect(page.locator("#data-summary")).to_contain_text("252 rows: 252 kept", timeout=MINUTE)
    expect(page.locator("#data-use")).to_be_enabled(timeout=MINUTE)
    expect(page.locator("#data-summary")).to_contain_text("252 rows: 252 kept")
    expect(page.locator("#data-pager")).to_contain_text("of 252")


def test_rows_can_be_searched_and_paged(page: Page, tmp_path: Path) -> None:
    upload(page, tiny.tiny_rows(tmp_path / "many.json", 30))
    expect(page.locator("#data-pager")).to_contain_text("1 to 4 of 30")
    page.locator("#data-search input, #data-search textarea").fill("question 2")
    page.locator("#data-search input, #data-search textarea").press("Enter")  # on the first page already
    expect(page.locator("#data-pager")).to_contain_text("1 to 4 of 11 found of 30")
    page.locator("#data-next").click()
    expect(page.locator("#data-pager")).to_contain_text("5 to 8 of 11 found of 30")
    page.locator("#data-search input, #data-search textarea").fill("question 17")
    page.locator("#data-search input, #data-search textarea").press("Enter")
    expect(page.locator("#data-pager")).to_contain_text("1 to 1 of 1 found of 30")
    expect(page.locator("#data-preview")).to_contain_text("Question 17")


def test_several_files_and_pasted_rows_are_data_sets(page: Page, tmp_path: Path) -> None:
    first, second = tiny.tiny_rows(tmp_path / "first.json", 5), tiny.tiny_rows(tmp_path / "second.json", 7)
    page.locator("#data-source").get_by_text("Upload", exact=True).click()
    page.locator("#data-upload input[type=file]").set_input_files([first, second])
    expect(page.locator("#data-summary")).to_contain_text("12 rows: 12 kept")
    page.locator("#data-source").get_by_text("Paste", exact=True).click()
    expect(page.locator("#data-summary")).to_contain_text("Paste rows at the left.")
    page.locator("#data-paste textarea").fill('{"prompt": "Hi", "completion": "Hello."}\n{"prompt": "And?", "completion": "So."}')
    page.locator("#data-paste-read").click()
    expect(page.locator("#data-summary")).to_contain_text("2 rows: 2 kept")
    page.locator("#data-source").get_by_text("Workspace", exact=True).click()
    choose(page, "#data-path", "first.json and 1 more")
    expect(page.locator("#data-summary")).to_contain_text("12 rows: 12 kept")


def test_without_the_hub_a_set_of_the_paper_is_one_sentence(page: Page) -> None:
    page.locator("#data-source").get_by_text("Hugging Face", exact=True).click()
    expect(page.locator("#data-set-vicuna")).to_be_disabled()
    page.locator("#data-set-alpaca").click()
    expect(page.locator("#data-summary .problem")).to_contain_text(
        "The Hugging Face Hub cannot be reached for tatsu-lab/alpaca", timeout=20_000
    )
    expect(page.locator("#data-hub input, #data-hub textarea")).to_have_value("tatsu-lab/alpaca")
    page.locator("#data-set-oasst1").click()
    expect(page.locator("#field-held_out_split input, #field-held_out_split textarea")).to_have_value("test")
    page.locator("#data-source").get_by_text("Bundled", exact=True).click()  # has no splits
    expect(page.locator("#data-summary")).to_contain_text("252 rows: 252 kept")


def test_a_set_of_which_nothing_would_be_trained_cannot_be_used(page: Page, tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text(json.dumps([{"prompt": "word " * 300, "completion": "Yes."}] * 3))
    use_tiny_model(page)
    upload(page, tmp_path / "long.json")
    expect(page.locator("#data-summary .problem")).to_contain_text("0 % of the tokens would be trained", timeout=MINUTE)
    expect(page.locator("#data-use")).to_be_disabled()
    go(page, "Train")
    page.locator("#start-button").click()
    expect(page.locator("#field-max_seq_len[data-blamed]")).to_contain_text("No row is left to train on: max_seq_len is 256. Raise it.")
    expect(page.locator("#status-line")).to_contain_text("No run yet")


def test_the_report_is_always_of_the_source_that_is_selected(page: Page, tmp_path: Path) -> None:
    upload(page, tiny.tiny_rows(tmp_path / "mine.json", 9))
    expect(page.locator("#data-summary")).to_contain_text("9 rows")
    page.locator("#data-source").get_by_text("Bundled", exact=True).click()
    expect(page.locator("#data-summary")).to_contain_text("252 rows")
    page.locator("#data-source").get_by_text("Upload", exact=True).click()
    expect(page.locator("#data-summary")).to_contain_text("9 rows")
    page.wait_for_function("localStorage.getItem('qlora-ui-draft') !== null")
    page.locator("#data-source").get_by_text("Hugging Face", exact=True).click()
    expect(page.locator("#data-summary")).to_contain_text("Name a data set at the left")
    expect(page.locator("#data-use")).to_be_disabled()
    for kind in (*["Bundled", "Upload", "Paste", "Workspace", "Hugging Face"] * 3, "Bundled"):  # faster than they are answered
        page.locator("#data-source").get_by_text(kind, exact=True).click()
    expect(page.locator("#data-summary")).to_contain_text("252 rows")
