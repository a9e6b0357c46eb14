"""What a reference means: files, folders, uploads, pastes, the Hub; and what is said when it means nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_rows import ROWS, lines, put

from qlora_ui.data import hub
from qlora_ui.data.sources import BUNDLED, RawRow, check, import_paste, import_upload, import_uploads, name_of, read, shown
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

ROOT = Path(__file__).resolve().parents[1]


def values(reference: object, **options: Any) -> list[Any]:
    return [row.values if row.values is not None else row.problem for row in read(str(reference), **options)]


def refusal(reference: object, within: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        list(read(str(reference), within))
    assert caught.value.field == "data"
    return str(caught.value)


def test_the_bundled_set_is_conversations_of_this_installation() -> None:
    bundled = BUNDLED["guanaco-starter"]
    if not bundled.path.is_file():
        pytest.skip(f"the bundled set {bundled.path} is not written yet")
    found = values("bundled:guanaco-starter", within=Path("/nowhere"))
    assert len(found) == bundled.rows > 0
    assert all(set(row) == {"messages"} for row in found)


def test_a_file_that_may_not_be_opened_is_told(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", lines(ROWS))
    rows = read(str(path))
    path.unlink()  # after the check, before the reading
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read \(No such file or directory\)"):
        list(rows)


# What is refused before anything is read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("", "No data set is chosen."),
        ("  ", "No data set is chosen."),
        ("bundled:nope", "There is no bundled data set 'nope': use one of guanaco-starter."),
        ("missing.jsonl", "There is no file missing.jsonl: check the path, upload the file, or give a Hugging Face id"),
        ("folder/missing.jsonl", "There is no file folder/missing.jsonl"),
        ("justaname", "There is no file justaname"),
        ("a\0b.json", "There is no file a�b.json"),
        ("x" * 5000 + ".json", "'xxx"),
    ],
)
def test_a_reference_that_means_nothing_is_refused_without_reading(reference: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check(reference)
    assert str(caught.value).startswith(said)
    assert caught.value.field == "data"


def test_a_hub_id_passes_the_cheap_test_and_a_folder_of_that_name_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check("owner/name")
    check("owner/name-v1.1:main", within=tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert refusal("owner/name").startswith("owner/name is an empty folder: put files into it (.json, ")


def test_the_page_reads_nothing_outside_its_workspace(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    outside = put(tmp_path / "secret.jsonl", lines(ROWS))
    (workspace / "link.jsonl").symlink_to(outside)
    inside = put(workspace / "a.jsonl", lines(ROWS))
    assert values(inside, within=workspace) == ROWS
    (workspace / "folder").mkdir()
    (workspace / "folder" / "link.jsonl").symlink_to(outside)
    for reference in (outside, workspace / "link.jsonl", workspace / ".." / "secret.jsonl", tmp_path / "missing.jsonl", tmp_path):
        assert "lies outside the workspace" in refusal(reference, workspace)
    assert "link.jsonl lies outside the workspace" in refusal(workspace / "folder", workspace)


# Folders ---------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_folder_are_one_data_set_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path / "c.jsonl.gz", gzip.compress(lines([{"a": 5}]).encode()))
    put(tmp_path / "a.csv", "a,b\n1,2\n")
    put(tmp_path / "b.jsonl", lines([{"a": 2}, 7, {"a": 4}]))
    put(tmp_path / ".DS_Store", "no data")
    assert list(read(str(tmp_path), within=tmp_path)) == [
        RawRow(number=1, place="a.csv, row 1", values={"a": "1", "b": "2"}),
        RawRow(number=2, place="b.jsonl, row 1", values={"a": 2}),
        RawRow(
            number=3,
            place="b.jsonl, row 2",
            values=None,
            problem="b.jsonl, row 2: line 2 is 7, not an object with named columns",
        ),
        RawRow(number=4, place="b.jsonl, row 3", values={"a": 4}),
        RawRow(number=5, place="c.jsonl.gz, row 1", values={"a": 5}),
    ]


def test_the_rows_of_a_single_file_have_no_place(tmp_path: Path) -> None:
    assert [row.place for row in read(str(put(tmp_path / "a.jsonl", lines(ROWS))))] == ["", ""]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", "x", "notes.txt is not a file this app reads: convert it to one of .json, .jsonl, .csv, .tsv, .parquet (each also"),
        ("b.jsonl", "", "b.jsonl is empty (0 bytes): choose a file with rows."),
        ("b.json", "5", "b.json holds 5: it must be a list of objects, one a row."),
        ("deeper/b.json", "[]", "deeper is a folder: bring its files (.json, .jsonl, .csv, .tsv, .parquet), not the folder in another."),
    ],
)
def test_a_file_that_cannot_be_read_stops_its_folder(tmp_path: Path, name: str, content: str, said: str) -> None:
    put(tmp_path / "a.jsonl", lines(ROWS))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    put(tmp_path / name, content)
    assert refusal(tmp_path).startswith(said)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    said = "a.jsonl is not a file on a disk but a pipe or a device: save its rows to a file."
    assert refusal(tmp_path / "a.jsonl") == refusal(tmp_path) == said


# Progress, Stop, names ----------------------------------------------------------------------------------------


def test_progress_counts_rows_to_the_last(tmp_path: Path) -> None:
    seen: list[int] = []
    values(put(tmp_path / "a.jsonl", lines([{"a": 1}] * 1234)), on_progress=seen.append)
    assert seen == [500, 1000, 1234]


def test_stop_ends_the_reading_before_the_next_row(tmp_path: Path) -> None:
    stop = threading.Event()
    rows = read(str(put(tmp_path / "a.jsonl", lines(ROWS))), should_stop=stop.is_set)
    assert next(rows).number == 1
    stop.set()
    with pytest.raises(Cancelled):
        next(rows)


def test_stop_does_not_wait_for_a_network_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer, stop = threading.Event(), threading.Event(), threading.Event()

    def silent_hub(reference: str) -> Iterator[dict[str, object]]:
        asked.set()
        answer.wait(60)
        yield {"a": 1}

    monkeypatch.setattr(hub, "rows", silent_hub)
    threading.Thread(target=lambda: asked.wait(60) and stop.set(), daemon=True).start()
    try:
        with pytest.raises(Cancelled):
            list(read("owner/name", should_stop=stop.is_set))
        assert not answer.is_set()
    finally:
        answer.set()


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("bundled:guanaco-starter", "guanaco-starter"),
        ("../shared/data/alpaca_1k.json", "alpaca-1k"),
        ("/w/uploads/0123456789ab-My Answers (2).CSV", "my-answers-2"),
        ("timdettmers/openassistant-guanaco", "openassistant-guanaco"),
        ("owner/data-v1.1:main", "data-v1-1-main"),
        ("/w/uploads/0123456789ab-My answers.jsonl.gz", "my-answers"),
        ("/w/uploads/0123456789ab-first.csv-and-2-more", "first-csv-and-2-more"),
        ("/w/some folder/", "some-folder"),
        ("/w/Café.jsonl", "cafe"),
        ("/w/данные.jsonl", "data"),
        ("", "data"),
        ("owner/" + "long-" * 20, ("long-" * 8).strip("-")),
        ("/w/customer-support-conversations-2026-cleaned.json", "customer-support-conversations-2026"),
        ("/w/" + "a" * 50 + ".json", "a" * 40),
    ],
)
def test_a_reference_has_a_short_name_for_runs(reference: str, name: str) -> None:
    assert name_of(reference) == name


@given(st.text(max_size=80))
def test_any_reference_has_a_name_that_a_folder_can_have(reference: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name_of(reference))


@pytest.mark.parametrize(
    ("reference", "called"),
    [
        ("/w/uploads/0123456789ab-answers.csv.gz", "answers.csv.gz"),
        ("/w/uploads/0123456789ab-first.jsonl-and-2-more", "first.jsonl and 2 more"),
        ("bundled:guanaco-starter", "guanaco-starter"),
        ("owner/name", "owner/name"),
        ("/data/folder", "/data/folder"),
        ("/data/line\nfeed", "/data/line�feed"),
    ],
)
def test_a_reference_is_called_by_what_the_person_knows(reference: str, called: str) -> None:
    assert shown(reference) == called


# Uploads and pastes ----------------------------------------------------------------------------------------------------


def test_an_upload_is_kept_under_its_content_and_its_own_name(tmp_path: Path) -> None:
    upload = put(tmp_path / "My answers (1).JSONL", lines(ROWS))
    workspace = tmp_path / "workspace" / "uploads"
    reference = import_upload(upload, workspace)
    digest = hashlib.sha256(upload.read_bytes()).hexdigest()[:12]
    assert Path(reference) == workspace / f"{digest}-My_answers_1.jsonl"
    assert values(reference, within=workspace) == ROWS
    assert import_upload(upload, workspace) == reference
    assert [path.name for path in workspace.iterdir()] == [Path(reference).name]


@pytest.mark.parametrize(
    "name", ["..\\..\\evil.json", "....json", "-rf.json", "$(id);'\".json", "данные" * 12 + ".json", "𠀀" * 60 + ".json"]
)
def test_an_upload_cannot_choose_where_it_goes(tmp_path: Path, name: str) -> None:
    reference = Path(import_upload(put(tmp_path / name, "[{}]"), tmp_path / "into"))
    assert reference.parent == tmp_path / "into"
    assert re.fullmatch(r"[0-9a-f]{12}-\w[\w.-]*\.json", reference.name)


def test_an_upload_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file this app reads"):
        import_upload(put(tmp_path / "a.exe", "x"), tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_several_uploads_are_one_folder_whatever_their_order(tmp_path: Path) -> None:
    into = tmp_path / "into"
    (tmp_path / "other").mkdir()
    uploads = [
        put(tmp_path / "b c.jsonl", lines([{"a": 2}])),
        put(tmp_path / "A.CSV.gz", gzip.compress(b"a,b\n1,2\n")),
        put(tmp_path / "other" / "b c.jsonl", lines([{"a": 3}])),
    ]
    reference = import_uploads(uploads, into)
    assert re.fullmatch(r"[0-9a-f]{12}-A\.csv\.gz-and-2-more", Path(reference).name)
    assert shown(reference) == "A.csv.gz and 2 more"
    assert sorted(path.name for path in Path(reference).iterdir()) == ["A.csv.gz", "b_c-2.jsonl", "b_c.jsonl"]
    assert sorted(str(row) for row in values(reference, within=into)) == ["{'a': '1', 'b': '2'}", "{'a': 2}", "{'a': 3}"]
    assert import_uploads([uploads[1], uploads[0], uploads[2]], into) == reference
    assert [path.name for path in into.iterdir()] == [Path(reference).name]


def test_other_contents_make_another_folder(tmp_path: Path) -> None:
    uploads = [put(tmp_path / "a.jsonl", lines(ROWS)), put(tmp_path / "b.jsonl", lines(ROWS))]
    first = import_uploads(uploads, tmp_path / "into")
    put(uploads[1], lines(ROWS[:1]))
    second = import_uploads(uploads, tmp_path / "into")
    assert (len(values(first)), len(values(second))) == (4, 3)


def test_names_that_differ_in_capitals_do_not_replace_each_other(tmp_path: Path) -> None:
    reference = import_uploads([put(tmp_path / name, lines(ROWS)) for name in ("a.jsonl", "A.jsonl", "a.JSONL")], tmp_path / "into")
    assert sorted(path.name.lower() for path in Path(reference).iterdir()) == ["a-2.jsonl", "a-3.jsonl", "a.jsonl"]


def test_one_upload_of_several_is_as_before(tmp_path: Path) -> None:
    upload = put(tmp_path / "a.jsonl", lines(ROWS))
    assert import_uploads([upload], tmp_path / "into") == import_upload(upload, tmp_path / "into")


def test_several_uploads_of_which_one_cannot_be_read_leave_nothing(tmp_path: Path) -> None:
    good, bad = put(tmp_path / "a.jsonl", lines(ROWS)), put(tmp_path / "b.exe", "x")
    for uploads, said in (
        ([good, bad], "b.exe is not a file this app reads"),
        ([], "No file is chosen"),
        ([good, tmp_path], "is a folder"),
    ):
        with pytest.raises(UserError, match=said):
            import_uploads(uploads, tmp_path / "into")
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (json.dumps(ROWS, indent=1), "json"),
        (json.dumps(ROWS[0]) + "\n", "json"),
        ("﻿\n" + lines(ROWS), "jsonl"),
        (lines(ROWS).replace("\n", "\n\n"), "jsonl"),
        ('prompt,completion\n"Grüße, 你好",b\n', "csv"),
        ("prompt;completion\nGrüße, 你好;b\n", "csv"),
        ("prompt\tcompletion\nGrüße, 你好\tb\n", "tsv"),
    ],
)
def test_a_pasted_text_is_kept_as_the_file_that_it_is(tmp_path: Path, text: str, kind: str) -> None:
    reference = import_paste(text, tmp_path / "into")
    assert re.fullmatch(rf"[0-9a-f]{{12}}-pasted\.{kind}", Path(reference).name)
    assert shown(reference) == f"pasted.{kind}"
    assert values(reference)[0]["prompt"] == ROWS[0]["prompt"]
    assert import_paste(text, tmp_path / "into") == reference


def test_a_broken_line_of_a_pasted_text_is_told_like_that_of_a_file(tmp_path: Path) -> None:
    found = values(import_paste('{"a": 1}\n{"a": \n{"a": "\ud800"}', tmp_path))
    assert found == [
        {"a": 1},
        "line 2 is not valid JSON: Expecting value at column 6",
        "line 3 is not UTF-8 text (byte 0xed at position 8)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Nothing is pasted: paste JSON, JSON Lines, or a table with a header line."),
        (" \n﻿", "Nothing is pasted"),
        ('[{"a": 1},\n {"a" 2}]', "The pasted text is not valid JSON: Expecting ':' delimiter at line 2, column 7; mend it there."),
        ('{"a": ', "The pasted text is not valid JSON: Expecting value at line 1, column 7; mend it there."),
        ("Once upon a time.", "The pasted text is neither JSON nor a table with a header line: paste objects in { }, a list in [ ], or"),
        ("Hello, world.\nHow are you?", "The pasted text is neither JSON nor a table"),
        ("prompt,completion", "The pasted text is neither JSON nor a table"),
        ("5", "The pasted text is neither JSON nor a table"),
    ],
)
def test_a_pasted_text_that_is_no_data_is_told_and_leaves_nothing(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        import_paste(text, tmp_path / "into")
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "into").exists()


def test_the_data_rooms_load_neither_torch_nor_the_page() -> None:
    code = "import sys, qlora_ui.data.checks; print([m for m in ('torch', 'gradio', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
