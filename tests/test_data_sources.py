"""Reading rows from every kind of source, and what is said when one cannot be read. The Hub is a stand-in in this process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ui.data import sources
from qlora_ui.data.sources import BUNDLED, RawRow, check, import_upload, name_of, read
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"prompt": "Grüße, 你好", "completion": 'a "quoted"\nline; and, more\t'}, {"prompt": "b", "completion": "c"}]


def values(reference: object, **options: Any) -> list[Any]:
    return [row.values if row.values is not None else row.problem for row in read(str(reference), **options)]


def refusal(reference: object, within: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        list(read(str(reference), within))
    assert caught.value.field == "data"
    return str(caught.value)


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# Files that are as they should be --------------------------------------------------------------------------------------

QUOTED = '"Grüße, 你好"{0}"a ""quoted""\nline; and, more\t"\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", "\ufeff\n" + lines(ROWS).replace("\n", "\r\n\r\n")),
        ("array with the wrong suffix.jsonl", json.dumps(ROWS, indent=1)),
        ("A.JSON", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps({"version": 1, "tags": ["x"], "data": ROWS}, indent=1)),
        ("lines with the wrong suffix.json", lines(ROWS)),
        ("a.csv", "prompt,completion\n" + QUOTED.format(",") + "b,c\n"),
        ("a.csv", "\ufeffprompt;completion\r\n" + QUOTED.format(";") + "\r\nb;c"),
        ("a.csv", "prompt\tcompletion\n" + QUOTED.format("\t") + "b\tc\n"),
    ],
)
def test_rows_are_read_whatever_the_file_is(tmp_path: Path, name: str, content: str) -> None:
    reference = str(put(tmp_path / name, content))
    assert list(read(reference)) == [RawRow(number=number, values=row) for number, row in enumerate(ROWS, 1)]


def test_parquet_rows_are_read_with_their_lists(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "n": None}, {"messages": [], "n": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows


def test_a_json_file_with_one_conversation_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    assert values(put(tmp_path / "a.json", json.dumps(row))) == [row]


def test_a_csv_answer_may_be_long(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert values(put(tmp_path / "a.csv", f"prompt,completion\na,{long}\n")) == [{"prompt": "a", "completion": long}]


json_rows = st.lists(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=3), min_size=1, max_size=5)


@settings(deadline=None)  # files on a busy machine
@given(json_rows)
def test_json_lines_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    assert values(put(tmp_path_factory.mktemp("json") / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))) == rows


@settings(deadline=None)  # files on a busy machine
@given(st.binary(min_size=1, max_size=200), st.sampled_from(sources.SUFFIXES))
def test_any_bytes_give_rows_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = put(tmp_path_factory.mktemp("bytes") / f"a{suffix}", content)
    try:
        numbers = [row.number for row in read(str(path))]
    except UserError as error:
        numbers = []
        said = str(error)
    else:
        said = "a.rows."
    assert "a." in said
    assert said.endswith(".")
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_bundled_set_is_conversations_of_this_installation() -> None:
    bundled = BUNDLED["guanaco-starter"]
    if not bundled.path.is_file():
        pytest.skip(f"the bundled set {bundled.path} is not written yet")
    found = values("bundled:guanaco-starter", within=Path("/nowhere"))
    assert len(found) == bundled.rows > 0
    assert all(set(row) == {"messages"} for row in found)


# Files that are not ----------------------------------------------------------------------------------------------------


def test_a_broken_line_is_a_row_with_a_problem_and_the_others_are_read(tmp_path: Path) -> None:
    content = b'{"a": 1}\n\n{"a": \n[1]\n"x"\nnull\n{"a": "\xe9"}\n{"a": 2}'
    assert values(put(tmp_path / "a.jsonl", content)) == [
        {"a": 1},
        "line 3 is not valid JSON: Expecting value at column 6",
        "line 4 is [1], not an object with named columns",
        'line 5 is "x", not an object with named columns',
        "line 6 is null, not an object with named columns",
        "line 7 is not UTF-8 text (byte 0xe9 at position 8)",
        {"a": 2},
    ]


def test_a_number_or_nesting_that_python_refuses_is_a_problem_of_its_row(tmp_path: Path) -> None:
    found = values(put(tmp_path / "a.jsonl", "\n".join(['{"a": ' + "9" * 5000 + "}", "[" * 200_000, '{"a": 1}'])))
    assert [str(row).split(":")[0] for row in found] == ["line 1 is not valid JSON", "line 2 is not valid JSON", "{'a'"]


def test_items_of_an_array_that_are_no_rows_are_told(tmp_path: Path) -> None:
    assert values(put(tmp_path / "a.json", '[{"a": 1}, 5]')) == [{"a": 1}, "item 2 is 5, not an object with named columns"]


def test_ragged_csv_rows_are_told_with_their_line(tmp_path: Path) -> None:
    content = 'prompt,completion\n"a\nb",c\nd\ne,f,g\nh,i\n'
    assert values(put(tmp_path / "a.csv", content)) == [
        {"prompt": "a\nb", "completion": "c"},
        "line 4 has 1 cells, the header has 2",
        "line 5 has 3 cells, the header has 2",
        {"prompt": "h", "completion": "i"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json is not valid JSON: Expecting ':' delimiter at line 2, column 7; mend the file there"),
        ("a.json", '[{"a": "caf\ncut', "a.json is not valid JSON: Invalid control character at"),
        ("a.jsonl", '[{"a": 1},\n', "a.jsonl is not valid JSON"),
        ("a.json", b'[\n{"a": "\xe9"}]', "a.json is not UTF-8 text (byte 0xe9 in line 2): save it as UTF-8."),
        ("a.json", "5", "a.json holds 5: it must be a list of objects, one a row."),
        ("a.json", '{"x": [{}], "y": [{}]}', "a.json holds several lists of rows (x, y): keep one list a file."),
        ("a.csv", b"prompt,completion\na,b\nc,\xe9\n", "a.csv is not UTF-8 text (byte 0xe9 in line 3): save it as UTF-8."),
        (
            "a.csv",
            'a,b\n1,2\n3,"4\n5,6\n',
            "a.csv is not valid CSV: unexpected end of data in the row that begins at line 3; close or double",
        ),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv has two columns called 'a': rename one of them."),
        ("a.parquet", "PAR1 no", "a.parquet is not a readable Parquet file ("),
        ("a.json", "", "a.json is empty (0 bytes): choose a file with rows."),
        ("a.txt", "x", "a.txt is not a file this app reads: convert it to one of .json, .jsonl, .csv, .parquet."),
    ],
)
def test_a_broken_file_is_one_sentence_with_place_and_remedy(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    assert refusal(put(tmp_path / name, content)).startswith(said)


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
        (".", ". is a folder: choose one file in it"),
        ("a\0b.json", "There is no file a\0b.json"),
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
    assert "is a folder" in refusal("owner/name")


def test_the_page_reads_nothing_outside_its_workspace(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    outside = put(tmp_path / "secret.jsonl", lines(ROWS))
    (workspace / "link.jsonl").symlink_to(outside)
    inside = put(workspace / "a.jsonl", lines(ROWS))
    assert values(inside, within=workspace) == ROWS
    for reference in (outside, workspace / "link.jsonl", workspace / ".." / "secret.jsonl", tmp_path / "missing.jsonl"):
        assert "lies outside the workspace" in refusal(reference, workspace)


# Progress, Stop, names, uploads ----------------------------------------------------------------------------------------


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

    monkeypatch.setattr(sources, "_hub", silent_hub)
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
        ("/w/Café.jsonl", "cafe"),
        ("/w/данные.jsonl", "data"),
        ("", "data"),
        ("owner/" + "long-" * 20, ("long-" * 8).strip("-")),
    ],
)
def test_a_reference_has_a_short_name_for_runs(reference: str, name: str) -> None:
    assert name_of(reference) == name


@given(st.text(max_size=80))
def test_any_reference_has_a_name_that_a_folder_can_have(reference: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name_of(reference))


def test_an_upload_is_kept_under_its_content_and_its_own_name(tmp_path: Path) -> None:
    upload = put(tmp_path / "My answers (1).JSONL", lines(ROWS))
    workspace = tmp_path / "workspace" / "uploads"
    reference = import_upload(upload, workspace)
    digest = hashlib.sha256(upload.read_bytes()).hexdigest()[:12]
    assert Path(reference) == workspace / f"{digest}-My_answers_1.jsonl"
    assert values(reference, within=workspace) == ROWS
    assert import_upload(upload, workspace) == reference
    assert [path.name for path in workspace.iterdir()] == [Path(reference).name]


@pytest.mark.parametrize("name", ["..\\..\\evil.json", "....json", "-rf.json", "$(id);'\".json", "данные" * 12 + ".json"])
def test_an_upload_cannot_choose_where_it_goes(tmp_path: Path, name: str) -> None:
    reference = Path(import_upload(put(tmp_path / name, "[{}]"), tmp_path / "into"))
    assert reference.parent == tmp_path / "into"
    assert re.fullmatch(r"[0-9a-f]{12}-\w[\w.-]*\.json", reference.name)


def test_an_upload_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file this app reads"):
        import_upload(put(tmp_path / "a.exe", "x"), tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_the_data_rooms_load_neither_torch_nor_the_page() -> None:
    code = "import sys, qlora_ui.data.checks; print([m for m in ('torch', 'gradio', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# The Hub ---------------------------------------------------------------------------------------------------------------

HUB_ROW = b'{"prompt": "Hi", "completion": "Hello."}\n'
SUBSETS = b"---\nconfigs:\n- config_name: main\n  data_files: main.jsonl\n- config_name: other\n  data_files: other.jsonl\n---\n"
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "o/good": {"train.jsonl": HUB_ROW * 300, "test.jsonl": HUB_ROW},
    "o/one-split": {"validation.jsonl": HUB_ROW * 2},
    "o/no-train": {"validation.jsonl": HUB_ROW, "test.jsonl": HUB_ROW},
    "o/subsets": {"README.md": SUBSETS, "main.jsonl": HUB_ROW * 3, "other.jsonl": HUB_ROW},
    "o/broken": {"train.jsonl": HUB_ROW + b'{"prompt": '},
    "o/no-data": {"README.md": b"# Nothing"},
    "o/script": {"script.py": b"open('/tmp/ran', 'w')"},
    "o/gated": {"train.jsonl": HUB_ROW},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as loading a data set asks for."""

    def log_message(self, *args: object) -> None: ...

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        match = re.match(r"/(api/)?datasets/(\w+/[\w-]+)(?:/(tree|resolve)/[^/?]+)?/?([^?]*)", self.path)
        files = REPOSITORIES.get(match[2]) if match else None
        if match is None or files is None:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif match[3] == "tree":
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files] if not match[4] else []
            self.answer(200, json.dumps(listed).encode())
        elif match[1]:
            self.answer(200, json.dumps({"id": match[2], "sha": "a" * 40}).encode())
        elif match[2] == "o/gated":
            self.answer(401, b"{}", X_Error_Code="GatedRepo")
        elif match[4] not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="a" * 40)
        else:
            self.answer(200, files[match[4]], X_Repo_Commit="a" * 40, ETag=f'"{len(files[match[4]])}"')

    do_HEAD = do_GET


