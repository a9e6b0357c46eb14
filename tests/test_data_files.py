"""Reading every kind of file, in bounded memory, and what is said when one cannot be read."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_rows import ROWS, lines, put

from qlora_ui.data import files, json_text, streams
from qlora_ui.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def values(path: Path) -> list[Any]:
    return list(files.rows(path))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        values(path)
    assert caught.value.field == "data"
    return str(caught.value)


def parquet(path: Path, rows: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Files that are as they should be --------------------------------------------------------------------------------------

QUOTED = '"Grüße, 你好"{0}"a ""quoted""\nline; and, more\t"\n'
GOOD = [
    ("a.jsonl", lines(ROWS)),
    ("a.jsonl", "\ufeff\n" + lines(ROWS).replace("\n", "\r\n\r\n")),
    ("joined from two files.jsonl", "\ufeff" + lines(ROWS[:1]) + "\ufeff" + lines(ROWS[1:])),
    ("ends of lines of old.jsonl", lines(ROWS).replace("\n", "\r")),
    ("array with the wrong suffix.jsonl", json.dumps(ROWS, indent=1)),
    ("object over many lines with the wrong suffix.jsonl", json.dumps({"rows": ROWS}, indent=1)),
    ("A.JSON", json.dumps(ROWS)),
    ("a.json", "\ufeff" + json.dumps({"version": 1, "tags": ["x"], "data": ROWS}, indent=1)),
    ("lines with the wrong suffix.json", lines(ROWS)),
    ("a.csv", "prompt,completion\n" + QUOTED.format(",") + "b,c\n"),
    ("a.csv", "\n\n prompt , completion \n" + QUOTED.format(",") + "\nb,c\n"),
    ("a.csv", "\ufeffprompt;completion\r\n" + QUOTED.format(";") + "\r\nb;c"),
    ("a.csv", "prompt\tcompletion\n" + QUOTED.format("\t") + "b\tc\n"),
    ("a.csv", "prompt|completion\n" + QUOTED.format("|") + "b|c\n"),
    ("a.tsv", "prompt\tcompletion\n" + QUOTED.format("\t") + "b\tc\n"),
]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("name", "content"), GOOD)
def test_rows_are_read_whatever_the_file_is(tmp_path: Path, name: str, content: str, encoding: str, packed: bool) -> None:
    mark = "" if encoding == "utf-8" or content.startswith("\ufeff") else "\ufeff"
    written = (mark + content).encode(encoding)
    path = put(tmp_path / f"{name}.gZ", gzip.compress(written, mtime=0)) if packed else put(tmp_path / name, written)
    assert values(path) == ROWS


def test_old_line_ends_are_read_in_tables_too(tmp_path: Path) -> None:
    assert values(put(tmp_path / "a.csv", "prompt,completion\ra,b\r")) == [{"prompt": "a", "completion": "b"}]


def test_a_tsv_is_separated_by_tabs_however_many_commas_it_has(tmp_path: Path) -> None:
    assert values(put(tmp_path / "a.tsv", "a,b,c\n1,2,3\n")) == [{"a,b,c": "1,2,3"}]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.json", ".json"),
        ("A.CSV.GZ", ".csv.gz"),
        ("a.b.parquet.gz", ".parquet.gz"),
        ("a.gz", None),
        ("a.csv.gz.gz", None),
        (".csv", None),
        ("a.txt", None),
        ("", None),
    ],
)
def test_the_ending_says_how_to_read(name: str, kind: str | None) -> None:
    assert files.kind(Path(name)) == kind


def test_parquet_rows_are_read_with_their_lists(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "n": None}, {"messages": [], "n": 2}]
    assert values(parquet(tmp_path / "a.parquet", rows)) == rows


def test_packed_parquet_is_read_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": number} for number in range(250)]
    packed = put(tmp_path / "a.parquet.gz", gzip.compress(parquet(tmp_path / "a.parquet", rows).read_bytes()))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    reading = files.rows(packed)
    assert next(reading) == rows[0]
    assert list((tmp_path / "temporary").iterdir())
    assert [rows[0], *reading] == rows
    assert not list((tmp_path / "temporary").iterdir())


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


cells = st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2)


@settings(deadline=None)  # files on a busy machine
@given(st.lists(cells, min_size=1, max_size=5), st.sampled_from("\t,;|"))
def test_tables_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, table: list[list[str]], delimiter: str) -> None:
    path = tmp_path_factory.mktemp("table") / ("a.tsv" if delimiter == "\t" else "a.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["prompt", "completion"], *table])
    assert [list(row.values()) for row in values(path)] == table


ENDINGS = [suffix + packed for suffix in files.SUFFIXES for packed in ("", ".gz")]


@settings(deadline=None)  # files on a busy machine
@given(st.binary(min_size=1, max_size=200), st.sampled_from(ENDINGS), st.booleans())
def test_any_bytes_give_rows_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str, packed: bool) -> None:
    path = put(tmp_path_factory.mktemp("bytes") / f"a{ending}", gzip.compress(content, mtime=0) if packed else content)
    try:
        assert all(isinstance(row, dict) or row.startswith(("line ", "item ")) for row in values(path))
    except UserError as error:
        assert str(error).startswith(f"a{ending} ")  # noqa: PT017  # either of the two is right
        assert str(error).endswith(".")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


# Rows that cannot be read, in files that can ---------------------------------------------------------------------------


def test_a_broken_line_is_a_row_with_a_problem_and_the_others_are_read(tmp_path: Path) -> None:
    content = b'{"a": 1}\n\n{"a": \n[1]\n"x"\nnull\n{"a": "\xe9"}\n{"a": "\xc3\xa4\xe9"}\n{"a": 2}'
    assert values(put(tmp_path / "a.jsonl", content)) == [
        {"a": 1},
        "line 3 is not valid JSON: Expecting value at column 6",
        "line 4 is [1], not an object with named columns",
        'line 5 is "x", not an object with named columns',
        "line 6 is null, not an object with named columns",
        "line 7 is not UTF-8 text (byte 0xe9 at position 8)",
        "line 8 is not UTF-8 text (byte 0xe9 at position 10)",
        {"a": 2},
    ]


def test_a_number_or_nesting_that_python_refuses_is_a_problem_of_its_row(tmp_path: Path) -> None:
    content = "\n".join(['{"a": ' + "9" * 5000 + "}", "[" * 200_000, '{"a": ' + "[" * 300 + "]" * 300 + "}", '{"a": 1}'])
    assert values(put(tmp_path / "a.jsonl", content)) == [
        "line 1 is not valid JSON: a number has more than 4,300 digits",
        "line 2 is not valid JSON: it is nested too deeply",
        "line 3 is nested more than 100 levels deep",
        {"a": 1},
    ]


def test_nesting_up_to_the_limit_is_read(tmp_path: Path) -> None:
    row = json.loads('{"a": ' + "[" * 99 + "]" * 99 + "}")
    assert values(put(tmp_path / "a.jsonl", json.dumps(row))) == [row]


def test_a_key_that_stands_twice_is_told_and_neither_value_is_taken(tmp_path: Path) -> None:
    content = '{"a": 1}\n{"a": 1, "b": {"x": 2, "x": 3}}\n'
    said = '"x" stands twice in the object {"x": 3}'
    assert values(put(tmp_path / "a.jsonl", content)) == [{"a": 1}, f"line 2 is not valid JSON: {said}"]
    assert refusal(put(tmp_path / "a.json", '[{"x": 2, "x": 3}]')) == (
        f"a.json is not valid JSON: {said}; mend the file there or export it again."
    )


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


# Files that cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json is not valid JSON: Expecting ':' delimiter at line 2, column 7; mend the file there"),
        ("a.json", '[{"a": "caf\ncut', "a.json is not valid JSON: Invalid control character at line 1, column 12;"),
        ("a.jsonl", '[{"a": 1},\n', "a.jsonl is not valid JSON"),
        ("a.json", b'[\n{"a": "\xe9"}]', "a.json is not UTF-8 text (byte 0xe9 in line 2): save it as UTF-8."),
        ("a.json", "5", "a.json holds 5: it must be a list of objects, one a row."),
        ("a.json", '{"x": [{}], "y": [{}]}', "a.json holds several lists of rows (x, y): keep one list a file."),
        ("a.csv", b"prompt,completion\na,b\nc,\xe9\n", "a.csv is not UTF-8 text (byte 0xe9 in line 3): save it as UTF-8."),
        ("a.csv", "a,b".encode("utf-16-le"), "a.csv is not UTF-8 text (byte 0x61 in line 1 begins UTF-16-LE): save it as UTF-8."),
        (
            "a.csv",
            "\ufeffa,b".encode("utf-16-le") + b"\x00",
            "a.csv begins as UTF-16 but does not go on so (byte 0x00: truncated data): save",
        ),
        (
            "a.csv",
            'a,b\n1,2\n3,"4\n5,6\n',
            "a.csv is not valid CSV: unexpected end of data in the row that begins at line 3; close or double",
        ),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv has two columns called 'a': rename one of them."),
        ("a.csv", "a,,,\n1,,,\n", "a.csv has 3 columns without a name: name them or remove them."),
        ("a.parquet", "PAR1 no", "a.parquet is not a readable Parquet file ("),
        ("a.jsonl", "PAR1 no", "a.jsonl is a Parquet file: give it the ending .parquet."),
        ("a.csv", b"PK\x03\x04", "a.csv is a ZIP archive (spreadsheets are, too): bring the file in it, or export the sheet as CSV."),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "a.jsonl holds gzip-packed data: unpack it and bring the file in it."),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz is not a gzip file, or a damaged one: pack it again, or bring it unpacked."),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0) + b"more", "a.jsonl.gz is not a gzip file, or a damaged one"),
        ("a.parquet.gz", gzip.compress(b"PAR1 no", mtime=0), "a.parquet.gz is not a readable Parquet file ("),
    ],
)
def test_a_broken_file_is_one_sentence_with_place_and_remedy(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    assert refusal(put(tmp_path / name, content)).startswith(said)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_packed_file_that_was_cut_off_is_refused_as_a_whole(tmp_path: Path, ending: str) -> None:
    noise = random.Random(0).randbytes(300_000).hex()  # packs badly: the cut is far behind the first rows
    whole = gzip.compress(f'{{"a": 1}}\n{{"a": "{noise}"}}\n'.encode())
    assert refusal(put(tmp_path / f"a{ending}.gz", whole[:-100_000])) == (
        f"a{ending}.gz is cut off in the middle of its packed data: copy or download it again."
    )


def test_two_columns_of_one_name_are_told_in_parquet_too(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table([["x"], ["y"]], names=["a", "a"]), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == "a.parquet has two columns called 'a': rename one of them."


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.jsonl").startswith("a.jsonl cannot be read (No such file or directory): check the file")


@pytest.mark.parametrize("name", ["a\nb.json", "a\x1b[31m.json", "a\u202egnp.json", os.fsdecode(b"a\xff.json"), "a" * 200 + ".json"])
def test_a_strange_name_is_made_fit_for_a_sentence(tmp_path: Path, name: str) -> None:
    said = refusal(put(tmp_path / name, "5"))
    assert said.isprintable()
    assert len(said) < 250
    assert ".json holds 5" in said


# Limits ----------------------------------------------------------------------------------------------------------------


def test_a_line_over_the_limit_is_a_problem_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1000)
    content = lines([{"a": 1}, {"a": "x" * 200_000}, {"a": 2}, {"a": "x" * 1000}])
    long = "is longer than 1,000 bytes"
    assert values(put(tmp_path / "a.jsonl", content)) == [{"a": 1}, f"line 2 {long}", {"a": 2}, f"line 4 {long}"]


@pytest.mark.parametrize("row", ["c," + "x" * 1001, 'c,"' + "x\n" * 501, '"' + 'x\n","' * 400])
def test_a_table_row_over_the_limit_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1000)
    path = put(tmp_path / "a.csv", f"prompt,completion\n{'a,b' * 2}\n" + "a,b\n" * 400 + row)
    assert refusal(path) == (
        "a.csv is not valid CSV: the row that begins at line 403 is longer than 1,000 bytes; a quote may not be closed there."
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_json_object_over_the_limit_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1000)
    content = json.dumps({"rows": [{"a": "x" * 1000}]}).encode()
    path = put(tmp_path / "a.json.gz", gzip.compress(content, mtime=0)) if packed else put(tmp_path / "a.json", content)
    said = f"{path.name} is one object of more than 1,000 bytes, read as a whole: save its rows as a list or as JSON Lines (.jsonl)."
    assert refusal(path) == said


def test_an_array_and_lines_over_the_limit_of_an_object_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1000)
    rows = [{"a": "x" * 100, "b": [number, {"c": -1.5e3}]} for number in range(20)]
    assert values(put(tmp_path / "array.json", json.dumps(rows))) == rows
    assert values(put(tmp_path / "lines.json", lines(rows))) == rows


@settings(max_examples=60)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=9), st.integers(), st.floats(), st.none()))),
    piece=st.integers(1, 20),
    indent=st.sampled_from([None, 0, 2]),
)
def test_an_array_is_read_the_same_in_pieces_of_any_size(rows: list[dict[str, Any]], piece: int, indent: int | None) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_text, "_PIECE", piece)
        text = json.dumps(rows, indent=indent)
        assert repr(list(json_text.items(io.StringIO(f"\n {text} ")))) == repr(rows)
        for broken in (text[:-1], f"{text},", f"[{text[:-1]} {{}} {{}}]"):
            with pytest.raises(json_text.NotJson) as ours:
                list(json_text.items(io.StringIO(broken)))
            with pytest.raises(json.JSONDecodeError) as pythons:
                json.loads(broken)
            assert f"line {pythons.value.lineno}, column {pythons.value.colno}" in str(ours.value)


def test_an_item_of_an_array_that_does_not_end_is_refused_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1000)
    path = put(tmp_path / "a.json", '[{"a": 1},\n {"a": "' + "x" * 300_000)
    assert refusal(path) == "a.json holds an item longer than 1,000 bytes, from line 2, column 2: remove or divide it."


def test_an_array_is_read_row_by_row_so_that_the_first_are_there_at_once(tmp_path: Path) -> None:
    read = files.rows(put(tmp_path / "a.json", "[" + '{"a": 1},' * 200_000 + "nonsense"))
    assert next(read) == {"a": 1}


def test_a_table_of_one_long_text_stored_once_is_refused_as_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FREE_UNPACKED_BYTES", 10_000)
    path = parquet(tmp_path / "a.parquet", [{"prompt": "x" * 10_000}] * 5000)
    assert "unpacks to more than 200 times its" in refusal(path)


def test_a_long_text_that_many_rows_refer_to_is_not_held_a_hundred_times(tmp_path: Path) -> None:
    indices, texts = pyarrow.array([0] * 120, pyarrow.int32()), pyarrow.array([random.Random(1).randbytes(2**21).hex()])
    table = pyarrow.table({"prompt": pyarrow.DictionaryArray.from_arrays(indices, texts)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)
    assert sum(1 for row in files.rows(tmp_path / "a.parquet") if isinstance(row, dict)) == 120
    assert pyarrow.default_memory_pool().max_memory() < 320 * 2**20


def test_a_row_of_parquet_over_the_limit_is_a_problem_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2**20)
    path = parquet(tmp_path / "a.parquet", [{"prompt": "a"}, {"prompt": "x" * 2**20}, {"prompt": "b"}])
    assert list(files.rows(path)) == [{"prompt": "a"}, "row 2 is longer than 1 MiB", {"prompt": "b"}]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_bomb_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(streams, "FREE_UNPACKED_BYTES", 10_000)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = put(tmp_path / f"a{ending}.gz", gzip.compress(b'{"a": 1}\n' * 500_000, mtime=0))
    assert refusal(path).startswith(f"a{ending}.gz unpacks to more than 200 times its {path.stat().st_size:,} bytes: if that is right,")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_small_file_may_pack_as_well_as_it_likes(tmp_path: Path) -> None:
    packed = put(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 50_000, mtime=0))
    assert packed.stat().st_size * streams.MAX_UNPACK_RATIO < 50_000 * 9
    assert values(packed) == [{"a": 1}] * 50_000


SPARSE = r"""
import re, sys
from pathlib import Path
from qlora_ui.data import files
from qlora_ui.errors import UserError

