"""All rows of a data set as tokens, uncut, in a few arrays; kept in a cache; fitted to a max length. Knows nothing of models or Gradio.

Fifty thousand rows as lists of Python's integers cost gigabytes, as arrays some tens of megabytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_ui.data import lengths
from qlora_ui.data.checks import Conversation
from qlora_ui.engine.tokens import IGNORED, TokenRow, is_encoder_decoder, token_rows, written
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled, abandonable

FORMAT = 1  # of the cached files; a new one whenever the same rows would become other tokens
BATCH_ROWS, BATCH_CHARACTERS = 256, 1 << 20
CACHE_FILES, CACHE_BYTES = 16, 2 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenized:
    """Rows one after the other, uncut: row `i` has the source number `rows[i]` and the tokens `starts[i]` up to `starts[i + 1]`."""

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def counts(self) -> lengths.Counts:
        """What lengths are computed from."""
        return lengths.Counts.of(self.rows, self.starts, self.trained)

    def select(self, indices: Sequence[int]) -> Tokenized:
        """Some of the rows, by index, in the order given."""
        chosen = np.asarray(indices, np.int64)
        sizes = self.counts.lengths[chosen]
        starts = _starts(sizes)
        tokens = np.arange(starts[-1]) + np.repeat(self.starts[chosen] - starts[:-1], sizes)
        return Tokenized(rows=self.rows[chosen], starts=starts, ids=self.ids[tokens], trained=self.trained[tokens])


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedRows:
    """What training reads, sequence by sequence: a map-style data set. Which rows it lacks or changes is told by source number."""

    tokenized: Tokenized
    fitted: lengths.Fitted
    long_rows: str

    def __len__(self) -> int:
        return len(self.fitted.row)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        stretch = slice(int(self.fitted.begin[index]), int(self.fitted.end[index]))
        ids, trained = self.tokenized.ids[stretch], self.tokenized.trained[stretch]
        return {"input_ids": ids.tolist(), "labels": np.where(trained, ids, IGNORED).tolist()}

    def select(self, indices: npt.NDArray[np.int64]) -> FittedRows:
        """Some of the sequences, by index, in the order given."""
        f = self.fitted
        chosen = replace(f, row=f.row[indices], begin=f.begin[indices], end=f.end[indices], trained=f.trained[indices])
        return replace(self, fitted=chosen)

    def row(self, index: int) -> int:
        """The source number of the row that a sequence is, or is a piece of."""
        return int(self.tokenized.rows[self.fitted.row[index]])

    @property
    def tokens(self) -> int:
        """Tokens in one pass."""
        return int(self.fitted.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        """Tokens in one pass that the loss is a mean of."""
        return int(self.fitted.trained.sum())

    @property
    def long(self) -> list[int]:
        """Rows longer than the max length, which were cut, dropped or split as `long_rows` says."""
        return self._numbers(self.fitted.over)

    @property
    def untrainable(self) -> list[int]:
        """Rows left out because no trained token is left in them."""
        return self._numbers(self.fitted.untrainable)

    def account(self, max_seq_len: int) -> list[str]:
        """Sentences on what was done to rows, for a log; none when all are read whole."""
        done = {"truncate": "cut", "drop": f"dropped: {_listed(self.long)}", "split": "split into pieces"}[self.long_rows]
        lines = [f"{len(self.long)} rows are longer than max_seq_len {max_seq_len} and were {done}"] if self.long else []
        if self.fitted.empty_pieces:
            lines.append(f"{self.fitted.empty_pieces} pieces of split rows were left out, nothing to train on in them")
        if self.untrainable:
            where = "after the cut" if self.long_rows == "truncate" else "at all"
            lines.append(f"{len(self.untrainable)} rows were left out, nothing to train on in them {where}: {_listed(self.untrainable)}")
        return lines

    def _numbers(self, which: npt.NDArray[np.bool_]) -> list[int]:
        numbers: list[int] = self.tokenized.rows[which].tolist()
        return numbers


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


def fit(tokenized: Tokenized, max_seq_len: int, long_rows: str) -> FittedRows:
    """The rows as training reads them. `long_rows` is truncate, drop or split."""
    return FittedRows(tokenized=tokenized, fitted=lengths.fit(tokenized.counts, max_seq_len, long_rows), long_rows=long_rows)


def tokenize(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    train_on: str,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> Tokenized:
    """Every row in the tokenizer's prompt format, as tokens. Raises UserError naming the row, or Cancelled."""
    sizes, ids, trained, done = list[int](), [np.zeros(0, np.int32)], [np.zeros(0, bool)], 0
    for batch in _batches(conversations):
        if should_stop():
            raise Cancelled
        # Both a template and one very long text can take longer than a person who pressed Stop should wait.
        for row in abandonable(partial(_token_rows, tokenizer, batch, train_on), should_stop):
            sizes.append(len(row.ids))
            ids.append(row.ids)
            trained.append(row.trained)
        done += len(batch)
        on_progress(done)
    return Tokenized(rows=_numbers(conversations), starts=_starts(sizes), ids=np.concatenate(ids), trained=np.concatenate(trained))


