"""Rows -> conversations that can be trained on, and the account of what was kept and dropped. Knows nothing of models or tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_ui.config import DataConfig
from qlora_ui.data import columns, formats, hub, scripts, sources
from qlora_ui.data.formats import BadRow, EmptyAnswer, Message
from qlora_ui.errors import UserError

ROWS_FILE, HELD_OUT_FILE, REPORT_FILE = "rows.jsonl", "held_out.jsonl", "report.json"
MAX_DROPPED = 1_000_000  # each is told with its reason, and a file of a few megabytes can hold thousands of millions


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
    """What became of the source's rows: `kept + len(dropped) == read`, always.

    `format` is that of most rows, `formats` counts them all. A row may hold several `conversations`. `scripts` are the
    writing systems of the rows, `unused_columns` what no format looked at. `held_out_split` has rows of its own.
    """

    source: str
    format: str
    formats: Mapping[str, int]
    read: int
    kept: int
    conversations: int
    dropped: tuple[Dropped, ...]
    duplicates: int
    empty_answers: int
    scripts: Mapping[str, int]
    unused_columns: tuple[str, ...]
    fingerprint: str
    held_out_split: str = ""
    held_out_rows: int = 0
    held_out_dropped: tuple[Dropped, ...] = ()

    def summary(self) -> str:
        """In one line: `998 rows: 996 kept, 2 dropped, 3 duplicates`."""
        return f"{_counted(self.read, 'row')}: {self.kept:,} kept, {len(self.dropped):,} dropped, {_counted(self.duplicates, 'duplicate')}"

    def to_dict(self) -> dict[str, Any]:
        """The form that is written to `report.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`."""
        rows = {name: tuple(Dropped(**dropped) for dropped in written[name]) for name in ("dropped", "held_out_dropped")}
        return Report(**{**written, **rows, "unused_columns": tuple(written["unused_columns"])})


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The conversations of a source, in its order, and the report on the rest. `held_out` are those of a split of its own."""

    conversations: tuple[Conversation, ...]
    report: Report
    held_out: tuple[Conversation, ...] = ()


