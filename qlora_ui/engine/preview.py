"""What a data set will teach, before any training: lengths, and rows with their trained tokens. Knows nothing of models or Gradio."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qlora_ui.config import DataConfig
from qlora_ui.data import lengths
from qlora_ui.data.checks import Conversation
from qlora_ui.data.lengths import LengthReport
from qlora_ui.engine import seq2seq, token_checks
from qlora_ui.engine.tokenized import Tokenized, cached_tokenized
from qlora_ui.engine.tokens import TokenRow, set_prompt_format, token_rows, written

Order = Literal["source", "longest", "shortest", "cut"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens of one kind, as text. `cut` ones are not read; a special token is a piece of its own.

    `begins` is true where a row that is split goes on as another sequence.
    """

    text: str
    trained: bool
    special: bool
    cut: bool
    begins: bool = False


@dataclass(frozen=True, kw_only=True)
class RowView:
    """A row as training sees it: `row` is its number in the source, `index` its place among the conversations.

    `tokens` counts the whole row, `kept_tokens` and `trained` what is read and learned of it at this max length, and
    `padding` what is added to it when the rows shown are one batch.
    """

    row: int
    index: int
    tokens: int
    trained: int
    kept_tokens: int
    pieces: tuple[Piece, ...]
    padding: int


def open_preview(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    fingerprint: str,
    data_config: DataConfig,
    cache_folder: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> Preview:
    """Tokenize the conversations as a run with this config would. Raises UserError or Cancelled.

    The tokenizer is given the run's prompt format, so nobody else may be using it.
    """
    set_prompt_format(tokenizer, data_config.prompt_format, data_config.chat_template)
    seq2seq.check(tokenizer, data_config)
    troubles: list[str] = []
    train_on = data_config.train_on
    tokenized = cached_tokenized(cache_folder, tokenizer, conversations, fingerprint, train_on, should_stop, on_progress, troubles.append)
    troubles += token_checks.troubles(tokenizer, conversations, train_on)
    return Preview(tokenizer, conversations, tokenized, train_on, tuple(troubles))


def _special_texts(tokenizer: Any, conversations: Sequence[Conversation]) -> list[str]:
    """A sentence on rows in which people wrote what the tokenizer reads as its special tokens, if there are any."""
    tokens = [re.escape(token) for token in tokenizer.all_special_tokens if len(token) > 1]
    if not tokens:
        return []
    found = [re.search("|".join(tokens), message.content) for row in conversations for message in row.messages]
    written = sorted({match[0] for match in found if match})
    if not written:
        return []
    rows = sum(match is not None for match in found)
    names = ", ".join(written[:5])
    turns = "1 turn holds" if rows == 1 else f"{rows:,} turns hold"
    return [f"{turns} the text of special tokens ({names}), which the model reads as the tokens themselves."]


class Preview:
    """Answers about rows that are tokenized already; `troubles` are sentences on what a person should look at."""

    def __init__(
        self, tokenizer: Any, conversations: Sequence[Conversation], tokenized: Tokenized, train_on: str, troubles: tuple[str, ...] = ()
    ) -> None:
        self.tokenizer, self.conversations, self.tokenized, self.train_on = tokenizer, conversations, tokenized, train_on
        self.troubles = (*troubles, *_special_texts(tokenizer, conversations))
        added = tokenizer.added_tokens_decoder.items()
        self._special = np.array(sorted({*tokenizer.all_special_ids, *(id for id, token in added if token.special)}), np.int32)

    def report(self, max_seq_len: int, long_rows: str, micro_batch_size: int, seed: int) -> LengthReport:
        """What training reads at these settings, and what is lost."""
        return lengths.report(self.tokenized.counts, max_seq_len, long_rows, micro_batch_size, seed)

    def order(self, by: Order, max_seq_len: int) -> list[int]:
        """Indices of conversations; `cut` has only those longer than `max_seq_len`, in source order."""
        sizes = self.tokenized.counts.lengths
        if by == "cut":
            order = np.flatnonzero(sizes > max_seq_len)
        elif by == "source":
            order = np.arange(len(sizes))
        else:
            order = np.argsort(-sizes if by == "longest" else sizes, kind="stable")
        indices: list[int] = order.tolist()
        return indices

    def fitted(self, max_seq_len: int, long_rows: str) -> lengths.Fitted:
        """The sequences that training makes of the conversations: none of one that is left out, several of one that is split."""
        return lengths.fit(self.tokenized.counts, max_seq_len, long_rows)

    def views(self, indices: Sequence[int], max_seq_len: int, long_rows: str) -> list[RowView]:
        """The rows at these indices, as they would be in one batch."""
        rows = [self.conversations[index] for index in indices]
        token_row = token_rows(self.tokenizer, [written(self.tokenizer, row.messages, self.train_on) for row in rows])
        shown = self.tokenized.select(indices)
        fitted = lengths.fit(shown.counts, max_seq_len, long_rows)
        widest = int(fitted.lengths.max(initial=0))
        views = []
        for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
            mine = fitted.row == place
            begin, end = fitted.begin[mine] - shown.starts[place], fitted.end[mine] - shown.starts[place]
            views.append(
                RowView(
                    row=row.row,
                    index=index,
                    tokens=len(token_row[place].ids),
                    trained=int(fitted.trained[mine].sum()),
                    kept_tokens=int((end - begin).sum()),
                    pieces=self._pieces(token_row[place], list(zip(begin.tolist(), end.tolist(), strict=True))),
                    padding=int((widest - (end - begin)).sum()),
                )
            )
        return views

    def _pieces(self, row: TokenRow, read: list[tuple[int, int]]) -> tuple[Piece, ...]:
        """The row's text, cut where the kind of token changes. `read` are the stretches that go through the model."""
        cut, trained = np.ones(len(row.ids), bool), np.zeros(len(row.ids), bool)
        for begin, end in read:
            cut[begin:end] = False
            trained[begin + 1 : end] = row.trained[begin + 1 : end]  # the first is never predicted
        special = np.isin(row.ids, self._special)
        pieces = []
        begins = {begin for begin, _ in read if begin}
        for first, until in pairwise(sorted({*_changes(trained, cut, special), *begins})):
            # From where the piece begins to where the next begins: a character that two tokens share is shown once, and
            # what no token stands for (a tokenizer may drop blanks) stays visible.
            begin = int(row.offsets[first, 0]) if first else 0
            end = int(row.offsets[until, 0]) if until < len(row.ids) else len(row.text)
            text = self.tokenizer.convert_ids_to_tokens(int(row.ids[first])) if special[first] else row.text[begin:end]
            if text:
                pieces.append(
                    Piece(
                        text=text,
                        trained=bool(trained[first]),
                        special=bool(special[first]),
                        cut=bool(cut[first]),
                        begins=first in begins,
                    )
                )
        return tuple(pieces)


def _changes(trained: npt.NDArray[np.bool_], cut: npt.NDArray[np.bool_], special: npt.NDArray[np.bool_]) -> list[int]:
    """Indices of tokens at which a piece begins, and the end."""
    kind = trained + 2 * cut
    begins = np.ones(len(kind), bool)
    begins[1:] = (kind[1:] != kind[:-1]) | special[1:] | special[:-1]
    return [*np.flatnonzero(begins).tolist(), len(kind)]
