"""Rows -> conversations that can be trained on, and the account of what was kept and dropped. Knows nothing of models or tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_ui.data import formats, sources
from qlora_ui.data.formats import BadRow, Message
from qlora_ui.errors import UserError

ROWS_FILE, REPORT_FILE = "rows.jsonl", "report.json"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A kept row; `row` is its number in the source, from 1."""

    row: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that is not trained on, and why."""

    row: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the source's rows: `kept + len(dropped) == read`, always."""

    source: str
    format: str
    read: int
    kept: int
    dropped: tuple[Dropped, ...]
    duplicates: int
    fingerprint: str

    def summary(self) -> str:
        """In one line: `998 rows: 996 kept, 2 dropped, 3 duplicates`."""
        return f"{_counted(self.read, 'row')}: {self.kept:,} kept, {len(self.dropped):,} dropped, {_counted(self.duplicates, 'duplicate')}"

    def to_dict(self) -> dict[str, Any]:
        """The form that is written to `report.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`."""
        return Report(**{**written, "dropped": tuple(Dropped(**dropped) for dropped in written["dropped"])})


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The conversations of a source, in its order, with the report on the rest."""

    conversations: tuple[Conversation, ...]
    report: Report


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def prepare(
    reference: str,
    within: Path | None = None,
    should_stop: Callable[[], bool] = sources.never,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> DataSet:
    """Read everything and keep what can be trained on. Raises UserError when that is nothing, Cancelled when told to stop."""
    read = duplicates = 0
    conversations: list[Conversation] = []
    dropped: list[Dropped] = []
    found: Counter[str] = Counter()
    seen: set[tuple[Message, ...]] = set()
    for raw in sources.read(reference, within, should_stop, on_progress):
        read += 1
        try:
            format, messages = _convert(raw)
        except BadRow as error:
            dropped.append(Dropped(row=raw.number, reason=str(error)))
            continue
        duplicates += messages in seen
        seen.add(messages)
        found[format] += 1
        conversations.append(Conversation(row=raw.number, messages=messages))
    if not read:
        raise UserError(f"{sources.shown(reference)} has no rows: choose another file.", field="data")
    if not conversations:
        raise UserError(_nothing_kept(reference, read, dropped[0]), field="data")
    report = Report(
        source=reference,
        format=found.most_common(1)[0][0],
        read=read,
        kept=len(conversations),
        dropped=tuple(dropped),
        duplicates=duplicates,
        fingerprint=_fingerprint(conversations),
    )
    return DataSet(conversations=tuple(conversations), report=report)


_UNKNOWN = "no known format"


def _convert(raw: sources.RawRow) -> tuple[str, tuple[Message, ...]]:
    if raw.values is None:
        raise BadRow(raw.problem)
    format = formats.detect(raw.values)
    if format is None:
        raise BadRow(f"{_UNKNOWN}; columns: {_columns(raw.values)}")
    return format, formats.to_messages(raw.values, format)


def _columns(row: Mapping[str, object]) -> str:
    names = [str(name).encode("utf-8", "backslashreplace").decode() for name in row]
    return ", ".join([name[:40] for name in names[:12]] + ["…"] * (len(names) > 12)) or "none"


def _nothing_kept(reference: str, read: int, first: Dropped) -> str:
    remedy = "Mend the rows, or choose another data set."
    if first.reason.startswith(_UNKNOWN):
        remedy = "Rename the columns to instruction and output (or prompt and completion), or bring conversations as messages."
    others = f" None of the {read:,} rows can be used." if read > 1 else ""
    return f"Row {first.row} of {sources.shown(reference)}: {first.reason}.{others} {remedy}"


def _fingerprint(conversations: Iterable[Conversation]) -> str:
    """Over what is said, not over row numbers: the same conversations from another file have the same one."""
    digest = hashlib.sha256()
    for conversation in conversations:
        turns = [[message.role, message.content] for message in conversation.messages]
        digest.update(json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def split(
    conversations: Sequence[Conversation], held_out_share: float, seed: int
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """Training rows and held-out rows, both in source order. Copies of one conversation stay on one side: else it measures memory."""
    copies: dict[tuple[Message, ...], list[int]] = {}
    for index, conversation in enumerate(conversations):
        copies.setdefault(conversation.messages, []).append(index)
    held_out: set[int] = set()
    if held_out_share > 0 and len(copies) > 1:
        wanted = min(max(1, round(held_out_share * len(conversations))), len(conversations) - 1)
        groups = list(copies.values())
        random.Random(seed).shuffle(groups)
        for group in groups:
            if len(held_out) + len(group) <= wanted:
                held_out.update(group)
        if not held_out:  # every conversation has more copies than wanted
            fewest = min(groups, key=len)
            held_out.update(fewest)
    return (
        tuple(conversation for index, conversation in enumerate(conversations) if index not in held_out),
        tuple(conversation for index, conversation in enumerate(conversations) if index in held_out),
    )


def write(dataset: DataSet, folder: Path) -> None:
    """Write the rows, then the report; each file is complete or absent, and the report is there only when the rows are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dataclasses.asdict(conversation), ensure_ascii=False) + "\n" for conversation in dataset.conversations)
    _replace(folder / ROWS_FILE, lines)
    _replace(folder / REPORT_FILE, [json.dumps(dataset.report.to_dict(), indent=1) + "\n"])


def _replace(path: Path, lines: Iterable[str]) -> None:
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    os.replace(aside, path)


def load(folder: Path) -> DataSet:
    """Inverse of `write`. Raises UserError when the files are missing, torn, or not those that were written together."""
    try:
        report = Report.from_dict(json.loads((folder / REPORT_FILE).read_text("utf-8")))
        with (folder / ROWS_FILE).open(encoding="utf-8", newline="\n") as file:
            conversations = tuple(_conversation(json.loads(line)) for line in file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The prepared rows in {folder} cannot be read ({error}): prepare the data set again.", field="data") from error
    if _fingerprint(conversations) != report.fingerprint:
        raise UserError(f"The prepared rows in {folder} were changed after they were written: prepare the data set again.", field="data")
    return DataSet(conversations=conversations, report=report)


def _conversation(written: Mapping[str, Any]) -> Conversation:
    return Conversation(row=written["row"], messages=tuple(Message(**message) for message in written["messages"]))
