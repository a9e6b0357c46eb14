"""What the Data tab writes: bounded, escaped, and true of one row as of many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qlora_ui.data import lengths
from qlora_ui.data.checks import Conversation
from qlora_ui.data.formats import Message
from qlora_ui.data.lengths import Counts
from qlora_ui.engine.preview import Piece, RowView
from qlora_ui.inspection import Look
from qlora_ui.ui import data_markup


def test_a_row_of_very_many_turns_or_pieces_is_shown_in_part_and_says_so() -> None:
    turns = tuple(Message(role="user", content="<b>") for _ in range(50_000))
    shown = data_markup.bubbles([Conversation(row=1, messages=turns)])
    assert shown.count("&lt;b&gt;") == data_markup.SHOWN_TURNS
    assert "49,900 more turns are not shown here" in shown
    pieces = tuple(Piece(text="<b>", trained=True, special=False, cut=False) for _ in range(50_000))
    view = RowView(row=1, index=0, tokens=9, trained=9, kept_tokens=9, pieces=pieces, padding=0)
    shown = data_markup.token_view([view])
    assert shown.count("&lt;b&gt;") == data_markup.SHOWN_PIECES
    assert "49,600 more pieces are not shown here" in shown


def test_what_is_going_on_has_a_bar_that_shows_how_far_it_is_where_that_is_known() -> None:
    assert '<progress aria-label="9 rows read …"></progress>' in data_markup.progress(Look(data=None, doing="9 rows read …"))
    assert 'value="0.250"' in data_markup.progress(Look(data=None, doing="<b>", share_done=0.25))
    assert "<b>" not in data_markup.progress(Look(data=None, doing="<b>", share_done=0.25))


def test_what_a_max_length_costs_is_said_in_one_sentence() -> None:
    # Two rows, of 10 and 4 tokens, all trained.
    counts = Counts.of(np.array([1, 2]), np.array([0, 10, 14]), np.ones(14, bool))

    def said(max_seq_len: int, long_rows: str) -> str:
        return data_markup.lost(lengths.report(counts, max_seq_len, long_rows, 1, 0))

    assert said(10, "truncate") == "No row is longer than 10 tokens, nothing is lost."
    assert said(6, "truncate") == "1 row is longer and cut at its end: 4 tokens are not read, 4 fewer are trained."
    assert said(6, "split") == "1 row is longer and split: 0 tokens are not read, 1 fewer are trained."
    assert said(3, "drop") == "2 rows are longer and left out: 14 tokens are not read, 12 fewer are trained."
    untrained = replace(lengths.report(counts, 10, "truncate", 1, 0), untrainable=(2,))
    assert data_markup.lost(untrained) == "No row is longer than 10 tokens, nothing is lost; 1 row with nothing to train on is left out."
