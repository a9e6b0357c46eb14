"""Odd data in what a row is read from: encodings, Parquet, gzip, and places that are no file."""

from __future__ import annotations

import codecs
import datetime
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from odd_data import HEADER, LINE, Case


def parquet(table: Any) -> Callable[[Path], object]:
    return lambda path: pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.table(table), path)


def parquet_bytes(path: Path, **options: Any) -> bytes:
    table = pyarrow.table({"prompt": ["a"] * 1000, "completion": [str(number) for number in range(1000)]})
    pyarrow.parquet.write_table(table, path, **options)
    return path.read_bytes()


def with_another_digit(path: Path) -> None:
    """Text that can be read and is not what was written: only the sum that was stored with it tells."""
    whole = parquet_bytes(path, compression="none", use_dictionary=False, write_page_checksum=True)
    assert whole.count(b"789") == 1
    path.write_bytes(whole.replace(b"789", b"780"))


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def folder_of(**inside: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in inside.items():
            (path / name.replace("_", ".")).write_text(content)

    return make


ENCODINGS = [
    Case(
        what="latin-1 in one line", name="a.jsonl", content=LINE.encode() + '{"prompt": "é"}'.encode("latin-1"), kept=1, dropped={2: "0xe9"}
    ),
    Case(
        what="latin-1 in all lines", name="a.jsonl", content='{"prompt": "é"}\n'.encode("latin-1") * 3, refused="byte 0xe9 at position 13"
    ),
    Case(what="latin-1 in a table", name="a.csv", content="prompt,completion\na,é\n".encode("latin-1"), refused="byte 0xe9 in line 2"),
    Case(
        what="cp1251", name="a.json", content='[{"prompt": "да", "completion": "б"}]'.encode("cp1251"), refused="a.json is not UTF-8 text"
    ),
    Case(
        what="shift-jis",
        name="a.tsv",
        content="質問\t答え\nこんにちは\tはい\n".encode("shift-jis"),
        refused="in line 1): save it as UTF-8.",
    ),
    Case(what="byte order mark", name="a.csv", content="\ufeffprompt,completion\na,b\n", kept=1),
    Case(what="byte order mark and nothing", name="a.jsonl", content="\ufeff", refused="a.jsonl has no rows"),
    Case(what="utf-16 with its mark", name="a.jsonl", content=LINE.encode("utf-16"), kept=1),
    Case(what="utf-16 without its mark", name="a.jsonl", content=LINE.encode("utf-16-le"), refused="begins UTF-16-LE): save it as UTF-8."),
    Case(what="utf-16 cut in a character", name="a.json", content=f"[{LINE}]".encode("utf-16") + b"\x20", refused="begins as UTF-16 but"),
    Case(what="utf-16 with half a character", name="a.json", content=codecs.BOM_UTF16_LE + b'"\0\0\xd8"\0', refused="begins as UTF-16 but"),
    Case(what="utf-32 with its mark", name="a.json", content=f"[{LINE}]".encode("utf-32"), refused="begins UTF-32"),
    Case(what="utf-32 without its mark", name="a.csv", content="prompt,completion".encode("utf-32-be"), refused="begins UTF-32-BE"),
    Case(what="nothing but NUL bytes", name="a.csv", content=bytes(1000), refused="byte 0x00 in line 1"),
    Case(what="a NUL byte in a line", name="a.jsonl", content=LINE + LINE.replace("yes", "y\0s"), kept=1, dropped={2: "Invalid control"}),
    Case(what="a NUL byte in a cell", name="a.csv", content="prompt,completion\na\0b,c\n", kept=1),
    Case(what="NUL bytes at the end", name="a.jsonl", content=LINE.encode() + bytes(100), kept=1, dropped={2: "line 2 is not valid JSON"}),
    Case(what="control characters", name="a.csv", content="prompt,completion\n\x1b[31mred,\x07\x08bell\n", kept=1),
    Case(what="lone surrogate", name="a.jsonl", content=LINE + LINE.replace("yes", "\\ud83d"), kept=1, dropped={2: "half a character"}),
    Case(what="lone surrogate in a column's name", name="a.jsonl", content='{"\\ud83d": 1}', refused="no known format"),
    Case(what="whole surrogate pair", name="a.jsonl", content=LINE.replace("yes", "\\ud83d\\ude00"), kept=1),
    Case(what="encoded surrogate", name="a.jsonl", content=b'{"prompt": "\xed\xa0\x80"}', refused="byte 0xed at position 13"),
    Case(what="line separators of Unicode", name="a.jsonl", content='{"prompt": "a\u2028b\u0085c", "completion": "d"}\n', kept=1),
]

PARQUET = [
    Case(what="of other columns", name="a.parquet", content=parquet({"a": [1], "b": ["x"]}), refused="no known format; columns: a, b"),
    Case(what="of no rows", name="a.parquet", content=parquet({"prompt": pyarrow.array([], pyarrow.string())}), refused="has no rows"),
    Case(what="of no columns", name="a.parquet", content=parquet({}), refused="a.parquet has no rows"),
    Case(what="empty file", name="a.parquet", content=b"", refused="a.parquet is empty (0 bytes)"),
    Case(what="not parquet at all", name="a.parquet", content=LINE * 10, refused="a.parquet is not a readable Parquet file"),
    Case(
        what="cut off", name="a.parquet", content=lambda path: path.write_bytes(parquet_bytes(path)[:500]), refused="not a readable Parquet"
    ),
    Case(
        what="damaged inside",
        name="a.parquet",
        content=lambda path: path.write_bytes((whole := parquet_bytes(path))[:4] + b"\xff" * 60 + whole[64:]),
        refused="a.parquet is not a readable Parquet file",
    ),
    Case(
        what="damaged at its end",
        name="a.parquet",
        content=lambda path: path.write_bytes((whole := parquet_bytes(path))[:-200] + b"\xff" * 192 + whole[-8:]),
        refused="a.parquet is not a readable Parquet file",
    ),
    Case(
        what="binary columns", name="a.parquet", content=parquet({"prompt": [b"\xff"], "completion": [b"b"]}), refused="is b'b', not text"
    ),
    Case(
        what="columns of one name in parquet",
        name="a.parquet",
        content=parquet(pyarrow.table([["a"], ["b"]], ["p", "p"])),
        refused="two columns",
    ),
    Case(
        what="nested nulls",
        name="a.parquet",
        content=parquet({"messages": [None, [None], [{"role": "user", "content": None}], [{"role": None, "content": "a"}]]}),
        refused="Row 1 of a.parquet: has no turns",
    ),
    Case(
        what="times beside that Python cannot hold",
        name="a.parquet",
        content=parquet({"prompt": ["a"], "completion": ["b"], "t": pyarrow.array([2**62], pyarrow.timestamp("us"))}),
        refused="a.parquet is not a readable Parquet file",
    ),
    Case(
        what="dates and categories beside",
        name="a.parquet",
        content=parquet({"prompt": ["a"], "completion": pyarrow.array(["b"]).dictionary_encode(), "t": [datetime.date(2026, 1, 1)]}),
        kept=1,
    ),
]

PACKED = [
    Case(
        what="a bomb", name="a.jsonl.gz", content=gzip.compress(LINE.encode() + bytes(80 * 2**20)), refused="unpacks to more than 200 times"
    ),
    Case(
        what="a bomb of JSON", name="a.json.gz", content=gzip.compress(b"[" + b" " * 80 * 2**20), refused="unpacks to more than 200 times"
    ),
    Case(what="a bomb of Parquet", name="a.parquet.gz", content=gzip.compress(bytes(80 * 2**20)), refused="unpacks to more than 200 times"),
    Case(
        what="packed and cut off",
        name="a.jsonl.gz",
        content=gzip.compress(LINE.encode())[:-12],
        refused="a.jsonl.gz is cut off in the middle",
    ),
    Case(
        what="packed with a wrong sum", name="a.csv.gz", content=gzip.compress(HEADER.encode())[:-8] + bytes(8), refused="not a gzip file"
    ),
    Case(what="not packed at all", name="a.jsonl.gz", content=LINE, refused="a.jsonl.gz is not a gzip file, or a damaged one"),
    Case(what="packed twice", name="a.jsonl.gz", content=gzip.compress(gzip.compress(LINE.encode())), refused="holds gzip-packed data"),
    Case(what="packed twice and says so", name="a.jsonl.gz.gz", content=gzip.compress(b"x"), refused="not a file this app reads"),
    Case(what="packed and does not say so", name="a.jsonl", content=gzip.compress(LINE.encode()), refused="a.jsonl holds gzip-packed data"),
    Case(what="packed nothing", name="a.jsonl.gz", content=gzip.compress(b""), refused="a.jsonl.gz has no rows"),
    Case(what="packed in parts", name="a.jsonl.gz", content=gzip.compress(LINE.encode()) * 2, kept=2),
]

PLACES = [
    Case(what="path parts", name="../outside.jsonl", content=LINE, refused="lies outside the workspace"),
    Case(what="path parts inside", name="./a.jsonl", content=LINE, kept=1),
    Case(what="spaces in the name", name="  my  data .jsonl", content=LINE, kept=1),
    Case(what="unicode in the name", name="данные 数据 🦙.jsonl", content=LINE, kept=1),
    Case(what="a line feed in the name", name="a\nb.json", content="5", refused="a\ufffdb.json holds 5"),
    Case(what="a terminal's code in the name", name="\x1b[31m.json", content="5", refused="\ufffd[31m.json holds 5"),
    Case(what="markup in the name", name="<img src=x>.json", content="5", refused="<img src=x>.json holds 5"),
    Case(what="a long name", name="a" * 240 + ".json", content="5", refused="aaa.json holds 5"),
    Case(what="a name that is too long", name="a" * 300 + ".json", content=lambda path: None, refused="cannot be opened"),
    Case(what="a name with a NUL", name="a\0b.json", content=lambda path: None, refused="a\ufffdb.json"),
    Case(what="no such file", name="a.json", content=lambda path: None, refused="There is no file"),
    Case(what="an unknown ending", name="a.xlsx", content=b"PK", refused="a.xlsx is not a file this app reads"),
    Case(what="no ending", name="data", content=LINE, refused="data is not a file this app reads"),
    Case(what="an empty folder of a file's name", name="a.json", content=folder_of(), refused="a.json is an empty folder"),
    Case(
        what="a folder",
        name="folder",
        content=folder_of(a_jsonl=LINE * 2, b_jsonl="5\n"),
        kept=2,
        dropped={3: "b.jsonl, row 1: line 1 is 5"},
    ),
    Case(
        what="a folder with notes",
        name="folder",
        content=folder_of(a_jsonl=LINE, notes_txt="x"),
        refused="notes.txt is not a file this app",
    ),
    Case(
        what="a folder with a broken file", name="folder", content=folder_of(a_jsonl=LINE, b_json="["), refused="b.json is not valid JSON"
    ),
    Case(what="a pipe", name="a.jsonl", content=os.mkfifo, refused="a.jsonl is not a file on a disk"),
    Case(what="a device", name="a.jsonl", content=link_to("/dev/zero"), refused="a.jsonl lies outside the workspace"),
    Case(what="a link out of the workspace", name="a.jsonl", content=link_to("/etc/passwd"), refused="lies outside the workspace"),
    Case(what="a link to itself", name="a.jsonl", content=link_to("a.jsonl"), refused="a.jsonl"),
    Case(what="a link to nothing", name="a.jsonl", content=link_to("b.jsonl"), refused="There is no file"),
]
