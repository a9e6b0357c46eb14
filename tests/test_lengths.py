"""Lengths: what a max length does to rows, told from arrays; packing loses nothing; a suggested length that is enough."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ui.data import lengths
from qlora_ui.data.lengths import Bin, Counts, fit, histogram, pack, padding_share, padding_share_packed, report, suggest

LONG_ROWS = ("truncate", "drop", "split")
MANY = settings(max_examples=60)


def counts_of(rows: list[list[bool]]) -> Counts:
    """Rows of tokens that are trained or not, numbered 10, 20, 30 in their source."""
    sizes = np.array([len(row) for row in rows], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    trained = np.array([token for row in rows for token in row], bool)
    return Counts.of(10 * (1 + np.arange(len(rows))), starts, trained)


def answers(*sizes: tuple[int, int]) -> Counts:
    """Rows of a prompt and an answer of so many tokens."""
    return counts_of([[False] * prompt + [True] * answer for prompt, answer in sizes])


rows_of_tokens = st.lists(st.lists(st.booleans(), max_size=40), max_size=12)


@MANY
@given(rows_of_tokens, st.integers(1, 45), st.sampled_from(LONG_ROWS))
def test_what_is_read_is_what_slicing_each_row_would_give(rows: list[list[bool]], max_seq_len: int, long_rows: str) -> None:
    read, untrainable = [], []
    for index, row in enumerate(rows):
        if long_rows == "drop" and len(row) > max_seq_len:
            continue
        stops = range(0, len(row), max_seq_len) if long_rows == "split" else range(1)
        pieces = [(index, stop, row[stop : stop + max_seq_len]) for stop in stops]
        kept = [piece for piece in pieces if any(piece[2][1:])]
        read += kept
        if not kept:
            untrainable.append(index)
    counts = counts_of(rows)
    fitted = fit(counts, max_seq_len, long_rows)
    assert fitted.row.tolist() == [index for index, _, _ in read]
    assert (fitted.begin - counts.starts[fitted.row]).tolist() == [begin for _, begin, _ in read]
    assert fitted.lengths.tolist() == [len(piece) for _, _, piece in read]
    assert fitted.trained.tolist() == [sum(piece[1:]) for _, _, piece in read]
    assert np.flatnonzero(fitted.untrainable).tolist() == untrainable
    assert np.flatnonzero(fitted.over).tolist() == [index for index, row in enumerate(rows) if len(row) > max_seq_len]


@MANY
@given(rows_of_tokens, st.integers(16, 45), st.sampled_from(LONG_ROWS))
def test_what_is_read_and_what_is_lost_are_together_what_there_was(rows: list[list[bool]], max_seq_len: int, long_rows: str) -> None:
    found = report(counts_of(rows), max_seq_len, long_rows, 2, 0)
    assert found.tokens_total + found.tokens_lost == sum(map(len, rows))
    assert found.tokens_trained + found.trained_lost == sum(sum(row[1:]) for row in rows)
    assert sum(bin.rows for bin in found.histogram) == len(rows)
    assert 0 <= found.padding_share < 1
    assert 0 <= found.padding_share_packed < 1


def test_a_report_counts_what_is_cut_dropped_and_split() -> None:
    counts = answers((10, 10), (10, 30), (30, 10), (4, 1))
    truncate = report(counts, 20, "truncate", 1, 0)
    assert (truncate.rows, truncate.tokens_total, truncate.tokens_trained) == (3, 20 + 20 + 5, 10 + 10 + 1)
    assert (truncate.over, truncate.untrainable, truncate.longest) == (2, (30,), 40)
    assert (truncate.tokens_lost, truncate.trained_lost) == (20 + 40, 20 + 10)
    assert truncate.trained_share == pytest.approx(21 / 45)
    drop = report(counts, 20, "drop", 1, 0)
    assert (drop.rows, drop.tokens_total, drop.tokens_trained, drop.untrainable) == (2, 25, 11, ())
    split = report(counts, 20, "split", 1, 0)
    # The first token of the second piece of an answer is read, but nothing comes before it to predict it from.
    assert (split.rows, split.tokens_total, split.tokens_trained) == (5, 20 + 40 + 20 + 5, 10 + (10 + 19) + 10 + 1)
    assert (split.tokens_lost, split.trained_lost, split.untrainable) == (20, 1, ())
    assert fit(counts, 20, "split").empty_pieces == 1


def test_no_rows_at_all_is_a_report_of_zeros() -> None:
    for long_rows in LONG_ROWS:
        empty = report(counts_of([]), 64, long_rows, 4, 0)
        assert (empty.rows, empty.tokens_total, empty.longest, empty.padding_share, empty.padding_share_packed) == (0, 0, 0, 0, 0)
        assert empty.trained_share == 0
        assert empty.histogram == ()
        assert empty.suggested_max_seq_len == 64


# The suggestion -------------------------------------------------------------------------------------------------------------


@MANY
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=150))
def test_at_the_suggested_length_almost_every_row_keeps_almost_all_it_teaches_and_64_less_would_not_do(
    sizes: list[tuple[int, int]],
) -> None:
    counts = answers(*sizes)
    teaching = [(prompt, answer) for prompt, answer in sizes if answer]

    def enough(length: int) -> bool:
        kept = sum(min(max(length - prompt, 0), answer) >= 0.99 * answer for prompt, answer in teaching)
        return kept >= 0.99 * len(teaching)

    suggested = suggest(counts)
    assert suggested % 64 == 0
    assert enough(suggested)
    assert suggested == 64 or not enough(suggested - 64)
    assert suggested - 64 < max(64, *(prompt + answer for prompt, answer in sizes))


def test_one_endless_row_in_a_thousand_does_not_raise_the_suggestion() -> None:
    assert suggest(answers(*[(50, 50)] * 999, (50, 9000))) == 128


def test_the_suggestion_is_a_value_that_the_setting_takes() -> None:
    assert suggest(answers((1, 200_000))) == 131_072


# Packing and padding --------------------------------------------------------------------------------------------------------


@MANY
@given(st.data(), st.integers(1, 60))
def test_packing_loses_no_row_and_overfills_no_bin(data: st.DataObject, capacity: int) -> None:
    sizes = data.draw(st.lists(st.integers(0, capacity), max_size=80))
    bins = pack(sizes, capacity)
    assert sorted(index for bin in bins for index in bin) == list(range(len(sizes)))
    assert all(bins)
    loads = [sum(sizes[index] for index in bin) for bin in bins]
    assert max(loads, default=0) <= capacity
    assert sum(load <= capacity / 2 for load in loads) <= 1  # any two such bins would have been one
    assert padding_share_packed(np.array(sizes, np.int64), capacity) == pytest.approx(
        1 - sum(sizes) / (padded_bins(sizes, capacity) * capacity) if sizes else 0
    )


def padded_bins(sizes: list[int], capacity: int) -> int:
    return sum(size == capacity for size in sizes) + len(pack([size for size in sizes if size < capacity], capacity))


def test_the_best_fit_is_taken() -> None:
    bins = pack([7, 5, 3, 4, 1], 10)
    assert sorted(map(sorted, bins)) == [[0, 2], [1, 3, 4]]


def test_a_length_beyond_the_capacity_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="11 does not fit into 10"):
        pack([3, 11], 10)


def test_padding_is_what_fills_a_batch_up_to_its_longest_row() -> None:
    assert padding_share(np.array([5, 5, 5, 5]), 2, 0) == 0
    assert padding_share(np.array([2, 8]), 2, 0) == pytest.approx(6 / 16)
    assert padding_share(np.array([2, 8]), 1, 0) == 0
    assert padding_share(np.array([4]), 4, 0) == 0


def test_the_same_seed_shuffles_the_same_way() -> None:
    sizes = np.random.default_rng(1).integers(1, 100, 200)
    assert padding_share(sizes, 4, 42) == padding_share(sizes, 4, 42)
    assert len({padding_share(sizes, 4, seed) for seed in range(5)}) > 1


# The histogram --------------------------------------------------------------------------------------------------------------


@MANY
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=100))
def test_every_row_is_in_the_bar_that_holds_its_length(sizes: list[int]) -> None:
    bins = histogram(np.array(sizes, np.int64))
    assert len(bins) <= 40
    assert bins[0].low == 0
    assert bins[-1].high >= max(sizes)
    assert all(bin.low == before.high + 1 for before, bin in pairwise(bins))
    assert [bin.rows for bin in bins] == [sum(bin.low <= size <= bin.high for size in sizes) for bin in bins]


def test_a_few_endless_rows_do_not_flatten_all_others_into_one_bar() -> None:
    sizes = [100 + number % 100 for number in range(1000)] + [90_000]
    bins = histogram(np.array(sizes, np.int64))
    assert sum(bin.rows > 0 for bin in bins) > 10
    assert bins[-1] == Bin(low=201, high=90_000, rows=1)
    assert bins[-2].high == 200


def test_bars_have_round_edges() -> None:
    assert {bin.high - bin.low + 1 for bin in histogram(np.arange(1, 700))[1:]} == {20}
    assert histogram(np.array([3])) == (Bin(low=0, high=1, rows=0), Bin(low=2, high=2, rows=0), Bin(low=3, high=3, rows=1))


def test_fifty_thousand_rows_are_reported_while_a_setting_moves() -> None:
    chance = np.random.default_rng(0)
    sizes = np.clip(chance.lognormal(4.8, 0.6, 50_000).astype(np.int64), 20, 3000)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    counts = Counts.of(np.arange(50_000), starts, chance.random(starts[-1]) < 0.5)
    report(counts, 512, "truncate", 4, 42)
    fastest = []
    for long_rows in LONG_ROWS:
        for max_seq_len in (128, 512):
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                lengths.report(counts, max_seq_len, long_rows, 4, 42)
                seconds.append(time.perf_counter() - started)
            fastest.append(min(seconds))
    assert max(fastest) < 0.25  # 0.05 on an idle machine
