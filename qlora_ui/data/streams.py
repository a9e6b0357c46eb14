"""A file's text, unpacked and decoded in bounded memory. Knows nothing of rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

MAX_LINE_BYTES = 16 * 2**20
MAX_UNPACK_RATIO = 200
FREE_UNPACKED_BYTES = 64 * 2**20  # whatever the ratio: few bytes of real text can pack very well

_PIECE = 2**16
_NOT_TEXT = {
    b"\x1f\x8b": "holds gzip-packed data: unpack it and bring the file in it",
    b"PK\x03\x04": "is a ZIP archive (spreadsheets are, too): bring the file in it, or export the sheet as CSV",
    b"PAR1": "is a Parquet file: give it the ending .parquet",
}


class Unreadable(Exception):
    """Why a whole file cannot be read: what follows the file's name in the sentence."""


def check_ratio(unpacked: int, packed: int) -> None:
    """Raise Unreadable when so many bytes out of so few are no longer believable."""
    if unpacked > max(FREE_UNPACKED_BYTES, MAX_UNPACK_RATIO * packed):
        raise Unreadable(f"unpacks to more than {MAX_UNPACK_RATIO} times its {packed:,} bytes: if that is right, bring it as plain text.")


class _Unpacked(gzip.GzipFile):
    """A packed file that is not allowed to grow without end."""

    def read1(self, size: int = -1) -> bytes:
        piece = super().read1(_PIECE if size < 0 else min(size, _PIECE))
        check_ratio(self.tell(), os.fstat(self.fileno()).st_size)
        return piece


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The bytes of a file, unpacked when its name ends in .gz."""
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            yield file
        return
    try:
        with _Unpacked(path) as packed:
            yield packed
    except EOFError as error:
        raise Unreadable("is cut off in the middle of its packed data: copy or download it again.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Unreadable("is not a gzip file, or a damaged one: pack it again, or bring it unpacked.") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The text of a file in UTF-8, or in UTF-16 that says so; bytes that are not UTF-8 come as `bad_byte` finds them."""
    with open_bytes(path) as file:
        head = file.read(4)
        file.seek(0)
        reason = next((reason for magic, reason in _NOT_TEXT.items() if head.startswith(magic)), None)
        if reason:
            raise Unreadable(f"{reason}.")
        encoding = json.detect_encoding(head)  # tells by where the NUL bytes are, so it is right for tables as well
        if encoding not in ("utf-8", "utf-8-sig", "utf-16"):
            raise Unreadable(f"is not UTF-8 text (byte 0x{head[0]:02x} in line 1 begins {encoding.upper()}): save it as UTF-8.")
        errors = "strict" if encoding == "utf-16" else "surrogateescape"
        try:
            with io.TextIOWrapper(file, encoding, errors, newline="") as text:
                yield text
        except UnicodeDecodeError as error:
            place = f"byte 0x{error.object[error.start]:02x}: {error.reason}"
            raise Unreadable(f"begins as UTF-16 but does not go on so ({place}): save it as UTF-8.") from error


def lines(text: TextIO) -> Iterator[tuple[int, str | None]]:
    """Each line with its number from 1; None for a line longer than MAX_LINE_BYTES, which is passed over, never held."""
    number = 0
    while line := text.readline(MAX_LINE_BYTES + 1):  # of characters: whatever has more of them has more bytes, too
        number += 1
        if len(line) <= MAX_LINE_BYTES:
            yield number, line
            continue
        yield number, None
        while line and line[-1] not in "\r\n":
            line = text.readline(_PIECE)


_ESCAPED = re.compile("[\udc80-\udcff]")


def bad_byte(text: str) -> tuple[str, int] | None:
    """The first byte that was not UTF-8 and the index where it stands, as in `("0xe9", 7)`."""
    found = None if text.isascii() else _ESCAPED.search(text)
    return (f"0x{ord(found[0]) - 0xDC00:02x}", found.start()) if found else None


def not_utf8(byte: str, line: int) -> Unreadable:
    """What to raise for a bad byte of a file that cannot be read without it."""
    return Unreadable(f"is not UTF-8 text (byte {byte} in line {line}): save it as UTF-8.")


def size(number: int) -> str:
    """A limit in words: `16 MiB`."""
    return f"{number // 2**20:,} MiB" if number >= 2**20 else f"{number:,} bytes"
