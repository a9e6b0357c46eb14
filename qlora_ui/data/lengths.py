"""How long rows are in tokens, and what a max length does to them. Knows nothing of tokenizers or disk.

Training and the report before it ask the same function, `fit`, which tokens of which row are read.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qlora_ui.config import KNOBS

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A bar of the histogram: rows of `low` to `high` tokens, both included. All are equally wide, but the last may be wider."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class LengthReport:
    """What training will read of the kept rows at one max length, and what is lost there.

    `rows`, `tokens_total` and `tokens_trained` count what is read after long rows were cut, dropped or split (then `rows`
    counts the pieces). `tokens_lost` and `trained_lost` are the rest of the rows as they came; `over`, `longest` and the
    histogram are of the rows as they came. `untrainable` are source numbers of rows that have no trained token left,
    `too_long` those of rows that were dropped for their length.
    The first token of whatever goes through the model is never predicted, so it never counts as trained.
    """

    max_seq_len: int
    long_rows: str
    rows: int
    tokens_total: int
    tokens_trained: int
    longest: int
    over: int
    tokens_lost: int
    trained_lost: int
    untrainable: tuple[int, ...]
    too_long: tuple[int, ...]
    suggested_max_seq_len: int
    padding_share: float
    padding_share_packed: float
    histogram: tuple[Bin, ...]

    @property
    def left_out(self) -> int:
        """Rows that are not trained on: dropped for their length, or without a trained token left."""
        return len(self.untrainable) + len(self.too_long)

    @property
    def trained_share(self) -> float:
        """Trained tokens of all tokens that are read, 0 to 1."""
        return self.tokens_trained / self.tokens_total if self.tokens_total else 0.0


def lengths_of_nothing(max_seq_len: int, long_rows: str) -> LengthReport:
    """The report on no rows at all."""
    return LengthReport(
        max_seq_len=max_seq_len,
        long_rows=long_rows,
        rows=0,
        tokens_total=0,
        tokens_trained=0,
        longest=0,
        over=0,
        tokens_lost=0,
        trained_lost=0,
        untrainable=(),
        too_long=(),
        suggested_max_seq_len=max_seq_len,
        padding_share=0.0,
        padding_share_packed=0.0,
        histogram=(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Rows as they came, as positions in one long line of tokens.

    Row `i` has the source number `rows[i]` and the tokens `starts[i]` up to `starts[i + 1]`; before position `t` of the
    line there are `trained_before[t]` trained tokens, so what any stretch trains is one subtraction.
    """

    rows: Ints
    starts: Ints
    trained_before: Ints

    @staticmethod
    def of(rows: Ints, starts: Ints, trained: Bools) -> Counts:
        """Counts of rows that lie one after the other."""
        return Counts(rows=rows, starts=starts, trained_before=np.concatenate([[0], np.cumsum(trained, dtype=np.int64)]))

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each row."""
        return np.diff(self.starts)

    def trained(self, begin: Ints, end: Ints) -> Ints:
        """Trained tokens of stretches that go through the model on their own: all but the first."""
        trained: Ints = self.trained_before[end] - self.trained_before[np.minimum(begin + 1, end)]
        return trained

    @cached_property
    def needed(self) -> Ints:
        """Of each row with trained tokens, the length at which it keeps 99 % of them."""
        begin, end = self.starts[:-1], self.starts[1:]
        trained = self.trained(begin, end)
        wanted = self.trained_before[np.minimum(begin + 1, end)] + np.ceil(0.99 * trained).astype(np.int64)
        needed: Ints = np.searchsorted(self.trained_before, wanted) - begin
        return needed[trained > 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """What training reads: sequence `j` is the tokens `begin[j]` up to `end[j]`, of the row at index `row[j]`, in source order.

    `over` and `untrainable` are of rows, by index: longer than max_seq_len, and without a trained token left (a row that
    was dropped for its length is not among these). `empty_pieces` is the number of split-off pieces that train nothing.
    """

    row: Ints
    begin: Ints
    end: Ints
    trained: Ints
    over: Bools
    untrainable: Bools
    empty_pieces: int

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each sequence."""
        return self.end - self.begin


