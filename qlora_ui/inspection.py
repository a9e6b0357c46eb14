"""A data set as it is looked at before a training: read, checked, measured in tokens, kept for the next look.

Knows nothing of Gradio; imports the engine only when tokens are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qlora_ui.config import DataConfig, RunConfig
from qlora_ui.data import checks, sources
from qlora_ui.data.lengths import LengthReport
from qlora_ui.errors import UserError
from qlora_ui.events import Event, PhaseProgress
from qlora_ui.runs import Workspace
from qlora_ui.stopping import watched

if TYPE_CHECKING:
    from qlora_ui.engine.preview import Preview

SAMPLE_ROWS = 1000
OF_THE_SAMPLE = f"Lengths of the first {SAMPLE_ROWS:,} rows; "
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is known of a data set so far. `doing` says what is still going on, `share_done` how far it is, 0 to 1, where that is known.

    Why there are no tokens: `no_tokens` when there is no tokenizer to count them with, `fault` when these rows cannot be written
    in this prompt format. `trouble` is what went wrong on the way without changing what is told.
    """

    data: checks.DataSet | None
    preview: Preview | None = None
    lengths: LengthReport | None = None
    doing: str = ""
    share_done: float | None = None
    no_tokens: str = ""
    fault: str = ""
    trouble: str = ""

    @property
    def problem(self) -> str:
        """Why this cannot be trained on, or nothing."""
        if self.lengths is None or self.lengths.tokens_trained:
            return self.fault
        if not self.lengths.trained_lost:
            return (
                "0 % of the tokens would be trained, at any max length: the prompt format marks nothing of these rows as the assistant's. "
                "Choose another prompt format, mend the template's {% generation %} marks, or set train_on to everything."
            )
        return (
            f"0 % of the tokens would be trained: no row has an answer within max_seq_len {self.lengths.max_seq_len}. "
            "Raise the max length, or change what is trained on or what happens to long rows."
        )

    @property
    def left_out(self) -> tuple[checks.Dropped, ...]:
        """The kept rows that are not trained on all the same, and why."""
        if self.lengths is None:
            return ()
        limit = f"max_seq_len {self.lengths.max_seq_len}"
        too_long = [checks.Dropped(row=row, reason=f"is longer than {limit}") for row in self.lengths.too_long]
        untrainable = [checks.Dropped(row=row, reason=f"has no token to train on within {limit}") for row in self.lengths.untrainable]
        return tuple(sorted([*too_long, *untrainable], key=lambda left_out: left_out.row))


