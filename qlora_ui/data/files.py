"""A file on this disk -> its rows as they stand. Knows nothing of what a row means."""

from __future__ import annotations

import csv
import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from qlora_ui.data import json_text, streams
from qlora_ui.data.json_text import NotJson, short
from qlora_ui.data.streams import Unreadable
from qlora_ui.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
MAX_JSON_BYTES = 64 * 2**20  # of an object: as Python's it takes up to thirty times as much memory
MAX_EMPTY_LINES = 100_000  # a packed file can hold thousands of millions
MAX_DEPTH = 100  # what reads a row later recurses into it, and Python ends at about 1,000

_CELLS_PER_BATCH, _ROWS_PER_BATCH, _BYTES_PER_BATCH = 20_000, 100, 128 * 2**20
_HEAD = 2**18

Row = Mapping[str, object] | str
"""A row's columns, or in words why that row cannot be read."""

_UPLOAD_DIGEST = re.compile(r"\A[0-9a-f]{12}-")
_UPLOADED_FOLDER = re.compile(r"\A[0-9a-f]{12}-(.+)-and-([0-9]+)-more\Z", re.DOTALL)


def kind(path: Path) -> str | None:
    """The ending that says how to read the file, such as `.csv` or `.csv.gz`; None when this app cannot."""
    name = path.name.lower()
    packed = ".gz" if name.endswith(".gz") else ""
    suffix = Path(name.removesuffix(packed)).suffix
    return suffix + packed if suffix in SUFFIXES else None


def shown(path: Path) -> str:
    """What to call the file in a sentence: an upload by the name that it came with."""
    if several := _UPLOADED_FOLDER.match(path.name):
        return printable(f"{several[1]} and {several[2]} more")
    return printable(_UPLOAD_DIGEST.sub("", path.name))


def is_uploaded_folder(path: Path) -> bool:
    """Whether the name is that of several files that were uploaded together."""
    return _UPLOADED_FOLDER.match(path.name) is not None


