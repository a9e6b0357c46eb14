"""JSON text -> its values; those of an array one at a time, in bounded memory. Knows nothing of rows or files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

from qlora_ui.data import streams
from qlora_ui.data.streams import Unreadable

_PIECE = 2**16
_BLANKS = re.compile(r"[ \t\r\n]*")
_PLACE = "line {line}, column {column}"


class NotJson(ValueError):
    """What is wrong, and where: `Expecting value at column 6`."""


def short(value: object) -> str:
    """The beginning of a value as JSON."""
    return json.dumps(value)[:40]


def parse(text: str, place: str = _PLACE) -> object:
    """The one value that the text holds. Raises NotJson."""
    window = _Window(text, place)
    value = window.value()
    if window.mark():
        raise window.wrong("Extra data")
    return value


def items(file: TextIO) -> Iterator[object]:
    """The items of the array that the stream holds. Raises NotJson or Unreadable, after the items before the fault."""
    window = _Window("", _PLACE, file)
    if window.mark() != "[":
        raise window.wrong("Expecting an array")
    window.at += 1
    closed = window.mark() == "]"
    while not closed:
        yield window.value()
        closed = window.mark() == "]"
        if not closed:
            if window.mark() != ",":
                raise window.wrong("Expecting ',' delimiter")
            window.at += 1
    window.at += 1
    if window.mark():
        raise window.wrong("Extra data")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Python would keep the last of two values without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise NotJson(f"{short(twice)} stands twice in the object {short(found)}")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


class _Window:
    """The text from `at` on, as much of it as was read so far. What lies behind is forgotten, but for its lines."""

    def __init__(self, text: str, place: str, file: TextIO | None = None) -> None:
        self.text, self.place, self.file = text, place, file
        self.at, self.line, self.column = 0, 1, 1  # the latter two are of the first character held

    def mark(self) -> str:
        """The next character that is not blank, empty at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def more(self) -> bool:
        """Read on, as much as is held already, so that a long value is not begun again and again."""
        read = self.file.read(max(_PIECE, len(self.text) - self.at)) if self.file else ""
        if not read:
            return False
        self.line, self.column = self.where(self.at)
        self.text, self.at = self.text[self.at :] + read, 0
        if bad := streams.bad_byte(read):
            raise streams.not_utf8(bad[0], self.where(len(self.text) - len(read) + bad[1])[0])
        return True

    def value(self) -> object:
        """The value that begins here."""
        self.mark()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # In the middle of what is held it is a fault, near its end the value may only be cut there.
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if not is_cut or not self.grow():
                    raise self.wrong(error.msg.removesuffix(" at"), error.pos) from error
            except RecursionError as error:
                raise NotJson("it is nested too deeply") from error
            except NotJson:
                raise
            except ValueError as error:  # Python's own limit
                raise NotJson("a number has more than 4,300 digits") from error
            else:
                if end < len(self.text) or not self.grow():  # a number at the end may have more digits
                    self.at = end
                    return value

    def grow(self) -> bool:
        if self.file and len(self.text) - self.at > streams.MAX_LINE_BYTES:
            line, column = self.where(self.at)
            longest = streams.size(streams.MAX_LINE_BYTES)
            raise Unreadable(f"holds an item longer than {longest}, from line {line}, column {column}: remove or divide it.")
        return self.more()

    def where(self, position: int) -> tuple[int, int]:
        """Line and column of a character that is held, from 1."""
        before = self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position) if before else self.column + position
        return self.line + before, column

    def wrong(self, what: str, position: int | None = None) -> NotJson:
        line, column = self.where(self.at if position is None else position)
        return NotJson(f"{what} at {self.place.format(line=line, column=column)}")
