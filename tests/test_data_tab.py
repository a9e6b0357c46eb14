"""What a look at a data set tells the page. A newer look has the last word, however late an older one ends."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import tiny
from playwright.sync_api import Browser, Request, expect
from serving import free_port, open_page, upload

from qlora_ui import services
from qlora_ui.config import DataConfig, RunConfig
from qlora_ui.errors import UserError
from qlora_ui.inspection import Inspector, Look
from qlora_ui.runs import Workspace
from qlora_ui.ui import app as ui
from qlora_ui.ui import data_tab
from qlora_ui.ui.data_source import STARTER_SET

SUMMARY = 2


class Late(Inspector):
    """Something happens just when the rows of one file are known, or cannot be read."""

    def __init__(self, workspace: Workspace, late: Path) -> None:
        super().__init__(workspace, None)
        self.late, self.meanwhile = str(late), list[Callable[[], object]]()
        self.trouble = ""

    def look(self, config: RunConfig, fetch: bool = False) -> Generator[Look, None, None]:
        if self.trouble and config.data.data == self.late:
            self.meanwhile.pop()()
            raise UserError(self.trouble, field="data")
        yield from super().look(config, fetch)

    def raw_rows(self, data: DataConfig, count: int = 50) -> list[dict[str, Any]]:
        if data.data == self.late and self.meanwhile:
            self.meanwhile.pop()()
        return super().raw_rows(data, count)


@pytest.fixture
def inspector(tiny_workspace: Workspace, tmp_path: Path) -> Late:
    return Late(tiny_workspace, tiny.tiny_rows(tmp_path / "late.json"))


@pytest.fixture
def ends() -> list[list[Any]]:
    """The last word of each look in the order of their ends, which Gradio repeats."""
    return []


@pytest.fixture
def look(inspector: Late, tiny_workspace: Workspace, ends: list[list[Any]]) -> Callable[[str], list[str]]:
    """Looks at one data set after another on one page, and gives what each wrote into the summary."""
    here = dataclasses.replace(services.build(tiny_workspace, services.WarmUp()), inspector=inspector)
    wish = data_tab.Wish()

    def looked(chosen: str) -> list[str]:
        told = list(data_tab.look(here, ["model"], False, wish, "starter", chosen, tiny.NAME))
        ends.append(told[-1])
        return [words for page in told if isinstance(words := page[SUMMARY], str)]

    return looked


def test_the_last_word_of_a_look_is_its_report(look: Callable[[str], list[str]], inspector: Late) -> None:
    assert "12 rows" in look(inspector.late)[-1]
    assert "252 rows" in look(STARTER_SET)[-1]


@pytest.mark.parametrize("trouble", ["", "The Hub cannot be reached."])
def test_a_look_that_ends_after_a_newer_one_says_nothing_more(
    look: Callable[[str], list[str]], ends: list[list[Any]], inspector: Late, trouble: str
) -> None:
    newer: list[str] = []
    inspector.trouble = trouble
    inspector.meanwhile.append(lambda: newer.extend(look(STARTER_SET)))
    assert look(inspector.late) == []
    assert "252 rows" in newer[-1]
    assert "252 rows" in ends[0][SUMMARY]
    assert ends[1] == [gr.skip()] * data_tab.TOLD


class Held(Inspector):
    """The bundled rows are known, and their tokens not before it is let go: as on a machine that still loads its libraries."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace, None)
        self.go = threading.Event()

    def look(self, config: RunConfig, fetch: bool = False) -> Generator[Look, None, None]:
        for seen in super().look(config, fetch):
            yield seen
            if config.data.data == STARTER_SET:
                self.go.wait(120)


WATCH = """() => {
    const place = document.querySelector("#data-summary");
    window.shown = [];
    new MutationObserver(() => window.shown.push(place.innerText)).observe(place, { subtree: true, childList: true, characterData: true });
}"""


@pytest.mark.browser
def test_what_was_chosen_meanwhile_stays_in_sight_when_an_older_look_ends(browser: Browser, workspace: Workspace, tmp_path: Path) -> None:
    held = Held(workspace)
    built = ui.build(dataclasses.replace(services.build(workspace, services.WarmUp()), inspector=held))
    _, url, _ = built.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, **ui.launch_options())
    (tmp_path / "columns.csv").write_text("foo,bar\n1,2\n")
    try:
        page = open_page(browser, url)
        expect(page.locator("#data-summary")).to_contain_text("252 rows")
        upload(page, tmp_path / "columns.csv")
        expect(page.locator("#data-summary .problem")).to_contain_text("columns: foo, bar")
        page.evaluate(WATCH)
        ended: list[Request] = []
        for event in ("requestfinished", "requestfailed"):
            page.on(event, lambda request: ended.append(request) if "queue/data" in request.url else None)
        held.go.set()
        while not ended:  # the page's stream, once all has been told
            page.wait_for_timeout(50)
        expect(page.locator("#data-summary .problem")).to_contain_text("columns: foo, bar")
        assert not [words for words in page.evaluate("window.shown") if "252 rows" in words]
        page.context.close()
    finally:
        held.go.set()
        built.close()