class NothingKept(UserError):
    """There are rows, and none that can be trained on; the report says why, row by row."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message, field="data")
        self.report = report


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def nobody(rows: int) -> None:
    """The `on_progress` of a caller that does not watch."""


def prepare(
    data: DataConfig,
    within: Path | None = None,
    should_stop: Callable[[], bool] = sources.never,
    on_progress: Callable[[int], None] = nobody,
    limit: int | None = None,
) -> DataSet:
    """Read everything, or the first `limit` rows, and keep what can be trained on.

    Raises UserError when that is nothing, Cancelled when told to stop.
    """
    prepared = _prepare_split(data, data.data, within, should_stop, on_progress, limit)
    if not data.held_out_split:
        return prepared
    if not sources.is_hub(data.data, within):
        raise UserError(
            f"{sources.shown(data.data)} has no split {data.held_out_split!r}: only Hugging Face sets have. Leave held_out_split empty.",
            field="held_out_split",
        )
    split_of_its_own = str(replace(hub.HubSet.parse(data.data), split=data.held_out_split))
    held_out = _prepare_split(data, split_of_its_own, within, should_stop, on_progress, limit)
    return _without_copies_of(held_out, prepared, data.held_out_split)


def _prepare_split(
    data: DataConfig,
    reference: str,
    within: Path | None,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
    limit: int | None,
) -> DataSet:
    formats.check(data.data_format)
    names = columns.parse(data.columns)
    tally = _Tally()
    for raw in islice(sources.read(reference, within, should_stop, on_progress), limit):
        tally.add(raw, data.data_format, names)
        if len(tally.dropped) > MAX_DROPPED:
            raise UserError(_unusable(reference, f"More than {MAX_DROPPED:,} rows cannot be used.", tally.dropped[0]), field="data")
    if not tally.read:
        raise UserError(f"{sources.shown(reference)} has no rows: choose another file.", field="data")
    if not tally.conversations:
        others = f"None of the {tally.read:,} rows can be used." if tally.read > 1 else ""
        raise NothingKept(_unusable(reference, others, tally.dropped[0]), tally.report(reference))
    return DataSet(conversations=tuple(tally.conversations), report=tally.report(reference))


@dataclass(kw_only=True)
class _Tally:
    """What was seen of the rows so far."""

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    empty_answers: int = 0
    conversations: list[Conversation] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    unused: dict[str, None] = field(default_factory=dict)
    seen: set[tuple[Message, ...]] = field(default_factory=set)

    def add(self, raw: sources.RawRow, format: str, names: Mapping[str, str]) -> None:
        self.read += 1
        try:
            found, unused, said = _convert(raw, format, names)
        except BadRow as error:
            self.empty_answers += isinstance(error, EmptyAnswer)
            told = raw.values is None or not raw.place  # what a file could not read says its place already
            self.dropped.append(Dropped(row=raw.number, reason=str(error) if told else f"{raw.place}: {error}"))
            return
        self.kept += 1
        self.formats[found] += 1
        self.unused.update(dict.fromkeys(unused))
        self.scripts[scripts.of(said[0][-1].content)] += 1
        for messages in said:
            self.duplicates += messages in self.seen
            self.seen.add(messages)
            self.conversations.append(Conversation(row=raw.number, messages=messages))

    def report(self, reference: str) -> Report:
        # Ties are broken by name, so that the order of rows does not decide.
        by_rows = sorted(self.formats.items(), key=lambda item: (-item[1], item[0]))
        return Report(
            source=reference,
            format=by_rows[0][0] if by_rows else "",
            formats=dict(by_rows),
            read=self.read,
            kept=self.kept,
            conversations=len(self.conversations),
            dropped=tuple(self.dropped),
            duplicates=self.duplicates,
            empty_answers=self.empty_answers,
            scripts=dict(self.scripts.most_common()),
            unused_columns=tuple(sorted(self.unused))[:100],
            fingerprint=_fingerprint(self.conversations),
        )


def _without_copies_of(held_out: DataSet, prepared: DataSet, split: str) -> DataSet:
    """Rows to train on that are also in the held-out split are left out: else the held-out loss measures memory."""
    measured = {conversation.messages for conversation in held_out.conversations}
    copied = {conversation.row for conversation in prepared.conversations if conversation.messages in measured}
    kept = tuple(conversation for conversation in prepared.conversations if conversation.row not in copied)
    if not kept:
        raise UserError(f"Every row is also in the split {split!r}: choose another held_out_split, or none.", field="held_out_split")
    dropped = [Dropped(row=row, reason=f"is also in the split {split!r}, which is held out") for row in copied]
    report = replace(
        prepared.report,
        kept=prepared.report.kept - len(copied),
        conversations=len(kept),
        dropped=tuple(sorted([*prepared.report.dropped, *dropped], key=lambda row: row.row)),
        fingerprint=_fingerprint([*kept, *held_out.conversations]),
        held_out_split=split,
        held_out_rows=held_out.report.kept,
        held_out_dropped=held_out.report.dropped,
    )
    return DataSet(conversations=kept, report=report, held_out=held_out.conversations)


_UNKNOWN = "no known format"


def _convert(raw: sources.RawRow, format: str, names: Mapping[str, str]) -> tuple[str, list[str], tuple[tuple[Message, ...], ...]]:
    """The row's format, the columns that it leaves unread, and its conversations."""
    if raw.values is None:
        raise BadRow(raw.problem)
    row = columns.rename(raw.values, names)
    found = formats.detect(row, names) if format == formats.AUTO else format
    if found is None:
        raise BadRow(f"{_UNKNOWN}; columns: {formats.names_of(row)}")
    unused = [column for column in formats.unused(row, found) if column.strip() not in names.values()]
    return found, unused, formats.to_conversations(row, found)


def dropped_rows(data: DataConfig, dropped: Iterable[Dropped], within: Path | None = None) -> Iterator[dict[str, Any]]:
    """These rows as they stand in the source, each with its number and reason. Reads the source again."""
    reasons = {row.row: row.reason for row in dropped}
    for raw in sources.read(data.data, within):
        if raw.number in reasons:
            yield {"row": raw.number, "reason": reasons[raw.number], "values": raw.values}


