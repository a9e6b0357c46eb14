"""Column mapping: a person's column names -> the names that the formats know. Knows nothing of any single format."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from qlora_ui.data.formats import FIELDS, BadRow, Row, names_of
from qlora_ui.errors import UserError

# A field's own name and the other columns that a format would read it from.
_ALIASES = {field: {alias for known in FIELDS.values() for alias in known.get(field, ())} for fields in FIELDS.values() for field in fields}
_IN_A_TURN = ("role", "content", "from", "value")


def parse(text: str) -> dict[str, str]:
    """`instruction=question, "output=answer, long"` as {the format's field: the person's column}. Raises UserError.

    An empty column, as in `input=`, means that the field is not to be read.
    """
    columns: dict[str, str] = {}
    for pair in (cell for line in csv.reader(io.StringIO(text), skipinitialspace=True) for cell in line):
        field, equals, column = (part.strip() for part in pair.partition("="))
        if field not in _ALIASES or not equals:
            raise UserError(f"The column mapping {pair!r} is not field=column, with a field of {', '.join(_ALIASES)}.", field="columns")
        columns[field] = column
    return columns


def write(columns: Mapping[str, str]) -> str:
    """Inverse of `parse`."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([f"{field}={column}" for field, column in columns.items()])
    return line.getvalue()


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its columns under the names that the formats know. Raises BadRow when a mapped column is missing."""
    if not columns:
        return row
    hidden = {alias for field in columns for alias in _ALIASES[field]}
    renamed = {name: value for name, value in row.items() if name not in hidden}
    for field, column in columns.items():
        if field in _IN_A_TURN:
            renamed = {name: _in_turns(value, field, column) for name, value in renamed.items()}
        elif column:
            renamed[field] = row[_named(row, column, field)]
    return renamed


def choices(rows: Sequence[Row], field: str) -> list[str]:
    """The names in these rows that the field could be read from: their columns, or the keys of their turns."""
    if field not in _IN_A_TURN:
        return list(dict.fromkeys(name.strip() for row in rows for name in row))
    turns = [turn for row in rows for value in row.values() if isinstance(value, list) for turn in value]
    return list(dict.fromkeys(str(key) for turn in turns if isinstance(turn, Mapping) for key in turn))


def _named(row: Row, column: str, field: str) -> str:
    """The row's own name for a column: it may have blanks around it, which a mapping never has."""
    if column in row:
        return column
    for name in row:
        if name.strip() == column:
            return name
    raise BadRow(f"has no column {column!r}, which {field} is mapped to; columns: {names_of(row)}")


def _in_turns(value: object, key: str, name: str) -> object:
    if not isinstance(value, list):
        return value
    return [{**turn, key: turn[name]} if isinstance(turn, Mapping) and name in turn else turn for turn in value]