def fit(counts: Counts, max_seq_len: int, long_rows: str) -> Fitted:
    """Rows to sequences of at most `max_seq_len` tokens, each with a trained token. `long_rows` is truncate, drop or split."""
    over = counts.lengths > max_seq_len
    pieces = np.maximum(1, -(-counts.lengths // max_seq_len)) if long_rows == "split" else np.ones(len(over), np.int64)
    row = np.repeat(np.arange(len(over)), pieces)
    piece = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = counts.starts[row] + piece * max_seq_len
    end = np.minimum(begin + max_seq_len, counts.starts[row + 1])
    trained = counts.trained(begin, end)
    dropped = over if long_rows == "drop" else np.zeros(len(over), bool)
    kept = (trained > 0) & ~dropped[row]
    read = np.zeros(len(over), bool)
    read[row[kept]] = True
    return Fitted(
        row=row[kept],
        begin=begin[kept],
        end=end[kept],
        trained=trained[kept],
        over=over,
        untrainable=~read & ~dropped,
        empty_pieces=int(np.sum((trained == 0) & (pieces > 1)[row])),
    )


def report(counts: Counts, max_seq_len: int, long_rows: str, micro_batch_size: int, seed: int) -> LengthReport:
    """All that is shown of lengths at these settings."""
    fitted = fit(counts, max_seq_len, long_rows)
    tokens, trained = int(fitted.lengths.sum()), int(fitted.trained.sum())
    return LengthReport(
        max_seq_len=max_seq_len,
        long_rows=long_rows,
        rows=len(fitted.row),
        tokens_total=tokens,
        tokens_trained=trained,
        longest=int(counts.lengths.max(initial=0)),
        over=int(fitted.over.sum()),
        tokens_lost=int(counts.lengths.sum()) - tokens,
        trained_lost=int(counts.trained(counts.starts[:-1], counts.starts[1:]).sum()) - trained,
        untrainable=tuple(counts.rows[fitted.untrainable].tolist()),
        too_long=tuple(counts.rows[fitted.over].tolist()) if long_rows == "drop" else (),
        suggested_max_seq_len=suggest(counts),
        padding_share=padding_share(fitted.lengths, micro_batch_size, seed),
        padding_share_packed=padding_share_packed(fitted.lengths, max_seq_len),
        histogram=histogram(counts.lengths),
    )


def suggest(counts: Counts) -> int:
    """The smallest multiple of 64 at which 99 % of the rows that train anything keep at least 99 % of their trained tokens.

    So it is never more than the longest row needs; it stays within what the setting allows.
    """
    needed = np.sort(counts.needed)
    enough = int(needed[-(-99 * len(needed) // 100) - 1]) if len(needed) else 0
    return min(max(64, -(-enough // 64) * 64), int(KNOBS["max_seq_len"].high or 0))


def padding_share(lengths: Ints, micro_batch_size: int, seed: int) -> float:
    """Share of padding in a pass over all sequences, each batch padded to its longest.

    The order is a seeded shuffle of this function's own: the one of a training differs, its share of padding hardly does.
    """
    if not len(lengths):
        return 0.0
    shuffled = np.random.default_rng(seed).permutation(lengths)
    first = np.arange(0, len(shuffled), micro_batch_size)
    sizes = np.diff(np.append(first, len(shuffled)))
    return 1 - float(lengths.sum() / (np.maximum.reduceat(shuffled, first) * sizes).sum())


def padding_share_packed(lengths: Ints, max_seq_len: int) -> float:
    """Share of padding when sequences are packed into bins of `max_seq_len` tokens."""
    short = lengths[lengths < max_seq_len]  # the others fill their bins; in a moving setting there may be very many
    bins = len(lengths) - len(short) + len(pack(short.tolist(), max_seq_len))
    return 1 - float(lengths.sum()) / (bins * max_seq_len) if bins else 0.0


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins that hold at most `capacity`: best fit, longest first. Every index is in exactly one bin.

    No length may exceed the capacity. Bins with equal room are interchangeable, so they wait in one list, by their room.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"a length of {max(lengths)} does not fit into {capacity}")
    waiting: dict[int, list[list[int]]] = {}  # room -> bins
    rooms: list[int] = []  # the keys of `waiting`, ascending
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen = capacity, list[int]()
            bins.append(chosen)
        else:
            room = rooms[at]
            chosen = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[at]
        chosen.append(index)
        if room - length not in waiting:
            waiting[room - length] = []
            insort(rooms, room - length)
        waiting[room - length].append(chosen)
    return bins


WIDTHS = [width * 10**power for power in range(7) for width in (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)]


def histogram(lengths: Ints) -> tuple[Bin, ...]:
    """Rows by length in at most 40 bins with round edges.

    The bins reach to the longest row, unless a few rows (one in 200) are much longer than all others: those are in the last.
    """
    if not len(lengths):
        return ()
    longest, usual = int(lengths.max()), int(np.quantile(lengths, 0.995))
    reach = max(1, longest if longest <= 2 * usual else usual)
    width = next(width for width in [1, 2, 4, 5, 8, *WIDTHS] if width * 39 >= reach)
    bins = -(-reach // width)
    highs = [width * (number + 1) for number in range(bins)]
    if longest > highs[-1]:
        highs.append(longest)
    counted = np.diff(np.searchsorted(np.sort(lengths), highs, side="right"), prepend=0)
    lows = [0, *(high + 1 for high in highs[:-1])]
    return tuple(Bin(low=low, high=high, rows=rows) for low, high, rows in zip(lows, highs, counted.tolist(), strict=True))
