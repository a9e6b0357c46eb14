"""Broken and odd data of every kind: each ends in one sentence, or in a reading that accounts for every row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from odd_data import Case
from odd_files import ENCODINGS, PACKED, PARQUET, PLACES
from odd_rows import JSON, TABLES, TURNS

from qlora_ui.config import DataConfig
from qlora_ui.data.checks import prepare
from qlora_ui.errors import UserError

CASES = [*ENCODINGS, *JSON, *TURNS, *TABLES, *PARQUET, *PACKED, *PLACES]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.what) for case in CASES])
def test_odd_data_ends_in_one_sentence_or_in_an_account_of_every_row(tmp_path: Path, case: Case) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    path = workspace / case.name
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content.encode() if isinstance(case.content, str) else case.content)
    if case.refused:
        with pytest.raises(UserError) as caught:
            prepare(DataConfig(data=str(path)), within=workspace)
        assert case.refused in str(caught.value)
        check_sentence(str(caught.value), Path(case.name).suffix)
        return
    report = prepare(DataConfig(data=str(path)), within=workspace).report
    reasons = {dropped.row: dropped.reason for dropped in report.dropped}
    assert (report.kept, report.read, sorted(reasons)) == (case.kept, case.kept + len(case.dropped), sorted(case.dropped))
    for row, expected in case.dropped.items():
        assert expected in reasons[row]
        assert reasons[row].isprintable()


def check_sentence(said: str, ending: str) -> None:
    """What every refusal is: one line that names its file, ends as a sentence does and speaks no Python."""
    assert said.isprintable()
    assert said.endswith(".")
    assert len(said) < 600
    assert ending in said
    assert not re.search(r"Traceback|<class|pyarrow|[a-z](Error|Exception)\b", said)


def test_no_case_is_there_twice_and_there_are_enough() -> None:
    assert len({case.what for case in CASES}) == len(CASES) >= 60


def test_markup_and_odd_characters_come_out_as_they_went_in(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script> &amp; {{ 7*7 }} \x1b[31m \0 \u202e 🦙"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": odd, "completion": odd}), "utf-8")
    assert [message.content for message in prepare(DataConfig(data=str(path)), within=tmp_path).conversations[0].messages] == [odd, odd]