def _batches(conversations: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    first = characters = 0
    for index, conversation in enumerate(conversations):
        if index - first >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield conversations[first:index]
            first, characters = index, 0
        characters += sum(len(message.content) for message in conversation.messages)
    if first < len(conversations):
        yield conversations[first:]


def _token_rows(tokenizer: Any, batch: Sequence[Conversation], train_on: str) -> list[TokenRow]:
    texts = []
    for conversation in batch:
        try:
            texts.append(written(tokenizer, conversation.messages, train_on))
        except UserError as error:
            raise UserError(f"Row {conversation.row}: {error}", field=error.field) from error
    return token_rows(tokenizer, texts)


def _numbers(conversations: Sequence[Conversation]) -> npt.NDArray[np.int64]:
    return np.array([conversation.row for conversation in conversations], np.int64)


def _starts(sizes: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


# The cache ----------------------------------------------------------------------------------------------------------------


class DamagedFile(Exception):
    """A cached file that cannot be read, and why."""


def save(tokenized: Tokenized, path: Path) -> None:
    """Write the rows; the file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with aside.open("wb") as file:
            np.savez(file, rows=tokenized.rows, starts=tokenized.starts, ids=tokenized.ids, trained=tokenized.trained)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: Path) -> Tokenized:
    """Inverse of `save`. Raises FileNotFoundError, or DamagedFile."""
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip: every array is checked against its checksum
            tokenized = Tokenized(rows=file["rows"], starts=file["starts"], ids=file["ids"], trained=file["trained"])
        if len(tokenized.starts) != len(tokenized) + 1 or {len(tokenized.ids), len(tokenized.trained)} != {int(tokenized.starts[-1])}:
            raise ValueError("its parts do not fit together")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFile(str(error)) from error
    return tokenized


def cached_tokenized(
    folder: Path,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    fingerprint: str,
    train_on: str,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
    on_trouble: Callable[[str], None],
) -> Tokenized:
    """`tokenize`, or what it gave before. `fingerprint` is that of these conversations (`checks.Report.fingerprint`).

    `on_trouble` is told in a sentence when the cache could not be used; the tokens are right all the same.
    """
    if should_stop():
        raise Cancelled
    path = folder / f"{_key(tokenizer, conversations, fingerprint, train_on)}.npz"
    try:
        found = load(path)
        os.utime(path)  # the newest are kept, and this one is in use
        on_progress(len(conversations))
        # The fingerprint is of what is said: the same rows may have come from another file, under other numbers.
        return replace(found, rows=_numbers(conversations))
    except FileNotFoundError:
        pass
    except DamagedFile as error:
        on_trouble(f"The cached tokens in {path.name} are damaged ({error}), so all rows are tokenized again")
    tokenized = tokenize(tokenizer, conversations, train_on, should_stop, on_progress)
    try:
        save(tokenized, path)
        _prune(folder, keep=path)
    except OSError as error:
        on_trouble(f"The tokens cannot be kept for the next time in {folder}: {error}")
    return tokenized


def _key(tokenizer: Any, conversations: Sequence[Conversation], fingerprint: str, train_on: str) -> str:
    tokenizer("")  # without padding and cut: takes back what an earlier call set, which the serialisation would include
    # Sizes besides the fingerprint: one that was given for other rows must not fetch the tokens of those, unseen.
    sizes = [[len(message.content) for message in conversation.messages] for conversation in conversations]
    trained = "target" if is_encoder_decoder(tokenizer) else train_on
    parts = [FORMAT, fingerprint, sizes, trained, tokenizer.chat_template, tokenizer.special_tokens_map]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _prune(folder: Path, keep: Path) -> None:
    """Delete the oldest files beyond what a cache may hold, and what a killed process left half-written."""
    for part in folder.glob("*.part"):
        if time.time() - part.stat().st_mtime > 3600:
            part.unlink(missing_ok=True)
    newest_first = sorted(folder.glob("*.npz"), key=lambda path: (path != keep, -path.stat().st_mtime))
    total = 0
    for count, path in enumerate(newest_first, 1):
        total += path.stat().st_size
        if path != keep and (count > CACHE_FILES or total > CACHE_BYTES):
            path.unlink(missing_ok=True)