def _unusable(reference: str, others: str, first: Dropped) -> str:
    remedy = "Mend the rows, or choose another data set."
    if first.reason.startswith((_UNKNOWN, "has no column")):
        remedy = "Choose the format and map its columns, or bring conversations as messages."
    return " ".join(filter(None, [f"Row {first.row} of {sources.shown(reference)}: {first.reason}.", others, remedy]))


def _fingerprint(conversations: Iterable[Conversation]) -> str:
    """Over what is said, not over row numbers: the same conversations from another file have the same one."""
    digest = hashlib.sha256()
    for conversation in conversations:
        turns = [[message.role, message.content] for message in conversation.messages]
        digest.update(json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def split(data: DataSet, config: DataConfig, seed: int) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """Training rows and held-out rows, both in source order: the source's own split, a number of rows, or a share. Raises UserError."""
    if data.held_out:
        return data.conversations, data.held_out
    held_out = held_out_indices(data, config, seed)
    return (
        tuple(conversation for index, conversation in enumerate(data.conversations) if index not in held_out),
        tuple(conversation for index, conversation in enumerate(data.conversations) if index in held_out),
    )


def held_out_indices(data: DataSet, config: DataConfig, seed: int) -> set[int]:
    """Which of the conversations are held out, none when the source has a split of its own.

    Copies of one conversation stay on one side: else the held-out loss measures memory. Raises UserError.
    """
    conversations, held_out = data.conversations, set[int]()
    if data.held_out:
        return held_out
    if config.held_out_rows >= len(conversations):
        raise UserError(
            f"held_out_rows is {config.held_out_rows:,}, but there are {len(conversations):,} rows: hold out fewer.", field="held_out_rows"
        )
    wanted = config.held_out_rows or max(round(config.held_out_share * len(conversations)), int(config.held_out_share > 0))
    copies: dict[tuple[Message, ...], list[int]] = {}
    for index, conversation in enumerate(conversations):
        copies.setdefault(conversation.messages, []).append(index)
    if wanted and len(copies) > 1:
        groups = list(copies.values())
        random.Random(seed).shuffle(groups)
        for group in groups:
            if len(held_out) + len(group) <= min(wanted, len(conversations) - 1):
                held_out.update(group)
        if not held_out:  # every conversation has more copies than wanted
            fewest = min(groups, key=len)
            held_out.update(fewest)
    return held_out


def write(dataset: DataSet, folder: Path) -> None:
    """Write the rows, then the report; each file is complete or absent, and the report is there only when the rows are."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / ROWS_FILE, _lines(dataset.conversations))
    if dataset.held_out:
        _replace(folder / HELD_OUT_FILE, _lines(dataset.held_out))
    _replace(folder / REPORT_FILE, [json.dumps(dataset.report.to_dict(), indent=1) + "\n"])


def _lines(conversations: Iterable[Conversation]) -> Iterator[str]:
    return (json.dumps(dataclasses.asdict(conversation), ensure_ascii=False) + "\n" for conversation in conversations)


def _replace(path: Path, lines: Iterable[str]) -> None:
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    os.replace(aside, path)


def load(folder: Path) -> DataSet:
    """Inverse of `write`. Raises UserError when the files are missing, torn, or not those that were written together."""
    try:
        report = Report.from_dict(json.loads((folder / REPORT_FILE).read_text("utf-8")))
        conversations = _read(folder / ROWS_FILE)
        held_out = _read(folder / HELD_OUT_FILE) if report.held_out_rows else ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The prepared rows in {folder} cannot be read ({error}): prepare the data set again.", field="data") from error
    if _fingerprint([*conversations, *held_out]) != report.fingerprint:
        raise UserError(f"The prepared rows in {folder} were changed after they were written: prepare the data set again.", field="data")
    return DataSet(conversations=conversations, report=report, held_out=held_out)


def _read(path: Path) -> tuple[Conversation, ...]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return tuple(_conversation(json.loads(line)) for line in file)


def _conversation(written: Mapping[str, Any]) -> Conversation:
    return Conversation(row=written["row"], messages=tuple(Message(**message) for message in written["messages"]))