def printable(text: str) -> str:
    """The text as part of a sentence: one line, no odd characters, of a bearable length."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= 120 else f"{text[:70]}…{text[-40:]}"


def _problem(message: str) -> UserError:
    return UserError(message, field="data")


def rows(path: Path) -> Iterator[Row]:
    """All rows of a file, in order. Raises UserError when the whole cannot be read."""
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
    try:
        yield from readers[(kind(path) or "").removesuffix(".gz")](path)
    except Unreadable as error:
        raise _problem(f"{shown(path)} {error}") from error
    except OSError as error:
        raise _problem(f"{shown(path)} cannot be read ({error.strerror or error}): check the file and its permissions.") from error


# JSON ----------------------------------------------------------------------------------------------------------------


def _row(value: object, place: str) -> Row:
    if _is_deep(value):
        return f"{place} is nested more than {MAX_DEPTH} levels deep"
    return value if isinstance(value, dict) else f"{place} is {short(value)}, not an object with named columns"


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _values(outer)]
        if not level:
            return False
    return True


def _values(outer: dict[str, object] | list[object]) -> list[object]:
    return outer if isinstance(outer, list) else list(outer.values())


_OBJECT_IN_FIRST_LINE = re.compile(r"\s*\{.*\}\s*\n")


def _json(path: Path) -> Iterator[Row]:
    with streams.open_text(path) as file:
        is_array = file.read(_HEAD).lstrip().startswith("[")
        file.seek(0)
        text = "" if is_array else _whole(file)
        try:
            for number, item in enumerate(json_text.items(file) if is_array else _items_of(text), 1):
                yield _row(item, f"item {number}")
        except NotJson as error:
            if not _OBJECT_IN_FIRST_LINE.match(text):
                raise Unreadable(f"is not valid JSON: {error}; mend the file there or export it again.") from error
            yield from _lines(path)  # JSON Lines with the wrong suffix


def _whole(file: TextIO) -> str:
    text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES and not _OBJECT_IN_FIRST_LINE.match(text):
        limit = streams.size(MAX_JSON_BYTES)
        raise Unreadable(f"is one object of more than {limit}, read as a whole: save its rows as a list or as JSON Lines (.jsonl).")
    if bad := streams.bad_byte(text):
        raise streams.not_utf8(bad[0], text.count("\n", 0, bad[1]) + 1)
    return text


def _items_of(text: str) -> list[object]:
    """What are rows in JSON that is no list of them."""
    if not text.strip():
        return []
    whole = json_text.parse(text)
    if not isinstance(whole, dict):
        raise Unreadable(f"holds {short(whole)}: it must be a list of objects, one a row.")
    if "messages" in whole or "conversations" in whole:
        return [whole]  # that list holds the turns of one conversation, not rows
    lists = {name: value for name, value in whole.items() if isinstance(value, list) and any(isinstance(item, dict) for item in value)}
    if len(lists) > 1:
        raise Unreadable(f"holds several lists of rows ({printable(', '.join(lists))}): keep one list a file.")
    return next(iter(lists.values()), [whole])


def _json_lines(path: Path) -> Iterator[Row]:
    with streams.open_text(path) as file:
        opening = file.read(64)
    is_whole = re.match(r"\s*(\[|\{\s*[\r\n])", opening)  # an array, or one object over many lines, with the wrong suffix
    return _json(path) if is_whole else _lines(path)


def _lines(path: Path) -> Iterator[Row]:
    filled = 0
    with streams.open_text(path) as file:
        for number, line in streams.lines(file):
            if number - filled > MAX_EMPTY_LINES:
                raise Unreadable(f"has more than {MAX_EMPTY_LINES:,} empty lines in a row, from line {filled + 1}: remove them")
            if line is None or line.strip():
                filled = number
            if line is None:
                yield f"line {number} is longer than {streams.size(streams.MAX_LINE_BYTES)}"
            elif bad := streams.bad_byte(line):
                yield f"line {number} is not UTF-8 text (byte {bad[0]} at position {len(line[: bad[1]].encode()) + 1})"
            elif line.strip():
                try:
                    # Files that were joined have a byte order mark in the middle.
                    yield _row(json_text.parse(line.removeprefix("\ufeff").rstrip(), "column {column}"), f"line {number}")
                except NotJson as error:
                    yield f"line {number} is not valid JSON: {error}"


# Tables --------------------------------------------------------------------------------------------------------------


def _tsv(path: Path) -> Iterator[Row]:
    with streams.open_text(path) as file:
        yield from _table(file, "\t")


def _csv(path: Path) -> Iterator[Row]:
    with streams.open_text(path) as file:
        delimiter, _, _ = _columns(file.read(_HEAD))
        file.seek(0)
        yield from _table(file, delimiter)


def _table(file: TextIO, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # Python's default refuses an answer of over 131,072 characters; `physical` has ours
    begins, held = 1, 0

    def physical() -> Iterator[str]:
        nonlocal held
        for number, line in streams.lines(file):
            held += len(line) if line is not None else streams.MAX_LINE_BYTES + 1
            if line is None or held > streams.MAX_LINE_BYTES:
                reason = f"the row that begins at line {begins} is longer than {streams.size(streams.MAX_LINE_BYTES)}"
                raise Unreadable(f"is not valid CSV: {reason}; a quote may not be closed there.")
            if bad := streams.bad_byte(line):
                raise streams.not_utf8(bad[0], number)
            yield line

    try:
        # Strict: otherwise one quote that is never closed swallows all rows after it without a word.
        reader = csv.reader(physical(), delimiter=delimiter, strict=True)
        header: list[str] = []
        for cells in reader:
            if not header:
                header = _header(cells)
            elif len(cells) == len(header):
                yield dict(zip(header, cells, strict=True))
            elif cells:  # an empty line is no row
                yield f"line {begins} has {len(cells)} cells, the header has {len(header)}"
            begins, held = reader.line_num + 1, 0
    except csv.Error as error:
        reason = f"{error} in the row that begins at line {begins}"
        raise Unreadable(f"is not valid CSV: {reason}; close or double the quotes there, or export it again.") from error


def _header(cells: list[str]) -> list[str]:
    """The names, or nothing for an empty line above them."""
    names = [name.strip() for name in cells]
    if not any(names):
        return []
    _check_names(names)
    return names


def _check_names(names: list[str]) -> None:
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        many = "two" if count == 2 else f"{count:,}"
        called = f"called {printable(name)!r}: rename one of them" if name else "without a name: name them or remove them"
        raise Unreadable(f"has {many} columns {called}.")


def _columns(head: str) -> tuple[str, int, int]:
    """The delimiter, the rows as wide as the header (itself included), that width.

    The best gives columns at all, then the most such rows, then the most columns; else it is a comma.
    """

    def fit(delimiter: str) -> tuple[bool, int, int]:
        widths = [len(cells) for cells in islice(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter), 20) if cells]
        width = widths[0] if widths else 0
        return width > 1, widths.count(width), width

    csv.field_size_limit(2**31 - 1)
    fits = {delimiter: fit(delimiter) for delimiter in ",;\t|"}
    best = max(fits, key=lambda delimiter: fits[delimiter])
    return best, *fits[best][1:]


def kind_of_text(text: str) -> str:
    """The ending of a file that holds such text. Raises UserError when it is neither JSON nor a table."""
    text = text.lstrip("\ufeff \t\r\n")
    if text.startswith(("[", "{")):
        try:
            json_text.parse(text)
        except NotJson as error:
            if _OBJECT_IN_FIRST_LINE.match(text):
                return ".jsonl"
            raise _problem(f"The pasted text is not valid JSON: {error}; mend it there.") from error
        return ".json"
    delimiter, full_rows, width = _columns(text[:_HEAD])
    if width < 2 or full_rows < 2:
        remedy = "paste objects in { }, a list in [ ], or columns with their names in the first line."
        raise _problem(f"The pasted text is neither JSON nor a table with a header line: {remedy}")
    return ".tsv" if delimiter == "\t" else ".csv"


# Parquet -------------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Row]:
    if path.suffix.lower() != ".gz":
        yield from _parquet_rows(path)
        return
    with tempfile.TemporaryDirectory(prefix="parquet-") as folder:  # Parquet is read from its end, which a stream does not have
        unpacked = Path(folder) / "unpacked.parquet"
        with streams.open_bytes(path) as packed, unpacked.open("wb") as file:
            while piece := packed.read1():
                file.write(piece)
        yield from _parquet_rows(unpacked)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True) as file:
            _check_names(file.schema_arrow.names)
            stored, read, rows_read = path.stat().st_size, 0, 0
            for batch in file.iter_batches(batch_size=_batch_size(file.metadata)):
                read += batch.nbytes
                streams.check_ratio(read, stored)  # one long text that a million rows refer to is stored once
                yield from batch.to_pylist() if batch.nbytes <= streams.MAX_LINE_BYTES else _rows_of_bearable_length(batch, rows_read)
                rows_read += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = "a text in it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).strip().split("\n")[0]
        reason = re.sub(r"\w+(Exception|Error): ", "", printable(said)).rstrip(".")
        raise Unreadable(f"is not a readable Parquet file ({reason}): export or download it again.") from error


def _batch_size(about: Any) -> int:
    """Rows to take at once. Each may refer to one text that is stored once, of which the file tells only that its column is no shorter."""
    groups = [about.row_group(index) for index in range(about.num_row_groups)]
    longest = max((group.column(index).total_uncompressed_size for group in groups for index in range(group.num_columns)), default=0)
    wide: int = about.num_columns
    return max(1, min(_ROWS_PER_BATCH, _CELLS_PER_BATCH // max(1, wide), _BYTES_PER_BATCH // max(1, int(longest))))


def _rows_of_bearable_length(batch: Any, before: int) -> Iterator[Row]:
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        too_long = row.nbytes > streams.MAX_LINE_BYTES
        yield f"row {before + index + 1} is longer than {streams.size(streams.MAX_LINE_BYTES)}" if too_long else row.to_pylist()[0]