for name in sys.argv[1:]:
    try:
        print(list(files.rows(Path(name))))
    except UserError as error:
        print(error)
# Not ru_maxrss: a child begins with that of its parent, which may have torch loaded.
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_line_of_one_gibibyte_takes_little_memory(tmp_path: Path) -> None:
    made = [
        put(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "'),
        put(tmp_path / "a.csv", 'prompt,completion\na,b\nc,"'),
        put(tmp_path / "a.json", '[{"a": "'),
    ]
    for path in made:
        os.truncate(path, 2**30)  # a hole: it takes no room on the disk
    told = subprocess.run([sys.executable, "-c", SPARSE, *map(str, made)], cwd=ROOT, capture_output=True, text=True, check=True)
    *said, peak_mib = told.stdout.splitlines()
    assert said == [
        "[{'a': 1}, 'line 2 is longer than 16 MiB']",
        "a.csv is not valid CSV: the row that begins at line 3 is longer than 16 MiB; a quote may not be closed there.",
        "a.json is not valid JSON: Invalid control character at line 1, column 9; mend the file there or export it again.",
    ]
    assert int(peak_mib) < 500


def test_a_table_of_10000_columns_is_read_quickly_and_in_small_pieces(tmp_path: Path) -> None:
    names = [f"column {number}" for number in range(10_000)]
    path = put(tmp_path / "a.csv", "\n".join([";".join(names), ";".join("x" * 10_000), ";".join("y" * 10_000)]))
    assert values(path) == [dict.fromkeys(names, "x"), dict.fromkeys(names, "y")]
    assert values(parquet(tmp_path / "a.parquet", [dict.fromkeys(names, 1)] * 3)) == [dict.fromkeys(names, 1)] * 3


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        assert values(put(tmp_path / "a.csv", mark + "ä,b\n1,2\n".encode(encoding))) == [{"ä": "1", "b": "2"}]