class _Kept(Generic[Value]):
    """The last few results, whoever asked for them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[Hashable, Value] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            value = self._values.pop(key, None)
            if value is not None:
                self._values[key] = value
            return value

    def put(self, key: Hashable, value: Value) -> Value:
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._most:
                self._values.pop(next(iter(self._values)))
        return value


class Inspector:
    """Looks at data sets for any number of pages. What was read or measured last is not read or measured again."""

    def __init__(self, workspace: Workspace, within: Path | None, kept: int = 4) -> None:
        """Files must lie `within` that folder, where one is given."""
        self._workspace, self._within = workspace, within
        self._sets: _Kept[checks.DataSet] = _Kept(kept)
        self._samples: _Kept[checks.DataSet] = _Kept(kept)
        self._previews: _Kept[Preview] = _Kept(kept)
        self._raw: _Kept[list[dict[str, Any]]] = _Kept(kept)

    def read(self, data: DataConfig) -> checks.DataSet:
        """The data set as it is now; a file that has changed is read again. Raises UserError."""
        found = self._sets.get(self._set_key(data))
        return found or self._sets.put(self._set_key(data), checks.prepare(data, self._within))

    def look(self, config: RunConfig, fetch: bool = False) -> Generator[Look, None, None]:
        """First what a sample of the rows shows, and how long those are, then all of them. Close it to cancel.

        With `fetch` the model's tokenizer is fetched when it is not on this machine. Raises UserError.
        """
        sample, data = yield from self._begin(config.data)
        preview = self._previews.get(self._preview_key(config, data)) if data else None
        if preview is None:
            try:
                tokenizer = yield from self._load_tokenizer(config, data or sample, fetch)
            except UserError as error:
                data = data or (yield from self._read_on(config.data, sample, None))
                yield Look(data=data, no_tokens=str(error))
                return
            sampled = yield from self._measure_sample(config, sample, data, tokenizer)
            data = data or (yield from self._read_on(config.data, sample, sampled))
            try:
                preview = yield from self._measure(config, data, tokenizer, sampled)
            except UserError as error:
                yield Look(data=data, fault=str(error))
                return
            self._previews.put(self._preview_key(config, data), preview)
        yield Look(data=data, preview=preview, lengths=lengths(config, preview), trouble=" ".join(preview.troubles))

    def known(self, config: RunConfig) -> Look | None:
        """What an earlier look found, without doing anything; None when there was none."""
        data = self._sets.get(self._set_key(config.data))
        if data is None:
            return None
        preview = self._previews.get(self._preview_key(config, data))
        return Look(data=data, preview=preview, lengths=lengths(config, preview) if preview else None)

    def rows(self, data: DataConfig) -> tuple[checks.Conversation, ...]:
        """What an earlier look has read so far: all rows, the sample that it began with, or none."""
        key = self._set_key(data)
        found = self._sets.get(key) or self._samples.get(key)
        return found.conversations if found else ()

    def raw_rows(self, data: DataConfig, count: int = 50) -> list[dict[str, Any]]:
        """The first rows as the source has them, for whoever has to map columns. Raises UserError."""
        key = data.data, _stamp(data.data), count
        found = self._raw.get(key)
        if found is None:
            rows = islice(sources.read(data.data, self._within), count)
            found = self._raw.put(key, [dict(row.values) for row in rows if row.values is not None])
        return found

    def _begin(self, data: DataConfig) -> Generator[Look, None, tuple[checks.DataSet | None, checks.DataSet | None]]:
        """The first rows, where there are more and some can be used; else all of them."""
        key = self._set_key(data)
        found = self._sets.get(key)
        if found is not None:
            return None, found
        first = watched(lambda should_stop, on_progress: checks.prepare(data, self._within, should_stop, on_progress, SAMPLE_ROWS))
        try:
            sample = yield from _telling(first, Look(data=None), "{:,} rows read …")
        except checks.NothingKept as error:
            if error.report.read < SAMPLE_ROWS:
                raise
            return None, (yield from self._read_on(data, None, None))  # the rows that can be used may come later
        if sample.report.read < SAMPLE_ROWS:
            return None, self._sets.put(key, sample)
        self._samples.put(key, sample)
        yield Look(data=sample, doing=f"These are the first {SAMPLE_ROWS:,} rows, reading on …")
        return sample, None

    def _read_on(
        self, data: DataConfig, sample: checks.DataSet | None, sampled: LengthReport | None
    ) -> Generator[Look, None, checks.DataSet]:
        reading = watched(lambda should_stop, on_progress: checks.prepare(data, self._within, should_stop, on_progress))
        return self._sets.put(self._set_key(data), (yield from _telling(reading, Look(data=sample, lengths=sampled), "{:,} rows read …")))

    def _load_tokenizer(self, config: RunConfig, data: checks.DataSet | None, fetch: bool) -> Generator[Look, None, Any]:
        yield Look(data=data, doing="Loading the tokenizer …")
        from qlora_ui.engine import model

        named, models = config.model, self._workspace.models
        found = model.find_here(named.model, named.revision, models, weights=False)
        if found is None and not fetch:
            raise UserError(f"{named.model} is not on this machine yet, so its tokens cannot be counted.", field="model")
        if found is None:
            fetching = watched(lambda stop, told: model.find(named.model, named.revision, models, _bytes(told), stop, weights=False))
            found = yield from _telling(fetching, Look(data=data), "{:,} bytes of the tokenizer fetched …")
        return model.load_tokenizer(found)

    def _measure_sample(
        self, config: RunConfig, sample: checks.DataSet | None, data: checks.DataSet | None, tokenizer: Any
    ) -> Generator[Look, None, LengthReport | None]:
        """How long the first of many rows are; None when there are few, or when they cannot be written, which is told of them all."""
        if data is not None and len(data.conversations) > SAMPLE_ROWS:
            report = replace(data.report, fingerprint=f"{data.report.fingerprint} {SAMPLE_ROWS}")
            sample = checks.DataSet(conversations=data.conversations[:SAMPLE_ROWS], report=report)
        if sample is None:
            return None
        try:
            preview = yield from self._measure(config, sample, tokenizer)
        except UserError:
            return None
        sampled = lengths(config, preview)
        yield Look(data=data or sample, lengths=sampled, doing=f"{OF_THE_SAMPLE}going on …")
        return sampled

    def _measure(
        self, config: RunConfig, data: checks.DataSet, tokenizer: Any, sampled: LengthReport | None = None
    ) -> Generator[Look, None, Preview]:
        from qlora_ui.engine import preview as previews
        from qlora_ui.engine import tokens

        tokens.add_new(tokenizer, config.data.new_tokens)
        tokens.set_prompt_format(tokenizer, config.data.prompt_format, config.data.chat_template)
        cache, rows, fingerprint = self._workspace.root / "cache", data.conversations, data.report.fingerprint
        work = watched(lambda stop, told: previews.open_preview(tokenizer, rows, fingerprint, config.data, cache, stop, told))
        return (yield from _telling(work, Look(data=data, lengths=sampled), "{:,} rows measured …", len(rows)))

    def _set_key(self, data: DataConfig) -> Hashable:
        return data.data, _stamp(data.data), data.data_format, data.columns, data.held_out_split

    def _preview_key(self, config: RunConfig, data: checks.DataSet) -> Hashable:
        d = config.data
        return data.report.fingerprint, config.model, d.prompt_format, d.chat_template, d.new_tokens, d.train_on


def lengths(config: RunConfig, preview: Preview) -> LengthReport:
    """What the config's lengths do to the rows that were measured."""
    return preview.report(config.data.max_seq_len, config.data.long_rows, config.optimization.micro_batch_size, config.optimization.seed)


def _stamp(reference: str) -> tuple[tuple[str, float, int], ...]:
    """Which files these are, as far as a stat tells; nothing for what is not on this disk."""
    path = Path(reference)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)
    except (OSError, ValueError):  # what is wrong with it is said when it is read
        return ()


def _telling(progress: Generator[int, None, Value], known: Look, words: str, total: int = 0) -> Generator[Look, None, Value]:
    """The result of watched work, its progress told on the way beside what is known so far."""
    try:
        while True:
            done = next(progress)
            told = (OF_THE_SAMPLE if known.lengths else "") + words.format(done)
            yield replace(known, doing=told, share_done=done / total if total else None)
    except StopIteration as end:
        value: Value = end.value
        return value
    finally:
        progress.close()


def _bytes(told: Callable[[int], None]) -> Callable[[Event], None]:
    return lambda event: told(event.done) if isinstance(event, PhaseProgress) else None