CLIENT = """
import json, sys, time
from qlora_ui.data import sources
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled
for reference in sys.argv[1:]:
    begun = time.monotonic()
    try:
        said = [row.values for row in sources.read(reference)]
    except UserError as error:
        said = str(error)
    print("@" + json.dumps([reference, said, time.monotonic() - begun]))
"""


def ask(endpoint: str, home: Path, *references: str, **environment: str) -> dict[str, tuple[Any, float]]:
    """What a fresh process says: the Hub's libraries read the endpoint once, when they are imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *references], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    return {reference: (said, seconds) for reference, said, seconds in told}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Any, float]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    references = [*REPOSITORIES, "o/nowhere", "o/subsets:main", "o/subsets:nope", "o/not--possible"]
    yield ask(f"http://127.0.0.1:{server.server_port}", tmp_path_factory.mktemp("hub"), *references)
    server.shutdown()


def test_the_train_split_of_a_hub_set_is_read(hub: dict[str, tuple[Any, float]]) -> None:
    assert hub["o/good"][0] == [json.loads(HUB_ROW)] * 300


def test_the_only_split_of_a_hub_set_is_read_and_a_subset_can_be_named(hub: dict[str, tuple[Any, float]]) -> None:
    assert len(hub["o/one-split"][0]) == 2
    assert len(hub["o/subsets:main"][0]) == 3


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("o/no-train", "o/no-train has no split 'train', only validation, test: download the one you want and upload it."),
        ("o/subsets", "o/subsets has several subsets (main, other): name one after a colon, as in o/subsets:main."),
        ("o/subsets:nope", "o/subsets:nope cannot be read from the Hugging Face Hub ("),
        ("o/nowhere", "There is no data set o/nowhere on the Hugging Face Hub, or it is private: check the name, or set HF_TOKEN."),
        ("o/gated", "o/gated is gated: accept its terms at https://huggingface.co/datasets/o/gated, and start the app with HF_TOKEN set."),
        ("o/broken", "o/broken cannot be read from the Hugging Face Hub ("),
        ("o/no-data", "o/no-data cannot be read from the Hugging Face Hub ("),
        ("o/script", "o/script cannot be read from the Hugging Face Hub ("),
        ("o/not--possible", "o/not--possible cannot be read from the Hugging Face Hub ("),
    ],
)
def test_a_hub_set_that_cannot_be_read_is_one_sentence_with_a_remedy(hub: dict[str, tuple[Any, float]], reference: str, said: str) -> None:
    assert hub[reference][0].startswith(said)
    assert "\n" not in hub[reference][0]


def test_without_a_network_the_hub_is_given_up_within_seconds(tmp_path: Path) -> None:
    said, seconds = ask("http://127.0.0.1:9", tmp_path, "o/good")["o/good"]
    assert said.startswith("The Hugging Face Hub cannot be reached for o/good (")
    assert said.endswith("check the connection, or upload a file.")
    assert seconds < 15  # of which a few are the import; load_dataset alone repeats for 23


def test_offline_mode_is_told_as_such(tmp_path: Path) -> None:
    said, _ = ask("http://127.0.0.1:9", tmp_path, "o/good", HF_HUB_OFFLINE="1")["o/good"]
    assert "offline mode is enabled" in said
