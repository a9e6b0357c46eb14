"""What a look at a data set tells the page, without a browser. A newer look has the last word, however late an older one ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import tiny

from qlora_ui import services
from qlora_ui.config import DataConfig, RunConfig
from qlora_ui.errors import UserError
from qlora_ui.inspection import Inspector, Look
from qlora_ui.runs import Workspace
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
def look(inspector: Late, tiny_workspace: Workspace) -> Callable[[str], list[str]]:
    """Looks at one data set after another on one page, and gives what each wrote into the summary."""
    here = dataclasses.replace(services.build(tiny_workspace, services.WarmUp()), inspector=inspector)
    wish = data_tab.Wish()

    def looked(chosen: str) -> list[str]:
        told = data_tab.look(here, ["model"], False, wish, "starter", chosen, tiny.NAME)
        return [words for page in told if isinstance(words := page[SUMMARY], str)]

    return looked


def test_the_last_word_of_a_look_is_its_report(look: Callable[[str], list[str]], inspector: Late) -> None:
    assert "12 rows" in look(inspector.late)[-1]
    assert "252 rows" in look(STARTER_SET)[-1]


@pytest.mark.parametrize("trouble", ["", "The Hub cannot be reached."])
def test_a_look_that_ends_after_a_newer_one_says_nothing_more(look: Callable[[str], list[str]], inspector: Late, trouble: str) -> None:
    newer: list[str] = []
    inspector.trouble = trouble
    inspector.meanwhile.append(lambda: newer.extend(look(STARTER_SET)))
    assert look(inspector.late) == []
    assert "252 rows" in newer[-1]


def test_cancelling_a_look_does_not_take_the_choice_of_a_newer_one(inspector: Late, tiny_workspace: Workspace) -> None:
    here, wish = dataclasses.replace(services.build(tiny_workspace, services.WarmUp()), inspector=inspector), data_tab.Wish()
    older = data_tab.look(here, ["model"], False, wish, "starter", inspector.late, tiny.NAME)
    assert [next(older), next(older)]
    data_tab.ask_to_stop(wish)
    assert "252 rows" in list(data_tab.look(here, ["model"], False, wish, "starter", STARTER_SET, tiny.NAME))[-1][SUMMARY]
    assert list(older) == []
